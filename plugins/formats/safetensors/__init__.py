"""Weights in safetensors: single files, and folders of save_pretrained."""
