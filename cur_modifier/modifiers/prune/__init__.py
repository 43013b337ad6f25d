"""Removal of neurons and heads."""
