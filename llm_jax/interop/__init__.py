"""Weights of other code bases, both ways: Hugging Face folders, a config and a table of tensors per architecture."""
