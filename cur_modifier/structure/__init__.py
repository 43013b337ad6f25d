"""What a model is made of, found by trying."""
