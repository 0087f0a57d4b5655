"""A stand-in for W&B's server: it answers what `wandb sync` asks, and keeps rows, summary and files as W&B does."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import json
import re
import threading
from collections.abc import Iterator
from typing import Any


class WandbServer:
    """One run; `rows` by their place in its history."""

    def __init__(self) -> None:
        self.uri = ""
        self.rows: dict[int, dict[str, Any]] = {}
        self.summary: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}
        self.projects: set[str] = set()

    def stream(self, sent: dict[str, Any]) -> None:
        """A request of the file stream; W&B drops a row whose own step goes back."""
        files = sent.get("files", {})
        history = files.get("wandb-history.jsonl", {"offset": 0, "content": []})
        for place, line in enumerate(history["content"], history["offset"]):
            row = json.loads(line)
            if row["_step"] > max((kept["_step"] for kept in self.rows.values()), default=-1):
                self.rows[place] = row
        if "wandb-summary.json" in files:
            self.summary = json.loads(files["wandb-summary.json"]["content"][-1])

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The data of a GraphQL answer."""
        named = re.search(r"(?:query|mutation)\s+(\w+)", query)
        entity = {"id": "e", "name": "me"}
        bucket = {"id": "UnVuOjE=", "name": "run", "displayName": "run", "sweepName": None}
        bucket |= {"project": {"id": "p", "name": "peel-agent", "entity": entity}, "historyLineCount": len(self.rows)}
        last = self.rows.get(max(self.rows, default=0), {})
        match named[1] if named else "":
            case "Viewer":
                viewer = {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
                return {"viewer": viewer}
            case "UpsertBucket":
                self.projects.add(variables["project"])
                return {"upsertBucket": {"bucket": bucket, "inserted": not self.rows}}
            case "RunResumeStatus":
                counts = {"eventsLineCount": 0, "logLineCount": 0, "eventsTail": "[]", "tags": []}
                tails = {"historyTail": json.dumps([json.dumps(last)]), "summaryMetrics": json.dumps(self.summary)}
                known = {**bucket, **counts, **tails, "config": "{}", "wandbConfig": '{"t": 1}'}
                model = {"id": "p", "name": "peel-agent", "entity": entity, "bucket": known if self.rows else None}
                return {"model": model}
            case "CreateRunFiles":
                files = [{"name": name, "uploadUrl": f"{self.uri}/up/{name}"} for name in variables["files"]]
                return {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": files}}
        return {"__type": None, "serverInfo": {"features": [], "cliVersionInfo": {"max_cli_version": "99.0.0"}}}


@contextlib.contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """One on loopback, for the time of the block."""
    wandb = WandbServer()

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def body(self) -> bytes:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

        def send(self, form: object) -> None:
            text = json.dumps(form).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_GET(self) -> None:
            self.send({})

        def do_PUT(self) -> None:
            wandb.files[self.path.removeprefix("/up/")] = self.body()
            self.send({})

        def do_POST(self) -> None:
            sent = json.loads(self.body())
            if "file_stream" in self.path:
                wandb.stream(sent)
                self.send({"exitcode": None, "limits": {}})
            else:
                self.send({"data": wandb.answer(sent["query"], sent.get("variables") or {})})

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    wandb.uri = f"http://127.0.0.1:{server.server_port}"
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    try:
        yield wandb
    finally:
        server.shutdown()
        serving.join()
        server.server_close()
