"""Supervised tuning."""
