"""The dashboard that is shipped is the one that its code makes, and asks for what an agent really serves."""

from __future__ import annotations

import json
import re
import shutil
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from peel_agent.health.metrics import registry_of
from tests import dashboard
from tests.rooms.test_health import FIGURES
from tests.rooms.test_watch_scan import write_checkpoint
from tests.runs.deployment import MANIFESTS, run
from tests.runs.sidecar import Sidecar
from tests.servers import free_port
from tests.waiting import wait_for

BOARD: dict[str, Any] = json.loads(dashboard.FILE.read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
FROM_PROMETHEUS = {"up"}
"""Made by Prometheus itself for what it scrapes."""

needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="apt-get install prometheus")


def expressions() -> list[str]:
    """Every query, as Grafana sends it for all runs."""
    queries = [target["expr"] for panel in PANELS for target in panel["targets"]]
    return [query.replace("$__rate_interval", "2m").replace("$run", ".*") for query in queries]


def metrics(expression: str) -> set[str]:
    """The metrics that a query reads."""
    bare = re.sub(r'\{[^}]*\}|\[[^\]]*\]|by \([^)]*\)|"[^"]*"', "", expression)
    words = set(re.findall(r"[a-zA-Z_]\w*", bare))
    return words - {"sum", "max", "count", "increase", "rate", "time", "vector", "or"}


def test_the_dashboard_is_what_its_code_makes() -> None:
    """`python -m tests.dashboard` changes nothing."""
    assert dashboard.FILE.read_text() == dashboard.made()


def test_no_panel_hides_another() -> None:
    """Each panel has a title, words, a query, a number of its own and a place of its own within 24 columns."""
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    for panel in PANELS:
        assert panel["title"]
        assert panel["description"]
        assert panel["targets"]
        assert panel["datasource"]["uid"] == "${datasource}"


@needs_promtool
def test_prometheus_parses_every_query(tmp_path: Path) -> None:
    """promtool reads each as the expression of a rule; a broken one it refuses."""
    queries = expressions()
    for asked, status in ((queries, 0), ([*queries, "sum(up"], 1)):
        rules = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(asked)]
        (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
        checked = run("promtool", "check", "rules", tmp_path / "rules.yml")
        assert checked.returncode == status, checked.stdout + checked.stderr


def test_a_real_agent_serves_what_is_asked_for(tmp_path: Path) -> None:
    """After one checkpoint each metric of a query is at /metrics, the variable finds its run, every metric of a run is
    shown, and the paths that Kubernetes asks are answered with 200.
    """
    port = free_port()
    sidecar = Sidecar(tmp_path, '[tracker]\nuse = ["jsonl"]\n', PEEL__HEALTH__LISTEN=f"127.0.0.1:{port}")
    write_checkpoint(sidecar.root / "checkpoint-10", 10)
    texts = [(MANIFESTS / name).read_text() for name in ("base/deployment.yaml", "overlays/sidecar/job.yaml")]
    paths = {path for text in texts for path in re.findall(r"path: (/[a-z]+)$", text, flags=re.MULTILINE)}
    with sidecar.running():
        wait_for(lambda: sidecar.steps() == [10] and not sidecar.owed())
        answers = {path: answer(port, path) for path in (*paths, "/metrics")}
    assert {path: status for path, (status, _) in answers.items()} == dict.fromkeys(
        ("/healthz", "/readyz", "/metrics"), 200
    )
    page = answers["/metrics"][1]
    served = set(re.findall(r"^([a-z_]+)(?:\{.*\})? \S+$", page, flags=re.MULTILINE))
    asked = set().union(*map(metrics, expressions()))
    assert asked - FROM_PROMETHEUS - SOMETIMES <= served
    assert {metric.name for metric in registry_of(lambda: FIGURES).collect()} >= SOMETIMES
    of_runs = {name for name in served if re.search(rf'^{name}\{{[^}}]*run="checkpoints"', page, flags=re.MULTILINE)}
    assert of_runs <= asked
    (variable,) = [one for one in BOARD["templating"]["list"] if one["name"] == "run"]
    assert variable["query"] == "label_values(peel_checkpoints_waiting, run)"
    assert "peel_checkpoints_waiting" in of_runs


SOMETIMES = {"peel_child_memory_bytes", "peel_alerts_firing"}
"""Served while a checkpoint is peeled, and while an alert fires."""


def answer(port: int, path: str) -> tuple[int, str]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as page:
        return page.status, page.read().decode()
