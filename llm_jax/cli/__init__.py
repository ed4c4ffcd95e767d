<<<<<<< HEAD
"""The commands: `llm-jax train`, `generate`, `describe`, `convert`. Each is an absl main that reads flags and calls
functions.
"""
=======
"""The commands: `llm-jax train`, `generate` and `convert`. Each is an absl main that calls functions."""
>>>>>>> gguf
