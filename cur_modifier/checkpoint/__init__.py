"""Saving factored and resized checkpoints."""
