"""What must survive a restart, in one SQLite file an agent: jobs, checkpoints done, rule states, alerts, deliveries.

A checkpoint's report, the states it left, its alerts and everything to be sent are committed in one transaction with
the end of its job. What is sent leaves only after the destination took it. Others may read and send beside the agent.
"""

from peel_agent.ledger.alerting import Alerting, silence, silences, unsilence
from peel_agent.ledger.database import COPY, FILE, is_held, open_beside
from peel_agent.ledger.files import read_json, write_durably
from peel_agent.ledger.history import Extent, kept_run, kept_run_of
from peel_agent.ledger.ledger import Ledger
from peel_agent.ledger.outbox import Lane, Outbox, Owed
from peel_agent.ledger.reading import Reader, RunState
from peel_agent.ledger.run import HISTORY, Job, LastObserved, Outcome, RunLedger
from peel_agent.ledger.schema import SCHEMA_VERSION

__all__ = [
    "COPY",
    "FILE",
    "HISTORY",
    "SCHEMA_VERSION",
    "Alerting",
    "Extent",
    "Job",
    "Lane",
    "LastObserved",
    "Ledger",
    "Outbox",
    "Outcome",
    "Owed",
    "Reader",
    "RunLedger",
    "RunState",
    "is_held",
    "kept_run",
    "kept_run_of",
    "open_beside",
    "read_json",
    "silence",
    "silences",
    "unsilence",
    "write_durably",
]
