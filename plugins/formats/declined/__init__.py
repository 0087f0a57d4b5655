"""Checkpoints that are known and not read."""
