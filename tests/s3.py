"""A real S3 server (moto) in a process of its own, and a gateway before it that counts requests and injects faults."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tests.servers import wait_until_it_answers

SECRET = "a-secret-that-nobody-may-print"


@contextlib.contextmanager
def s3_server(folder: Path, port: int) -> Iterator[str]:
    """`moto.server` on loopback, its log in `folder`; yields its URL once it answers. What it held goes with it."""
    log = folder / "moto.log"
    with log.open("ab") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "AWS_ACCESS_KEY_ID": "moto", "AWS_SECRET_ACCESS_KEY": "moto"},
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_it_answers(f"{url}/moto-api/", server, log)
        yield url
    finally:
        server.kill()
        server.wait(timeout=240)


class Gateway:
    """Passes requests on to a server. `gets` are the object keys that were read, one entry a request.

    `before(method, key)` is asked first: an (HTTP status, S3 error code) is answered instead of the server's answer.
    With `written`, all objects are said to have been written in that second, as whole seconds in UTC.
    """

    def __init__(self, upstream_port: int) -> None:
        self.gets: list[str] = []
        self.lists = 0
        self.before: Callable[[str, str], tuple[int, str] | None] = lambda method, key: None
        self.cut = False
        self.written: datetime | None = None
        gateway = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # or else a client waits 40 ms for the rest of an answer
            wbufsize = -1

            def _pass_on(self) -> None:
                gateway._pass_on(self, upstream_port)

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _pass_on

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self) -> Gateway:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def reset(self) -> None:
        """No faults, and nothing counted."""
        self.gets, self.lists, self.cut, self.written = [], 0, False, None
        self.before = lambda method, key: None

    def _pass_on(self, request: BaseHTTPRequestHandler, port: int) -> None:
        path, _, query = request.path.partition("?")
        key = unquote(path.lstrip("/").partition("/")[2])
        method = request.command
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        fault = self.before(method, key)
        if self.cut:
            request.close_connection = True
            return
        if fault is not None:
            status, code = fault
            text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected {code}</Message></Error>"
            _answer(request, status, {"Content-Type": "application/xml"}, text.encode())
            return
        if method == "GET" and "list-type" in query:
            self.lists += 1
        elif method == "GET":
            self.gets.append(key)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=240)
        try:
            connection.request(method, request.path, body=body, headers=dict(request.headers))
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        dropped = {"transfer-encoding", "connection", "content-length"} - (
            {"content-length"} if method == "HEAD" else set()
        )
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in dropped}
        if self.written is not None:
            headers = {
                name: format_datetime(self.written, usegmt=True) if name.lower() == "last-modified" else value
                for name, value in headers.items()
            }
            stamp = f"<LastModified>{self.written:%Y-%m-%dT%H:%M:%S}.000Z</LastModified>"
            content = re.sub(rb"<LastModified>[^<]*</LastModified>", stamp.encode(), content)
        _answer(request, answer.status, headers, content)


def _answer(request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes) -> None:
    with contextlib.suppress(OSError):  # the client gave up
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        if not any(name.lower() == "content-length" for name in headers):
            request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)
        request.wfile.flush()


class Bucket:
    """One bucket of a server, as the other side that writes into it (boto3)."""

    def __init__(self, url: str, name: str) -> None:
        import boto3
        from botocore.config import Config

        self.name = name
        # moto checks no signature; the agent's own client is given its credentials by the environment.
        self._client = boto3.client(
            "s3",
            endpoint_url=url,
            region_name="us-east-1",
            aws_access_key_id="writer",
            aws_secret_access_key="writer",
            config=Config(request_checksum_calculation="when_required"),
        )
        with contextlib.suppress(self._client.exceptions.BucketAlreadyOwnedByYou):
            self._client.create_bucket(Bucket=name)

    def put(self, key: str, content: bytes) -> None:
        self._client.put_object(Bucket=self.name, Key=key, Body=content)

    def upload(self, folder: Path, prefix: str) -> list[str]:
        """Every file of a folder, in the order of the names; returns the keys."""
        keys = []
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            keys.append(f"{prefix}/{file.relative_to(folder).as_posix()}")
            self.put(keys[-1], file.read_bytes())
        return keys

    def delete(self, prefix: str) -> None:
        for key in self.keys(prefix):
            self._client.delete_object(Bucket=self.name, Key=key)

    def keys(self, prefix: str = "") -> list[str]:
        answer = self._client.list_objects_v2(Bucket=self.name, Prefix=prefix)
        return [entry["Key"] for entry in answer.get("Contents", [])]

    def close(self) -> None:
        self._client.close()


def environment(url: str) -> dict[str, str]:
    """What the agent's process is given in order to reach a server."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "agent",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
