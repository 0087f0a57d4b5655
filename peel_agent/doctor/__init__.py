"""doctor: what a run needs, looked at before it is needed; and a configuration written from what is found.

Torch is imported in a child of this process only.
"""

from peel_agent.doctor.examination import examine
from peel_agent.doctor.folder import WatchedPlace, watched_place
from peel_agent.doctor.template import configuration_text

__all__ = ["WatchedPlace", "configuration_text", "examine", "watched_place"]
