"""Fine-tune an encoder on a task of GLUE or SQuAD: see ``__main__.py``, which is the command."""
