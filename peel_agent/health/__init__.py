"""What the agent says of itself: `/healthz`, `/readyz` and `/metrics` over HTTP, and sd_notify to systemd."""

from peel_agent.health.server import HealthServer
from peel_agent.health.systemd import Notifier

__all__ = ["HealthServer", "Notifier"]
