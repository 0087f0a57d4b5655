"""doctor: what a run needs, looked at before it is needed; and a configuration written from what is found.

Torch is imported in a child of this process only.
"""

from peel_agent.doctor.examination import examine
from peel_agent.doctor.found import Found, find
from peel_agent.doctor.template import configuration_text

__all__ = ["Found", "configuration_text", "examine", "find"]
