"""Removal of neurons, heads and channels."""
