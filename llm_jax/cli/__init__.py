"""The commands: `llm-jax train`, `llm-jax generate`, `llm-jax convert`. Each is an absl main that reads a config and calls functions."""
