"""Sweeps: configs that are many configs, for `llm-jax sweep`; and shapes that follow from one number."""
