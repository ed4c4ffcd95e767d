"""Pre-training recipes. `lm` is the parent; the others differ from it in objective, architecture or size."""
