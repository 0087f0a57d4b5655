"""The command line."""

from peel_agent.signals import ending_at_once

with ending_at_once():  # the imports below take a moment
    from peel_agent.cli.main import main

__all__ = ["main"]
