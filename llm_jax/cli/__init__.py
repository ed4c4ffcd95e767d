"""The commands: `llm-jax train`, `generate`, `serve`, `describe`, `convert`. Each is an absl main that reads flags and
calls functions.
"""
