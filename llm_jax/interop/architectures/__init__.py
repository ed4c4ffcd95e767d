"""The families: for each a config read as a model of ours, and a table of tensors."""
