"""Megatron-core's distributed checkpoints."""
