"""Engines: what computes a model's log-probabilities and tokens. They know checkpoints, not suites."""
