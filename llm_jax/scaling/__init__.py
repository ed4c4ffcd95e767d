"""Scaling: laws, sweeps, mixtures of domains and what emerges with size."""
