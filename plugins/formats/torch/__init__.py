"""Weights written by torch.save."""
