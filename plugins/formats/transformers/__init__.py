"""Checkpoints of transformers' Trainer."""
