"""Perplexity and accuracy of one model: see ``__main__.py``, which is the command."""
