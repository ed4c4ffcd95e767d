"""Experiments as data: each file's `get_config` returns the whole run, its docstring says how to start it."""
