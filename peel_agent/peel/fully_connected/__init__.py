"""Fully connected ReLU networks and their YES bounds (method.md 7)."""
