"""What can go wrong, as one tree.

PeelError
├── ConfigurationError     the configuration or a flag is wrong                       (exit 2)
│   └── ProbeError         the probe cannot be used with this model                   (exit 2)
├── CheckpointError        a checkpoint cannot be used                                (exit 3)
│   ├── IncompleteCheckpoint   still being written, or truncated
│   ├── TornCheckpoint         changed or vanished while it was read                  retryable
│   ├── NoRoom                 there is no room for a copy of it
│   ├── StoreUnavailable       an object store cannot be reached now                  retryable
│   ├── OtherArchitecture      the checkpoint to compare with is of another model
│   ├── NotEarlier             the checkpoint to compare with is the same, or of a later step
│   ├── UnknownFamily          no family plug-in knows this architecture
│   └── WeightsMismatch        missing, unexpected or misshapen weights
├── NoReport               there is no report of what was asked for                 (exit 3)
├── NoWitness              no better weights were proven
├── WorkerError            peeling died, or ran out of memory                         retryable
│   └── GaveWay                it was ended for somebody else's sake; no fault of the checkpoint
├── DeviceUnavailable      no device can be had now: busy, locked, or out of reach    retryable
├── LedgerError            the state folder cannot be read or written                 (exit 2)
├── DeliveryError          a tracker or a sink will never take what was sent
│   ├── DestinationUnavailable  it cannot be reached now                             retryable
│   └── DestinationDenied      it refuses us until somebody changes something         retryable, slowly
└── PluginError            a named plug-in is missing or broken                       (exit 2)

Every error says what happened, names the value, and says what to do.
"""

from __future__ import annotations

LONGEST = 2000
"""Characters of a message that are shown."""


class PeelError(Exception):
    """An error meant for the user: `what` happened and the `remedy`.

    `retryable` says whether the same call may succeed later; `exit_code` is the command's exit status.
    """

    exit_code: int = 1
    retryable: bool = False

    def __init__(self, what: str, *, remedy: str) -> None:
        self.what = printable(what)
        super().__init__(self.what)
        self.remedy = printable(remedy)

    def __str__(self) -> str:
        return f"{self.what}\n  -> {self.remedy}"


def printable(text: str) -> str:
    """Text fit for a terminal and a log: on one line, control characters escaped, shortened when very long.

    Names and messages may come out of a hostile checkpoint.
    """
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    return "".join(c if c.isprintable() else " " if c.isspace() else repr(c)[1:-1] for c in text)


class ConfigurationError(PeelError):
    exit_code = 2


class ProbeError(ConfigurationError):
    pass


class PluginError(PeelError):
    exit_code = 2


class CheckpointError(PeelError):
    exit_code = 3


class IncompleteCheckpoint(CheckpointError):
    pass


class TornCheckpoint(CheckpointError):
    retryable = True


class NoRoom(CheckpointError):
    pass


class StoreUnavailable(CheckpointError):
    retryable = True


class OtherArchitecture(CheckpointError):
    pass


class NotEarlier(CheckpointError):
    pass


class UnknownFamily(CheckpointError):
    pass


class WeightsMismatch(CheckpointError):
    pass


class NoReport(PeelError):
    exit_code = 3


class NoWitness(PeelError):
    pass


class WorkerError(PeelError):
    retryable = True


class GaveWay(WorkerError):
    pass


class DeviceUnavailable(PeelError):
    """It may be free later."""

    retryable = True


class LedgerError(PeelError):
    exit_code = 2


class DeliveryError(PeelError):
    pass


class DestinationUnavailable(DeliveryError):
    retryable = True


class DestinationDenied(DeliveryError):
    retryable = True
