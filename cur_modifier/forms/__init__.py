"""What is stored for a factored module, and how it computes.

``sizes``, ``schema``, ``base``, ``registry``, ``quantizer`` and one module for each form are also
shipped with every checkpoint, side by side in one folder: transformers copies the modules of one
flat folder, found by their relative imports. So they import one another relatively, and nothing
else of ours.
"""
