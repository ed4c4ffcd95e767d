"""Scaling laws: what a loss will be before there is a model, what a run costs, and fits of the one from the other."""
