"""A layer held against its own past: how far its weights moved, and what that was worth (method.md 4b)."""
