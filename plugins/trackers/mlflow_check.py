"""Whether an MLflow server, a run and its artifact store would take what is sent: asked at the start, and by doctor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from peel_agent.errors import PeelError
from peel_agent.records import Check

from .mlflow_failure import Stage, is_known, run_of, shown

if TYPE_CHECKING:
    from .mlflow_run import MlflowTracker

TIME_TAG = "peel.checked_ms"
FILE = "peel/doctor.txt"
"""What a check leaves in the run: nothing less tells whether it may be written to."""

CLOCK_SECONDS = 30.0
REFUSED_HOST = "Invalid Host header"
"""What the server says, with 403, to a host and port that --allowed-hosts does not name."""


@dataclass
class _Asking:
    """Of whom is asked, and for what now: the name of the check, and what an error would be of."""

    tracker: MlflowTracker
    mlflow: Any
    uri: str = ""
    what: str = "server"
    stage: Stage = "run"


def looks(tracker: MlflowTracker, mlflow: Any) -> Iterator[Check]:
    """The server and the run; nothing is written. The first that fails is the last."""
    return _guarded(_Asking(tracker, mlflow), _run_checks)


def checks(tracker: MlflowTracker, mlflow: Any, now: Callable[[], float]) -> Iterator[Check]:
    """As `looks`, and the clock, and whether the run and its artifact store may be written to."""
    return _guarded(_Asking(tracker, mlflow), partial(_written, now=now))


def _guarded(asking: _Asking, steps: Callable[[_Asking], Iterator[Check]]) -> Iterator[Check]:
    try:
        asking.uri = asking.tracker.given_uri(asking.mlflow)
        unmade = _unmade(asking.uri)
        if unmade is not None:
            yield unmade
            return
        yield from steps(asking)
    except PeelError as error:
        yield _failed(asking.what, error)
    except Exception as error:
        if not is_known(asking.mlflow, error, asking.stage):
            raise
        failed = _failed(asking.what, asking.tracker.failure(error, asking.stage))
        yield _refused_host(asking.uri, error) or failed


def _run_checks(asking: _Asking) -> Iterator[Check]:
    client = asking.mlflow.MlflowClient(tracking_uri=asking.uri)
    client.search_experiments(max_results=1)
    yield Check("server", True, f"{asking.tracker.where()} answers")
    asking.what = "run"
    run_id = asking.tracker.existing_run(client)
    yield _check_of(run_of(client, run_id), asking.uri) if run_id else _to_be_created(asking.tracker)


def _written(asking: _Asking, *, now: Callable[[], float]) -> Iterator[Check]:
    check = None
    for check in _run_checks(asking):
        yield check
    yield from _clock(asking.uri, now)
    if check is None or not check.ok:  # it is to be created, or deleted
        return
    client = asking.mlflow.MlflowClient(tracking_uri=asking.uri)
    run_id = asking.tracker.existing_run(client)
    asking.what, asking.stage = "run is writable", "numbers"
    client.set_tag(run_id, TIME_TAG, str(int(1000 * now())))
    yield Check("run is writable", True, f"tag {TIME_TAG} was written")
    asking.what, asking.stage = "artifact store", "files"
    client.log_text(run_id, "peel-agent doctor could write here.\n", FILE)
    yield Check("artifact store", True, f"{FILE} was written")


def _failed(what: str, error: PeelError) -> Check:
    return Check(what, False, error.what, error.remedy)


def _unmade(uri: str) -> Check | None:
    """A database of this machine that is not there is not made in order to try it: nobody may have meant that one."""
    file = Path(uri.partition("?")[0].removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or file.exists():
        return None
    return Check(
        "server",
        None,
        f"MLflow would keep its runs in {file}, a file of this machine that is not there yet",
        "name the server or the database of the training: [tracker.mlflow] tracking_uri, --tracking-uri or "
        "MLFLOW_TRACKING_URI; if it is this file, nothing is to be done: the first checkpoint makes it",
    )


def _to_be_created(tracker: MlflowTracker) -> Check:
    return Check(
        "run",
        None,
        f"none is there yet: the first checkpoint makes one in the experiment {tracker.experiment}; "
        "whether its artifacts can be written shows only then",
        "to know now, name the training's run: [tracker.mlflow] run_id, or MLFLOW_RUN_ID",
    )


def _check_of(run: Any, uri: str) -> Check:
    run_id = run.info.run_id
    named = f"{run_id} ({run.info.run_name})" if run.info.run_name else run_id
    if run.info.lifecycle_stage == "deleted":
        return Check(
            "run",
            False,
            f"{named} is deleted",
            f"restore it (`mlflow runs restore --run-id {run_id}`), or name another run_id",
        )
    return Check("run", True, f"{named} is found at {shown(uri)}")


def _refused_host(uri: str, error: Exception) -> Check | None:
    """The port counts too: a server that allows `mlflow` refuses `mlflow:5000` (mlflow#22095)."""
    if REFUSED_HOST not in str(error):
        return None
    asked = urlsplit(uri).netloc.rpartition("@")[2]
    return Check(
        "server",
        False,
        f"the server answers, and refuses to be called {asked} (403, {REFUSED_HOST})",
        f'start it with --allowed-hosts "{asked}" (host and port as in tracking_uri: the host alone does not allow the '
        "port), or use a name in tracking_uri that it allows",
    )


def _clock(uri: str, now: Callable[[], float]) -> Iterator[Check]:
    """The server's clock by its Date header; nothing for a store that is no server, or one that sends none."""
    if not uri.startswith(("http://", "https://")):
        return
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    before = now()
    answer = http_request(get_default_host_creds(uri), "/version", "GET", raise_on_status=False)
    if "Date" not in answer.headers:
        return
    server_time = parsedate_to_datetime(answer.headers["Date"]).timestamp()
    ahead = server_time - min(max(server_time, before - 1.0), now())  # it is in whole seconds
    if abs(ahead) > CLOCK_SECONDS:
        which = "ahead of" if ahead > 0 else "behind"
        yield Check(
            "server's clock",
            False,
            f"it is {abs(ahead):.0f} s {which} this machine's",
            "have both set by NTP: points and runs are shown in the wrong order",
        )
    else:
        yield Check("server's clock", True, "it agrees with this machine's")
