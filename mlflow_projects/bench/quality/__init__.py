"""Perplexity at a given size, ours beside the published methods: protocol P.

The command is ``__main__.py``. Wrong arguments end it at once: it imports torch and llm-compressor
after checking them, and each row is measured in a process of its own.
"""
