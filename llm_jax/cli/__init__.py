"""The commands: `llm-jax train`, `llm-jax generate`. Each is an absl main that reads a config and calls functions."""
