"""Where adapters are kept elsewhere, for tests: an S3 server, a stand-in of a hub, and a web server that can lie."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

BUCKET = "adapters"
KEYS = {
    "AWS_ACCESS_KEY_ID": "test-key",
    "AWS_SECRET_ACCESS_KEY": "a-secret-of-the-test",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@dataclass(frozen=True)
class S3Server:
    """moto's server with one bucket."""

    url: str

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables with which s3fs finds it."""
        return {**KEYS, "AWS_ENDPOINT_URL": self.url, "AWS_EC2_METADATA_DISABLED": "true"}

    @cached_property
    def client(self) -> Any:
        """Amazon's own client of it."""
        import boto3

        keys = {name.lower(): value for name, value in KEYS.items() if name != "AWS_DEFAULT_REGION"}
        return boto3.client("s3", endpoint_url=self.url, region_name=KEYS["AWS_DEFAULT_REGION"], **keys)

    def put(self, key: str, content: bytes) -> None:
        """Store an object."""
        self.client.put_object(Bucket=BUCKET, Key=key, Body=content)

    def upload(self, folder: Path, key: str) -> str:
        """Store the files of an adapter, and return its URL."""
        for file in folder.iterdir():
            self.put(f"{key}/{file.name}", file.read_bytes())
        return f"s3://{BUCKET}/{key}"


@contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """Start moto's server, and end it afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = S3Server(f"http://127.0.0.1:{port}")
    with (folder / "s3.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=log,
            stderr=log,
            env={**os.environ, "MOTO_S3_CUSTOM_ENDPOINTS": server.url},
        )
        try:
            _wait(server.url, process)
            server.client.create_bucket(Bucket=BUCKET)
            yield server
            server.client.close()
        finally:
            process.terminate()
            process.wait(20)


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    ends = time.monotonic() + 300
    while time.monotonic() < ends and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    raise AssertionError(f"nothing answers at {url}")


@dataclass
class WebServer:
    """A web server in a thread.

    Args:
        files: contents by path.
        answer: takes a request instead, if it returns True.
        asked: methods and paths of requests, in order.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    answer: Callable[[BaseHTTPRequestHandler], bool] = lambda request: False
    asked: list[str] = field(default_factory=list)

    def upload(self, folder: Path, path: str) -> str:
        """Offer the files of an adapter, and return its URL."""
        self.files |= {f"/{path}/{file.name}": file.read_bytes() for file in folder.iterdir()}
        return f"{self.url}/{path}"

    def fetched(self, name: str) -> int:
        """How often a file of this name was read."""
        return sum(line.startswith("GET") and line.endswith(name) for line in self.asked)


@contextmanager
def web_server() -> Iterator[WebServer]:
    """Start a web server on 127.0.0.1, and end it afterwards."""
    site = WebServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            site.asked.append(f"{self.command} {self.path}")
            if site.answer(self):
                return
            path = unquote(urlsplit(self.path).path)
            if path not in site.files:
                send(self, 404, b"no")
            else:
                content = site.files[path]
                send(self, 200, content, ETag=f'"{hashlib.md5(content).hexdigest()}"')

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def send(request: BaseHTTPRequestHandler, status: int, content: bytes, **headers: str) -> None:
    """Answer a request."""
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name.replace("_", "-"), value)
    request.send_header("Content-Length", str(len(content)))
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(content)


@dataclass
class Hub:
    """What huggingface_hub asks of a hub, answered from memory.

    Args:
        site: the server.
        commits: by id and commit, the files.
        refs: by id, the commits of branches and tags.
        token: what must be given; empty: nothing.
    """

    site: WebServer
    commits: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, dict[str, str]] = field(default_factory=dict)
    token: str = ""

    def push(self, name: str, folder: Path, *tags: str) -> str:
        """A new commit on main, and on tags; returns it."""
        files = {file.name: file.read_bytes() for file in folder.iterdir()}
        commit = hashlib.sha1(b"".join(files.values())).hexdigest()
        self.commits[name, commit] = files
        self.refs.setdefault(name, {}).update({"main": commit, **dict.fromkeys(tags, commit)})
        return commit

    def answer(self, request: BaseHTTPRequestHandler) -> bool:
        """The API of models and their files."""
        path = unquote(urlsplit(request.path).path)
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            send(request, 401, b"", X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        elif found := re.fullmatch(
            r"/api/models/([^/]+/[^/]+)(?:/revision/(.+)|/(?:tree|paths-info)/([^/]+).*)?", path
        ):
            self._api(request, found[1], found[2] or found[3] or "main", listed="/tree/" in path)
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(request, *found.groups())
        else:
            send(request, 404, b"")
        return True

    def _files(self, request: BaseHTTPRequestHandler, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if name not in self.refs:
            send(request, 404, b"", X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            return None
        commit = self.refs[name].get(revision, revision)
        if (name, commit) not in self.commits:
            send(request, 404, b"", X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
            return None
        return commit, self.commits[name, commit]

    def _api(self, request: BaseHTTPRequestHandler, name: str, revision: str, *, listed: bool) -> None:
        if (found := self._files(request, name, revision)) is None:
            return
        commit, files = found
        entries = [_entry(path, content) for path, content in files.items()]
        siblings = [{**entry, "rfilename": entry["path"], "blobId": entry["oid"]} for entry in entries]
        answer = entries if listed else {"id": name, "modelId": name, "sha": commit, "siblings": siblings}
        send(request, 200, json.dumps(answer).encode(), Content_Type="application/json")

    def _file(self, request: BaseHTTPRequestHandler, name: str, revision: str, path: str) -> None:
        if (found := self._files(request, name, revision)) is None:
            return
        commit, files = found
        if path not in files:
            send(request, 404, b"", X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
            return
        send(request, 200, files[path], X_Repo_Commit=commit, ETag=f'"{_entry(path, files[path])["oid"]}"')


def _entry(path: str, content: bytes) -> Mapping[str, object]:
    blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    entry: dict[str, object] = {"type": "file", "path": path, "size": len(content), "oid": blob}
    if path.endswith(".safetensors"):
        sha256 = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"sha256": sha256, "oid": sha256, "size": len(content), "pointerSize": 130}
    return entry


@contextmanager
def hub(cache: Path) -> Iterator[Hub]:
    """Start a stand-in of a hub, which huggingface_hub asks with this folder for its own cache; end it afterwards."""
    with web_server() as site, pytest.MonkeyPatch.context() as patch:
        made = Hub(site)
        site.answer = made.answer
        constants = {
            "ENDPOINT": site.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": f"{site.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(cache),
        }
        for name, value in constants.items():
            patch.setattr(f"huggingface_hub.constants.{name}", value)
        yield made
