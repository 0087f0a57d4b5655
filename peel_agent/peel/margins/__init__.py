"""Margins of blocks and their parts over cheap stand-ins (method.md 4)."""
