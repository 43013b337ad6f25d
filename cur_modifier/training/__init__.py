"""Pieces of a training loop that know nothing of models."""
