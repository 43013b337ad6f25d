"""The published experiments: see ``__main__.py``, which is the command."""
