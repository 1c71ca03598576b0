"""A Hugging Face Hub on loopback: the HTTP that ``huggingface_hub`` speaks, over repositories kept in memory.

Answers as the real one does: models and trees by revision, HEAD and GET of files with ``ETag``, ``X-Repo-Commit`` and
``Range``, large files by redirect to another place, errors with their ``X-Error-Code``.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin")  # what a repository keeps with git-lfs
TOKEN = "hf_of_the_test"


@dataclass
class Repository:
    """``commits``: sha -> files; ``refs``: branch, tag or pull request -> sha."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]


class Hub:
    """The state of the server. ``requests``: every one so far. ``broken``: a large file that breaks off half-way.

    ``stalls``: large files stop half-way, and the connection stays.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.broken: str | None = None
        self.stalled = threading.Event()  # set: a large file has come half-way and no further
        self.stalls = False
        self.status = 200  # of every answer, when it is another one
        self.endpoint = self.storage = ""  # large files lie on another host: the client follows no further

    def push(self, name: str, folder: Path, *refs: str, **flags: bool) -> str:
        """A commit with the files of ``folder``; ``refs`` (``main`` without any) point at it from now on."""
        files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        repository = self.repositories.setdefault(name, Repository(**flags))
        listed = [(path, hashlib.sha1(body).hexdigest()) for path, body in files.items()]
        sha = hashlib.sha1(f"{name} {len(repository.commits)} {listed}".encode()).hexdigest()
        repository.commits[sha] = files
        repository.refs |= dict.fromkeys(refs or ("main",), sha)
        return sha

    def fetched(self) -> list[str]:
        """Names of the files whose bytes were asked for."""
        return [r.path.split("/")[-1] for r in self.requests if r.method == "GET" and "/api/" not in r.path]

    def answer(self, request: Request) -> tuple[int, dict[str, str], bytes]:
        path = unquote(urlsplit(request.path).path)
        if self.status != 200:
            return self.status, {}, b""
        if match := re.fullmatch(r"/lfs/([0-9a-f]{64})/[^/]+", path):
            return 200, {"ETag": f'"{match[1]}"'}, self._large()[match[1]]
        if match := re.fullmatch(
            r"/api/models/([^/]+/[^/]+?)(?:/revision/(.+))?", path.partition("/tree/")[0]
        ):
            revision = path.partition("/tree/")[2] or match[2]
            return self._api(match[1], revision or "main", request, tree="/tree/" in path)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(.+)", path):
            return self._file(match[1], match[2], request)
        return 404, {}, b""

    def _api(
        self, name: str, revision: str, request: Request, tree: bool
    ) -> tuple[int, dict[str, str], bytes]:
        found = self._found(name, revision, request)
        if isinstance(found, str):
            return _refusal(found)
        sha, files = found
        if not tree:
            siblings = [{"rfilename": path} for path in files]
            about = {
                "_id": "0",
                "id": name,
                "modelId": name,
                "sha": sha,
                "private": False,
                "siblings": siblings,
            }
            return 200, {"Content-Type": "application/json"}, json.dumps(about).encode()
        return (
            200,
            {"Content-Type": "application/json"},
            json.dumps([_entry(*i) for i in files.items()]).encode(),
        )

    def _file(self, name: str, rest: str, request: Request) -> tuple[int, dict[str, str], bytes]:
        repository = self.repositories.get(name)
        known = [*repository.refs, *repository.commits] if repository else []
        revision = next((r for r in known if rest.startswith(r + "/")), rest.partition("/")[0])
        found = self._found(name, revision, request)
        if isinstance(found, str):
            return _refusal(found)
        if repository and repository.gated and request.headers.get("authorization") != f"Bearer {TOKEN}":
            return 401, {"X-Error-Code": "GatedRepo"}, b""
        sha, files = found
        path = rest.removeprefix(revision + "/")
        if path not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha}, b""
        body = files[path]
        if path.endswith(LARGE):
            digest = hashlib.sha256(body).hexdigest()
            linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(body)), "X-Repo-Commit": sha}
            return 302, {**linked, "Location": f"{self.storage}/lfs/{digest}/{path}"}, b""
        return 200, {"ETag": f'"{_git_digest(body)}"', "X-Repo-Commit": sha}, body

    def _found(self, name: str, revision: str, request: Request) -> tuple[str, dict[str, bytes]] | str:
        repository = self.repositories.get(name)
        allowed = request.headers.get("authorization") == f"Bearer {TOKEN}"
        if repository is None or (repository.private and not allowed):
            return "RepoNotFound"
        short = [sha for sha in repository.commits if len(revision) >= 7 and sha.startswith(revision)]
        sha = repository.refs.get(revision) or (short[0] if len(short) == 1 else None)
        return (sha, repository.commits[sha]) if sha else "RevisionNotFound"

    def _large(self) -> dict[str, bytes]:
        bodies = [
            b for r in self.repositories.values() for files in r.commits.values() for b in files.values()
        ]
        return {hashlib.sha256(body).hexdigest(): body for body in bodies}


def _refusal(code: str) -> tuple[int, dict[str, str], bytes]:
    return 404, {"X-Error-Code": code}, b"{}"


def _git_digest(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def _entry(path: str, body: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(body), "oid": _git_digest(body)}
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
    return entry


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._respond(with_body=False)

    def do_GET(self) -> None:
        self._respond(with_body=True)

    def _respond(self, with_body: bool) -> None:
        request = Request(
            self.command, self.path, {key.lower(): value for key, value in self.headers.items()}
        )
        self.hub.requests.append(request)
        status, headers, body = self.hub.answer(request)
        if status == 200 and (match := re.fullmatch(r"bytes=(\d+)-", request.headers.get("range", ""))):
            start = int(match[1])
            status, headers["Content-Range"] = 206, f"bytes {start}-{len(body) - 1}/{len(body)}"
            body = body[start:]
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if not with_body:
            return
        if "/lfs/" in self.path and self.hub.stalls:
            self.wfile.write(body[: len(body) // 2])
            self.hub.stalled.set()
            self.rfile.read(1)  # until the client has gone
            return
        breaks = "/lfs/" in self.path and self.path.endswith(f"/{self.hub.broken}")
        self.wfile.write(body[: len(body) // 2] if breaks else body)
        self.close_connection |= breaks


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint, hub.storage = (f"http://{name}:{server.server_port}" for name in ("127.0.0.1", "localhost"))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
