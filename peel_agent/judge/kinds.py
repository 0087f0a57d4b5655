"""Every rule kind, and what it reads. Another kind is one more entry in one of these tables."""

from __future__ import annotations

from collections.abc import Mapping

from peel_agent.judge.layers import LAYER_KINDS
from peel_agent.judge.run_kinds import RUN_KINDS
from peel_agent.judge.testimony import Kind
from peel_agent.judge.time_kinds import TIME_KINDS
from peel_agent.records import RuleKind

KINDS: Mapping[RuleKind, Kind] = {**LAYER_KINDS, **RUN_KINDS, **TIME_KINDS}
