"""The health endpoint and sd_notify: real sockets, real HTTP clients, Prometheus's own parsers."""

from __future__ import annotations

import http.client
import itertools
import json
import re
import resource
import shutil
import socket
import sqlite3
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import REGISTRY, Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families as text_families

from peel_agent.errors import ConfigurationError
from peel_agent.health import HealthServer, Notifier
from peel_agent.health.metrics import LABEL_LENGTH, RUNS, SERIES_OF_A_RUN, label
from peel_agent.health.server import CONNECTIONS
from peel_agent.records.figures import AgentFigures, DeliveryFigures, RunFigures
from tests.waiting import wait_for

RUN = RunFigures(
    run="llama",
    outcomes={"found": 7.0, "peeled": 5.0, "lost": 1.0},
    waiting=2,
    lag_seconds=31.5,
    last_step=4000,
    last_peeled_at=1.7e9,
    seconds_by_stage={"load": 1.25, "solve": 8.5},
    firing={"below": 3},
)
FIGURES = AgentFigures(
    version="1.2.3",
    started_at=1.6e9,
    runs=(RUN,),
    deliveries=(DeliveryFigures("llama", "mlflow", "numbers", delivered=5.0, postponed=2.0, dead=1, owed=4),),
    child_memory_bytes=123_456_789,
)
SAMPLES = {
    ("peel_checkpoints_total", ("llama", "found")): 7.0,
    ("peel_checkpoints_total", ("llama", "peeled")): 5.0,
    ("peel_checkpoints_total", ("llama", "lost")): 1.0,
    ("peel_checkpoints_waiting", ("llama",)): 2.0,
    ("peel_lag_seconds", ("llama",)): 31.5,
    ("peel_last_step", ("llama",)): 4000.0,
    ("peel_last_peeled_timestamp_seconds", ("llama",)): 1.7e9,
    ("peel_stage_seconds_total", ("llama", "load")): 1.25,
    ("peel_stage_seconds_total", ("llama", "solve")): 8.5,
    ("peel_deliveries_total", ("llama", "mlflow", "numbers", "delivered")): 5.0,
    ("peel_deliveries_total", ("llama", "mlflow", "numbers", "postponed")): 2.0,
    ("peel_deliveries_total", ("llama", "mlflow", "numbers", "dead")): 1.0,
    ("peel_deliveries_owed", ("llama", "mlflow", "numbers")): 4.0,
    ("peel_alerts_firing", ("llama", "below")): 3.0,
    ("peel_ready", ()): 1.0,
    ("peel_child_memory_bytes", ()): 123_456_789.0,
    ("peel_series_left_out", ()): 0.0,
    ("peel_info", ("1.2.3",)): 1.0,
}
LABELS = ("run", "destination", "lane", "outcome", "stage", "rule", "version")
OPENMETRICS = {"Accept": "application/openmetrics-text; version=1.0.0"}


@contextmanager
def serving(
    figures: Callable[[], AgentFigures] = lambda: FIGURES,
    alive: Callable[[], bool] = lambda: True,
    *,
    listen: str = "127.0.0.1:0",
    patience: float = 60.0,
) -> Iterator[HealthServer]:
    server = HealthServer(listen, figures, alive, patience=patience)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def port_of(server: HealthServer) -> int:
    assert server.address is not None
    return int(server.address.rpartition(":")[2])


def get(
    server: HealthServer, path: str, headers: dict[str, str] | None = None, method: str = "GET", host: str = "127.0.0.1"
) -> tuple[int, http.client.HTTPMessage, str]:
    with closing(http.client.HTTPConnection(host, port_of(server), timeout=240)) as client:
        client.request(method, path, headers=headers or {})
        answer = client.getresponse()
        return answer.status, answer.headers, answer.read().decode()


def connected(server: HealthServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port_of(server)), timeout=240)


def received(client: socket.socket) -> bytes:
    """All that comes until the server closes."""
    try:
        return b"".join(iter(lambda: client.recv(65536), b""))
    except ConnectionResetError:
        return b""


def samples(
    text: str, families: Callable[[str], Iterable[Metric]] = text_families
) -> dict[tuple[str, tuple[str, ...]], float]:
    """Every sample by its name and its labels' values, in the order of LABELS."""
    every = [sample for family in families(text) for sample in family.samples]
    assert {name for sample in every for name in sample.labels} <= set(LABELS)
    by_name = {
        (sample.name, tuple(sample.labels[name] for name in LABELS if name in sample.labels)): sample.value
        for sample in every
    }
    assert len(by_name) == len(every), "a series came twice"
    return by_name


def test_metrics_hold_every_figure() -> None:
    """Each figure is one series under its name and labels; beside them there is only the agent's own process."""
    with serving() as server:
        status, headers, text = get(server, "/metrics")
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
    shown = samples(text)
    process = {key: value for key, value in shown.items() if key[0].startswith("process_")}
    assert process["process_resident_memory_bytes", ()] > 1e6
    assert {key: value for key, value in shown.items() if key not in process} == SAMPLES


def test_a_figure_that_is_not_there_is_no_series() -> None:
    """Before the first checkpoint there is no last step, and without a child no memory of one."""
    figures = AgentFigures(version="1", started_at=0.0, runs=(RunFigures("new"),))
    with serving(lambda: figures) as server:
        shown = samples(get(server, "/metrics")[2])
    assert {name for name, _ in shown if name.startswith("peel_")} == {
        "peel_checkpoints_waiting",
        "peel_lag_seconds",
        "peel_ready",
        "peel_info",
        "peel_series_left_out",
    }


def test_metrics_speak_openmetrics_when_asked() -> None:
    """The other format has the same series and is read by its strict parser."""
    with serving() as server:
        _, headers, text = get(server, "/metrics", OPENMETRICS)
    assert headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
    shown = samples(text, openmetrics_families)
    assert {key: value for key, value in shown.items() if key[0].startswith("peel_")} == SAMPLES


@pytest.mark.parametrize("accept", ["application/openmetrics-text; version=no", "text/plain; version=9.x;;=", ",;=,"])
def test_an_accept_header_that_is_nonsense_gets_plain_text(accept: str) -> None:
    with serving() as server:
        status, _, text = get(server, "/metrics", {"Accept": accept})
    assert status == 200
    assert samples(text)["peel_last_step", ("llama",)] == 4000.0


def test_an_accept_header_adds_no_header_to_the_answer() -> None:
    """A header folded over two lines would come back inside Content-Type."""
    head = "GET /metrics HTTP/1.1\r\nAccept: application/openmetrics-text; version=2.x\r\n Set-Cookie: a=b\r\n\r\n"
    with serving() as server, connected(server) as client:
        client.sendall(head.encode())
        answer = received(client)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"Set-Cookie" not in answer


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
@pytest.mark.parametrize("runs", [0, 1, 3])
def test_promtool_finds_nothing_to_say(runs: int) -> None:
    figures = replace(FIGURES, runs=tuple(replace(RUN, run=f"run {i}") for i in range(runs)))
    with serving(lambda: figures) as server:
        text = get(server, "/metrics")[2]
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False, timeout=120
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


HOSTILE = {
    "control characters": "a\x1b[31mb\x00",
    "line break": 'a\npeel_ready 1\n# HELP "',
    "quote and backslash": '"} 1 \\',
    "too long": "x" * 100_000,
    "lone surrogate": "a\ud800",
    "right to left": "a\u202eb",
}


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_name_is_one_short_printable_label(name: str) -> None:
    """It reaches no other series, keeps its number, and stays apart from a name that looks the same once shortened."""
    runs = (replace(RUN, run=name), replace(RUN, run=name + " ", last_step=1), replace(RUN, run="other"))
    figures = replace(FIGURES, runs=runs, deliveries=(), version=name)
    with serving(lambda: figures) as server:
        text = get(server, "/metrics")[2]
    shown = samples(text)
    assert shown["peel_last_step", (label(name),)] == 4000.0
    assert shown["peel_last_step", (label(name + " "),)] == 1.0
    assert shown["peel_last_step", ("other",)] == 4000.0
    values = [value for _, labels in shown for value in labels]
    assert all(value.isprintable() and len(value) <= LABEL_LENGTH for value in values)
    assert sum(len(line) for line in text.splitlines()) < 60_000


def test_a_short_printable_name_is_its_own_label() -> None:
    for name in ("llama-7b", "", "ein Lauf, größer", "x" * LABEL_LENGTH):
        assert label(name) == name


def test_series_are_bounded_and_what_is_left_out_is_counted() -> None:
    """200 of 1,000 runs are shown, 150 series of a run with 10,000 rules, and a run that is told twice once."""
    runs = [replace(RUN, run=f"run {i}", firing={}) for i in range(1000)]
    runs[0] = replace(runs[0], firing={f"rule {i}": 1 for i in range(10_000)})
    asked = 1000 * 9 + 10_000 + 4 + 9
    delivery = DeliveryFigures("run 0", "mlflow", "files")
    figures = replace(FIGURES, runs=(*runs, runs[1]), deliveries=(delivery,))
    with serving(lambda: figures) as server:
        shown = samples(get(server, "/metrics")[2])
    of_runs = [labels[0] for _, labels in shown if labels and labels[0].startswith("run ")]
    assert set(of_runs) == {f"run {i}" for i in range(RUNS)}
    assert of_runs.count("run 0") == SERIES_OF_A_RUN
    assert of_runs.count("run 1") == 9
    assert shown["peel_deliveries_owed", ("run 0", "mlflow", "files")] == 0.0
    assert shown["peel_series_left_out", ()] == asked - len(of_runs)


def test_two_servers_share_nothing() -> None:
    """Each has its own registry; the library's global one has none of our names."""
    with serving() as one, serving(lambda: replace(FIGURES, version="9")) as other:
        assert ("peel_info", ("1.2.3",)) in samples(get(one, "/metrics")[2])
        assert ("peel_info", ("9",)) in samples(get(other, "/metrics")[2])
    assert not [metric.name for metric in REGISTRY.collect() if metric.name.startswith("peel")]


def test_healthz_follows_the_loop() -> None:
    alive = True
    with serving(alive=lambda: alive) as server:
        assert get(server, "/healthz")[::2] == (200, "ok\n")
        alive = False
        assert get(server, "/healthz")[::2] == (503, "the agent's loop has not ticked lately\n")


def test_healthz_is_no_traceback_when_liveness_is_not_known() -> None:
    def alive() -> bool:
        raise KeyError("secret")

    with serving(alive=alive) as server:
        assert get(server, "/healthz")[::2] == (503, "liveness is not known: KeyError\n")


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
@pytest.mark.parametrize("host", ["evil.example", "10.1.2.3:80", "", "a" * 300])
def test_every_host_header_is_answered(path: str, host: str) -> None:
    """Probes come by pod address, by name and through proxies."""
    with serving() as server:
        assert get(server, path, {"Host": host})[0] == 200


def test_readyz_gives_the_reasons() -> None:
    unready = replace(FIGURES, ready=False, unready=("the store is away", "a\nb\x1b"))
    figures = FIGURES
    with serving(lambda: figures) as server:
        status, headers, text = get(server, "/readyz")
        assert (status, headers["Content-Type"], json.loads(text)) == (
            200,
            "application/json",
            {"ready": True, "reasons": []},
        )
        figures = unready
        status, _, text = get(server, "/readyz?verbose")
        assert (status, json.loads(text)) == (503, {"ready": False, "reasons": ["the store is away", "a b\\x1b"]})
        assert samples(get(server, "/metrics")[2])["peel_ready", ()] == 0.0


def test_a_locked_ledger_is_told_by_its_class_and_passes(tmp_path: Path) -> None:
    """A real lock: 503 on two paths without message or traceback, /healthz goes on, and all is well after it."""
    path = tmp_path / "ledger.sqlite"
    with closing(sqlite3.connect(path)) as holder:
        holder.execute("CREATE TABLE steps (step INTEGER)")
        holder.execute("INSERT INTO steps VALUES (7)")
        holder.commit()

        def figures() -> AgentFigures:
            with closing(sqlite3.connect(path, timeout=0)) as reader:
                ((step,),) = reader.execute("SELECT step FROM steps").fetchall()
            return replace(FIGURES, runs=(replace(RUN, last_step=step),))

        with serving(figures) as server:
            holder.execute("BEGIN EXCLUSIVE")
            sentence = "the agent's figures cannot be read: OperationalError"
            assert get(server, "/metrics")[::2] == (503, sentence + "\n")
            status, _, text = get(server, "/readyz")
            assert (status, json.loads(text)) == (503, {"ready": False, "reasons": [sentence]})
            assert get(server, "/healthz")[0] == 200
            holder.rollback()
            assert samples(get(server, "/metrics")[2])["peel_last_step", ("llama",)] == 7.0


def test_figures_that_never_come_hold_up_neither_healthz_nor_stop() -> None:
    come = threading.Event()

    def figures() -> AgentFigures:
        come.wait()
        return FIGURES

    try:
        with serving(figures, patience=0.3) as server:
            for _ in range(3):
                status, _, text = get(server, "/readyz")
                assert (status, json.loads(text)["reasons"]) == (
                    503,
                    ["the agent's figures cannot be read: TimeoutError"],
                )
                assert get(server, "/healthz")[0] == 200
        assert server.address is None
    finally:
        come.set()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/metrics/", 404),
        ("GET", "/../etc/passwd", 404),
        ("GET", "//healthz", 404),
        ("POST", "/nowhere", 404),
        ("POST", "/metrics", 405),
        ("PUT", "/readyz", 405),
        ("DELETE", "/healthz", 405),
        ("OPTIONS", "/healthz", 405),
        ("get", "/healthz", 405),
        ("GET", "http://proxy.example/healthz", 200),
        ("HEAD", "/metrics", 200),
        ("HEAD", "/readyz", 200),
    ],
)
def test_paths_and_methods(method: str, path: str, status: int) -> None:
    with serving() as server:
        answered, headers, text = get(server, path, method=method)
        again = get(server, "/healthz")[0]
    assert (answered, again) == (status, 200)
    assert headers["Allow"] == ("GET, HEAD" if status == 405 else None)
    assert (text == "") == (method == "HEAD")
    assert int(headers["Content-Length"]) > 0
    assert "Traceback" not in text


BAD_REQUESTS = {
    "not http": (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"400"),
    "http 0.9": (b"GET /healthz\r\n\r\n", b"400"),
    "a broken host": (b"GET http://[/healthz HTTP/1.1\r\n\r\n", b"400"),
    "http 2": (b"PRI * HTTP/2.0\r\n\r\n", b"400"),
    "200 headers": (b"GET /healthz HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", b"431"),
    "a header of 1 MB": (b"GET /healthz HTTP/1.1\r\nA: " + b"b" * 1_000_000 + b"\r\n\r\n", b"431"),
    "a path of 1 MB": (b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\n\r\n", b"431"),
    "a body of 20 MB": (b"POST /metrics HTTP/1.1\r\nContent-Length: 20000000\r\n\r\n" + b"b" * 20_000_000, b"405"),
    "no headers": (b"GET /healthz HTTP/1.1\r\n\r\n", b"200"),
}


@pytest.mark.parametrize(("sent", "status"), BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_a_bad_request_gets_its_answer(sent: bytes, status: bytes) -> None:
    """However much of it is still on its way, the client reads the status."""
    with serving() as server, connected(server) as client:
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        assert received(client).split(b" ", 2)[:2] == [b"HTTP/1.1", status]
        assert get(server, "/healthz")[0] == 200


@pytest.mark.parametrize("sent", [b"", b"GET /healthz HT", b"GET /healthz HTTP/1.1\r\nHost: a\r\n"])
def test_half_a_request_is_dropped(sent: bytes) -> None:
    """The server closes, without an answer, and has served another client meanwhile."""
    with serving(patience=0.3) as server, connected(server) as client:
        client.sendall(sent)
        assert get(server, "/healthz")[0] == 200
        assert received(client) == b""


def test_a_client_that_takes_no_answer_is_dropped() -> None:
    """It asks for megabytes and reads none: the server closes once its patience is over."""
    runs = tuple(
        replace(RUN, run=f"run {i} " + "x" * 100, firing={f"r{i}": 1 for i in range(140)}) for i in range(RUNS)
    )
    figures = replace(FIGURES, runs=runs)
    with serving(lambda: figures, patience=5) as server, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port_of(server)))
        client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert get(server, "/healthz")[0] == 200
        assert held(server, [client]) == 1
        wait_for(lambda: held(server, [client]) == 0)
        head, _, body = received(client).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK")
    assert len(body) < int(re.findall(rb"Content-Length: (\d+)", head)[0])


def held(server: HealthServer, clients: Sequence[socket.socket]) -> int:
    """How many connections of `clients` the server still holds a socket for, by the kernel's table."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    ends = {(row[1][-4:], row[2][-4:]) for row in rows if row[9] != "0"}  # inode 0: no process has it any more
    return sum((f"{port_of(server):04X}", f"{client.getsockname()[1]:04X}") in ends for client in clients)


@pytest.mark.parametrize(
    "sent", [b"", b"GET /metrics HT", b"GET /healthz HTTP/1.1\r\n\r\n"], ids=["idle", "half", "kept"]
)
def test_a_crowd_of_clients_that_stay_shuts_nobody_out(sent: bytes) -> None:
    """With 100 and more connections held open a probe is answered, by the same two threads, over a bounded number."""
    with ExitStack() as crowd, serving(patience=3600) as server:
        assert get(server, "/metrics")[0] == 200  # both threads run
        threads = set(threading.enumerate())
        clients = [crowd.enter_context(connected(server)) for _ in range(CONNECTIONS + 100)]
        for client in clients:
            with suppress(BrokenPipeError, ConnectionResetError):  # one of those that had to go
                client.sendall(sent)
        for path in ("/healthz", "/readyz", "/metrics"):
            assert get(server, path)[0] == 200
        assert set(threading.enumerate()) <= threads
        wait_for(lambda: held(server, clients) <= CONNECTIONS)


def test_a_process_without_file_descriptors_answers_later(caplog: pytest.LogCaptureFixture) -> None:
    """A client that connects while there is none is answered once there is one, and the loop is not told of errors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with serving() as server, socket.socket() as client:
        assert get(server, "/readyz")[0] == 200
        client.settimeout(240)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))  # stdin, stdout and stderr have them
            client.connect(("127.0.0.1", port_of(server)))
            client.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
            client.settimeout(0.5)
            with pytest.raises(TimeoutError):
                client.recv(1)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        client.settimeout(240)
        assert received(client).startswith(b"HTTP/1.1 200 OK")
    assert [record.getMessage() for record in caplog.records] == []


def test_many_probes_at_once_are_all_answered() -> None:
    """Their figures are read by one thread, one call at a time."""
    threads, at_once, most = set[str](), itertools.count(), list[int]()
    inside = threading.Semaphore(1)

    def figures() -> AgentFigures:
        most.append(inside.acquire(blocking=False))
        threads.add(threading.current_thread().name)
        next(at_once)
        inside.release()
        return FIGURES

    statuses = list[int]()
    with serving(figures) as server:
        probes = [
            threading.Thread(target=lambda: statuses.append(get(server, "/readyz")[0])) for _ in range(CONNECTIONS // 2)
        ]
        for probe in probes:
            probe.start()
        for probe in probes:
            probe.join()
    assert statuses == [200] * len(probes)
    assert all(most)
    assert len(most) == len(probes)
    assert len(threads) == 1


def test_nothing_is_printed_or_logged(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(0), serving() as server:
        for path in ("/healthz", "/metrics", "/nowhere"):
            get(server, path)
        with connected(server) as client:
            client.sendall(b"nonsense\r\n\r\n")
            received(client)
    written = capfd.readouterr()
    assert (written.out, written.err) == ("", "")
    assert [record.message for record in caplog.records if record.levelname != "DEBUG"] == []


@pytest.mark.parametrize(
    ("listen", "host", "address"),
    [
        ("127.0.0.1:0", "127.0.0.1", "127.0.0.1:{port}"),
        ("localhost:0", "127.0.0.1", "127.0.0.1:{port}"),
        (":0", "127.0.0.1", None),
        ("[::1]:0", "::1", "[::1]:{port}"),
    ],
)
def test_places_to_listen(listen: str, host: str, address: str | None) -> None:
    with serving(listen=listen) as server:
        assert get(server, "/healthz", host=host)[0] == 200
        assert address is None or server.address == address.format(port=port_of(server))


def test_an_empty_listen_is_off() -> None:
    threads = set(threading.enumerate())
    with serving(listen="") as server:
        assert server.address is None
        assert set(threading.enumerate()) <= threads


@pytest.mark.parametrize(
    "listen", ["9877", "localhost", "::1:9877", "[::1]", "a:b", "a:99999", "http://a:1", "a b:1", ":٣"]
)
def test_a_malformed_listen_is_refused(listen: str) -> None:
    with pytest.raises(ConfigurationError, match="is no address") as refused:
        HealthServer(listen, lambda: FIGURES, lambda: True)
    assert listen in refused.value.what
    assert "HOST:PORT" in refused.value.remedy


def test_a_port_in_use_is_refused_with_the_remedy() -> None:
    with serving() as server, pytest.raises(ConfigurationError, match="is in use") as refused:
        HealthServer(server.address or "", lambda: FIGURES, lambda: True).start()
    assert "another port" in refused.value.remedy


@pytest.mark.parametrize("listen", ["192.0.2.1:9877", "no-such-host.invalid:9877"])
def test_an_address_of_another_machine_is_refused(listen: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot listen at") as refused:
        HealthServer(listen, lambda: FIGURES, lambda: True).start()
    assert listen in refused.value.what


def test_stop_gives_the_port_back_and_start_takes_it_again() -> None:
    """Also while a client is connected; a second stop does nothing."""
    with serving() as server:
        listen = server.address or ""
    again = HealthServer(listen, lambda: FIGURES, lambda: True)
    for _ in range(3):
        again.start()
        with connected(again) as idle:
            assert get(again, "/healthz")[0] == 200
            again.stop()
            assert received(idle) == b""
        again.stop()
        with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", int(listen[10:]))):
            pass


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@contextmanager
def service_manager(address: str) -> Iterator[socket.socket]:
    """The receiving end of sd_notify."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.setblocking(False)
        yield manager


def told(manager: socket.socket) -> list[str]:
    messages = list[str]()
    while True:
        try:
            messages.append(manager.recv(65536).decode())
        except BlockingIOError:
            return messages


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_systemd_is_told_every_state(tmp_path: Path, kind: str) -> None:
    path = str(tmp_path / "notify")
    name, address = ("@" + path, "\0" + path) if kind == "abstract" else (path, path)
    with service_manager(address) as manager:
        notifier = Notifier(name, None, monotonic=Clock())
        notifier.ready("watching 2 runs")
        notifier.status("peeling step 5\nREADY=0\x1b")
        notifier.reloading()
        notifier.stopping()
        notifier.watchdog()
        assert told(manager) == [
            "READY=1\nSTATUS=watching 2 runs",
            "STATUS=peeling step 5 READY=0\\x1b",
            "RELOADING=1\nMONOTONIC_USEC=1000000000",
            "STOPPING=1",
        ]
        assert notifier.interval is None


def test_the_watchdog_beats_every_half_of_its_time(tmp_path: Path) -> None:
    """Called at every turn of the loop, it sends no more than one beat in each interval."""
    clock = Clock()
    path = str(tmp_path / "notify")
    with service_manager(path) as manager:
        notifier = Notifier(path, "30000000", monotonic=clock)
        assert notifier.interval == 15.0
        beats = list[float]()
        for _ in range(60):
            notifier.watchdog()
            beats += [clock.now] * len(told(manager))
            clock.now += 1.0
    assert beats == [1000.0, 1015.0, 1030.0, 1045.0]


@pytest.mark.parametrize("microseconds", [None, "", "0", "-5", "soon", "1.5", "٣"])
def test_a_watchdog_time_that_is_none(tmp_path: Path, microseconds: str | None) -> None:
    path = str(tmp_path / "notify")
    with service_manager(path) as manager:
        notifier = Notifier(path, microseconds, monotonic=Clock())
        notifier.watchdog()
        assert (notifier.interval, told(manager)) == (None, [])


NOWHERE = {
    "none": None,
    "empty": "",
    "another kind": "vsock:2:1234",
    "gone": "/nonexistent/notify",
    "too long": "/" + "x" * 300,
    "no text": "/a\udcff\ud800",
    "nul": "/a\0b",
}


@pytest.mark.parametrize("name", NOWHERE.values(), ids=NOWHERE)
def test_a_service_manager_that_is_not_there_is_nothing(name: str | None) -> None:
    """Every method returns; a beat that was not sent is tried at the next turn."""
    notifier = Notifier(name, "1000000", monotonic=Clock())
    for call in (notifier.reloading, notifier.stopping, notifier.watchdog, notifier.watchdog):
        assert call() is None
    assert notifier.ready("x") is None
    assert notifier.status("x") is None


def test_a_beat_that_was_lost_is_sent_at_the_next_turn(tmp_path: Path) -> None:
    """The manager's socket appears only after the first turn."""
    path = str(tmp_path / "notify")
    notifier = Notifier(path, "1000000", monotonic=Clock())
    notifier.watchdog()
    with service_manager(path) as manager:
        notifier.watchdog()
        notifier.watchdog()
        assert told(manager) == ["WATCHDOG=1"]


def test_a_service_manager_that_does_not_read_holds_nobody_up(tmp_path: Path) -> None:
    """Its queue is full: the message is lost and the call returns; what it reads later is whole."""
    path = str(tmp_path / "notify")
    with service_manager(path) as manager:
        sent = 0
        while sent_at_once(path):
            sent += 1
        Notifier(path, None, monotonic=Clock()).status("lost")
        assert told(manager) == ["X=1"] * sent


def sent_at_once(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)
        try:
            sender.sendto(b"X=1", path)
        except BlockingIOError:
            return False
    return True
