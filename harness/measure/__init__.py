"""Measures: each asks an engine and yields raw samples, whose keys `record/samples.py` lists. No measure averages."""
