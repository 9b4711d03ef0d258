"""Checks of finished checkpoints that share no code with the builder."""
