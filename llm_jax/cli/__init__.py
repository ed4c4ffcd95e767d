"""The commands: `llm-jax train`, `generate` and `convert`. Each is an absl main that calls functions."""
