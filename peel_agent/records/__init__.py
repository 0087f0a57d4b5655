"""The frozen records that cross the doors between rooms.

    watch -> CheckpointRef -> load -> Snapshot, Probe -> capture -> Trace -> peel -> PeelReport
          -> judge -> Verdict -> publish -> Publication -> trackers

Importing this module imports neither torch nor numpy: the parent daemon lives on these records alone.
"""

from peel_agent.records.checkpoint import (
    CheckpointRef,
    FileStamp,
    Readiness,
)
from peel_agent.records.model import (
    Anatomy,
    Block,
    Chunk,
    Gradient,
    Observation,
    Probe,
    Projection,
    Snapshot,
    TokenIds,
    Trace,
    Weights,
)
from peel_agent.records.precision import FULL_PRECISION, SETS, WeightSet
from peel_agent.records.report import (
    SCHEMA,
    BoundMemory,
    BoundReport,
    CheckpointInfo,
    Estimate,
    Findings,
    LayerReport,
    ModelInfo,
    Notice,
    PartName,
    PartReport,
    Peeled,
    PeelReport,
    Plan,
    ProbeInfo,
    Progress,
    Severity,
    Skipped,
    Status,
    Timing,
    Zone,
)
from peel_agent.records.verdict import (
    Publication,
    Rule,
    RuleKind,
    RuleState,
    Verdict,
)

__all__ = [
    "FULL_PRECISION",
    "SCHEMA",
    "SETS",
    "Anatomy",
    "Block",
    "BoundMemory",
    "BoundReport",
    "CheckpointInfo",
    "CheckpointRef",
    "Chunk",
    "Estimate",
    "FileStamp",
    "Findings",
    "Gradient",
    "LayerReport",
    "ModelInfo",
    "Notice",
    "Observation",
    "PartName",
    "PartReport",
    "PeelReport",
    "Peeled",
    "Plan",
    "Probe",
    "ProbeInfo",
    "Progress",
    "Projection",
    "Publication",
    "Readiness",
    "Rule",
    "RuleKind",
    "RuleState",
    "Severity",
    "Skipped",
    "Snapshot",
    "Status",
    "Timing",
    "TokenIds",
    "Trace",
    "Verdict",
    "WeightSet",
    "Weights",
    "Zone",
]
