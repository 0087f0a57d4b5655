"""`peel-agent demo`: a real training with one block held back, an MLflow store, and the sidecar on it, live."""

from peel_agent.demo.show import run_demo

__all__ = ["run_demo"]
