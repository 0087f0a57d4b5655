"""The forward sweep: each block is visited once, its stand-ins solved and spliced in (method.md 8)."""
