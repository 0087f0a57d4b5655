"""The judge's states in, what is told of them out: silenced, inhibited, repeated, grouped by sink. No clock, no I/O."""

from peel_agent.notify.groups import group, still_firing, to_sinks
from peel_agent.notify.tell import in_text, silenced_by, standing, tell

__all__ = ["group", "in_text", "silenced_by", "standing", "still_firing", "tell", "to_sinks"]
