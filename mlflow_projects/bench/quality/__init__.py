"""Perplexity at a given size, ours beside the published methods: protocol P.

The command is ``__main__.py``. It imports torch and llm-compressor only in the processes that
measure, so that it answers at once and takes no memory beside them.
"""
