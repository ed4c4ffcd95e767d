"""Alignment: preferences and reinforcement learning."""
