"""Speed of served models, beside the dense one: see ``__main__.py``, which is the command."""
