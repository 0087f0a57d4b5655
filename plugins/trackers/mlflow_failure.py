"""What an error of MLflow's library means: away, refused, no MLflow at all, or a request that will never be taken.

Something else may answer at a tracking URI: the page of a proxy, a login that the client is sent on to, the JSON of
another service. MLflow's client takes some of it for an empty run; so the answers are looked at.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import unquote, urljoin

from peel_agent.errors import LONGEST, DeliveryError, DestinationDenied, DestinationUnavailable

from ..redaction import redacted  # noqa: TID252 -- shared by sinks and trackers

Stage = Literal["run", "numbers", "files"]

_TRANSIENT = frozenset(
    {
        "INTERNAL_ERROR",  # also what the client says when nobody answers
        "TEMPORARILY_UNAVAILABLE",
        "DEADLINE_EXCEEDED",
        "REQUEST_LIMIT_EXCEEDED",
        "RESOURCE_EXHAUSTED",
        "RESOURCE_ALREADY_EXISTS",  # another sidecar created the same experiment just now: it will be found
        "ABORTED",
        "CANCELLED",
    }
)

_NEVER = frozenset({"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST"})
"""What the server will say of the same request again, whatever anybody changes."""

_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR})
"""What a folder of artifacts that is written to directly says until somebody changes something."""

CREDENTIALS = "MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"

QUESTION = "/api/2.0/mlflow/experiments/search"

SHOWN = 160
"""Characters of a strange answer that are shown."""


class StrangeAnswer(Exception):
    """The answer is none that MLflow gives: a run without an id, an experiment of another name."""


def run_of(client: Any, run_id: str) -> Any:
    """The run of this id. Raises StrangeAnswer for one without an id: what answers is no MLflow, and takes anything."""
    run = client.get_run(run_id)
    must_be(bool(run.info.run_id), f"the run {run_id} has no id")
    return run


def must_be(holds: bool, words: str) -> None:
    """Raises StrangeAnswer where what MLflow always says does not hold."""
    if not holds:
        raise StrangeAnswer(words)


@dataclass(frozen=True)
class Where:
    """What failed: the place in words, the tracking URI, and the artifact store, each without secrets but the URI."""

    words: str
    uri: str
    artifacts: str


def is_known(mlflow: Any, error: Exception, stage: Stage) -> bool:
    """Whether a server, a store or their answers are at fault, and not this program.

    The client of an artifact store raises errors of its own library (a login that is missing, a bucket), whichever that
    is: of files, everything is the store's.
    """
    from google.protobuf.json_format import Error as FormatError
    from sqlalchemy.exc import SQLAlchemyError

    of_library = (mlflow.exceptions.MlflowException, SQLAlchemyError, OSError, ImportError, FormatError)
    return stage == "files" or isinstance(error, (*of_library, StrangeAnswer, json.JSONDecodeError))


def failure(error: Exception, stage: Stage, where: Where) -> DeliveryError:
    """What is raised for an error that the library raised at this stage; servers repeat logins, which are left out."""
    unredacted, secrets = _failure(error, stage, where), tuple(_secrets(where.uri))
    what, remedy = (redacted(text, secrets, shown=LONGEST) for text in (unredacted.what, unredacted.remedy))
    return type(unredacted)(what, remedy=remedy)


def _failure(error: Exception, stage: Stage, where: Where) -> DeliveryError:
    is_file = stage == "files"
    if where.uri.startswith(("http://", "https://")) and _is_strange(error):
        strange = _of_strange(error, where)
        if strange is not None:
            return strange
    place = f"the artifact store of {where.words} ({where.artifacts})" if is_file else where.words
    why = cause(error, where.uri)
    if is_file and not hasattr(error, "error_code") and not isinstance(error, OSError):
        why = f"{type(error).__name__}: {why}"
    if _is_transient(error):
        mend = "start the server, or correct [tracker.mlflow] tracking_uri; it is tried again"
        if is_file:
            mend = "see that it is up and has room; metrics and tags are written all the same, it is tried again"
        return DestinationUnavailable(f"{place} cannot be reached: {why}", remedy=mend)
    code = getattr(error, "error_code", "")
    if stage == "numbers" and code in _NEVER:
        return DeliveryError(f"{place} will never take these metrics: {why}", remedy="please report it")
    if is_file:
        return DestinationDenied(
            f"{place} refused files, while metrics and tags are written all the same: {why}",
            remedy="give this user the right to write there, or serve artifacts through the tracking server; "
            "it is tried again",
        )
    if code == "RESOURCE_DOES_NOT_EXIST":
        return DestinationDenied(
            f"{place} does not exist: {why}",
            remedy="correct [tracker.mlflow] run_id, --run-id or MLFLOW_RUN_ID (MLflow's page of the training's run "
            "shows its id), or leave it out to have the run found or created",
        )
    return DestinationDenied(
        f"{place} refused the results: {why}",
        remedy=f"correct [tracker.mlflow], the login ({CREDENTIALS}) or the server's permissions, after the reason "
        "given; it is tried again",
    )


def _is_transient(error: Exception) -> bool:
    code = getattr(error, "error_code", None)
    if code is not None:
        return code in _TRANSIENT
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:  # an upload answered by the artifact store
        return bool(status >= 500 or status in (408, 429))
    from sqlalchemy.exc import OperationalError

    if isinstance(error, OSError) and error.errno in _FORBIDDEN:
        return False
    return isinstance(error, (OSError, OperationalError))


# ---------------------------------------------------------------- answers of something else


def _is_strange(error: Exception) -> bool:
    """Whether something answered, and not as MLflow does."""
    from google.protobuf.json_format import Error as FormatError

    if isinstance(error, (StrangeAnswer, FormatError, json.JSONDecodeError)):
        return True
    if hasattr(error, "json"):  # MLflow's RestException: an error in JSON
        return "error_code" not in (error.json or {})
    if "not in a valid JSON format" in str(error):
        return True
    match = re.search(r"failed with error code (\d+) != 200", str(error))
    return match is not None and 300 <= int(match[1]) < 500 and int(match[1]) not in (401, 403, 408, 429)


def _of_strange(error: Exception, where: Where) -> DeliveryError | None:
    """Asks once more, and looks at the answer as it comes; None for one that MLflow gives."""
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    try:
        answer = http_request(
            get_default_host_creds(where.uri),
            QUESTION,
            "GET",
            params={"max_results": 1},
            allow_redirects=False,
            raise_on_status=False,
            max_retries=0,
        )
    except Exception:  # by now nobody answers: the first error stands
        return None
    status, text = answer.status_code, answer.text
    if status in (401, 403):
        return DestinationDenied(
            f"{where.words} refused the results: {status}: {_excerpt(text)}",
            remedy=f"give what it wants: {CREDENTIALS}; it is tried again",
        )
    if status >= 500 or (status == 200 and "experiments" in _json(text) and not isinstance(error, StrangeAnswer)):
        return None
    if 300 <= status < 400:
        to = shown(urljoin(where.uri, answer.headers.get("Location", "")))
        what = f"it sends on to {to} ({status})"
        mend = f"if that is the server, name it in tracking_uri; if it is a login, give what it wants: {CREDENTIALS}"
    else:
        what = f"it answers {_kind(text)} ({status}): {_excerpt(text)}"
        mend = "correct [tracker.mlflow] tracking_uri or MLFLOW_TRACKING_URI: a proxy, a login page or another service "
        mend += "is at this address"
    kind = DestinationDenied if status in (404, 405, 410) else DestinationUnavailable
    state = "refused the results" if kind is DestinationDenied else "cannot be reached"
    return kind(f"{where.words} {state}: no MLflow answers there; {what}", remedy=f"{mend}; it is tried again")


def _json(text: str) -> dict[str, Any]:
    try:
        form = json.loads(text)
    except ValueError:
        return {}
    return form if isinstance(form, dict) else {}


def _kind(text: str) -> str:
    if text.lstrip().startswith("<"):
        return "with a web page"
    if not text.strip():
        return "with nothing"
    try:
        json.loads(text)
    except ValueError:
        return "with text"
    return "with JSON of another service"


def _excerpt(text: str) -> str:
    """The words of a page, or the beginning of anything else."""
    plain = re.sub(r"<(script|style)\b.*?</\1>", " ", text, flags=re.DOTALL | re.IGNORECASE)
    return " ".join(re.sub(r"<[^>]*>", " ", plain).split())[:SHOWN] or "no words in it"


# ---------------------------------------------------------------- without secrets


def _secrets(uri: str) -> Iterator[str]:
    """What a request to this URI has to log in with, as its headers have it too."""
    from mlflow.utils.credentials import get_default_host_creds

    logins = [unquote(login) for login in re.findall(r"://([^/].*)@", uri, flags=re.DOTALL)]
    if uri.startswith(("http://", "https://")):
        variables = get_default_host_creds(uri)
        logins += [f"{variables.username}:{variables.password}"] if variables.password else []
        yield from (text for text in (variables.token, variables.client_secret) if text)
    for login in logins:
        yield login
        yield login.partition(":")[2]


def shown(uri: str) -> str:
    """The URI without user, password and query. A local database's path may hold an `@` and is left alone."""
    without_login = re.sub(r"://[^/].*@", "://", uri, flags=re.DOTALL)
    return re.sub(r"^[^/:@]+:[^/@]*@", "", without_login).split("?")[0]


def cause(error: Exception, uri: str) -> str:
    """The system's own words when it is a connection that failed, else the first line of the error without secrets."""
    root: BaseException = error
    while root.__context__ is not None:
        root = root.__context__
    if isinstance(root, OSError) and root.strerror and root.filename is None:
        return root.strerror
    text = (str(error).splitlines() or [""])[0] or type(error).__name__
    if uri:
        text = text.replace(uri.rstrip("/"), shown(uri).rstrip("/"))
    return re.sub(r"://[^/\s]\S*@", "://", text)[:400]
