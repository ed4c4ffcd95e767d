"""Alignment: learning from preferences (`dpo` is their parent) and reinforcement learning (`grpo` is theirs)."""
