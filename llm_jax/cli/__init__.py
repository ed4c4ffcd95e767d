"""The commands: `llm-jax train`, `generate`, `describe`, `convert`. Each is an absl main that reads flags and calls
functions.
"""
