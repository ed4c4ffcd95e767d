"""Serving a model: the engine that batches requests, and the server that speaks OpenAI's API."""
