"""Optional callbacks for a training: they mark each checkpoint that is whole, tag the run in MLflow, and start nothing.

`peel_agent.callbacks.transformers` is for transformers' Trainer, `peel_agent.callbacks.lightning` for Lightning's.
"""
