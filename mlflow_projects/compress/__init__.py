"""Compress a model by a recipe: see ``__main__.py``, which is the command."""
