"""Evaluation and benchmark harness for NVFP4 quantizations of hybrid DeltaNet models."""

__version__ = "0.6.0"
