"""The commands: `llm-jax train`, `sweep`, `fit`, `generate`, `serve`, `describe`, `convert`. Each is an absl main that
reads flags and calls functions.
"""
