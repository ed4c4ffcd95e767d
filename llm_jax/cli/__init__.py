"""The commands: `llm-jax train`, `generate`, `describe`. Each is an absl main that reads flags and calls functions."""
