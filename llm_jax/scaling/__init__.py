"""Scaling laws: many small runs, what they say about a large one."""
