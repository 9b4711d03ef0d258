"""Measures: each asks an engine, and yields raw samples that `record` can store. No measure averages."""
