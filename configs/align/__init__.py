"""Alignment recipes. `dpo` is the parent; the others differ from it in objective, in what is read, or in the model."""
