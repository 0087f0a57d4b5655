"""The command line."""

from peel_agent.cli.main import main

__all__ = ["main"]
