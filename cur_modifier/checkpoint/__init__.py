"""Saving factored checkpoints."""
