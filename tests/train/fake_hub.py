"""A server on this machine that speaks as much of the hub's HTTP interface as publishing and loading need."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_writer"
_LARGE = (".safetensors", ".png")


@dataclass
class Repository:
    private: bool
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{}])
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def head(self) -> str:
        return f"{len(self.commits):040x}"

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        oid = self.tags.get(revision, revision)
        oid = self.head if oid == "main" else oid
        return oid, self.commits[int(oid, 16) - 1]


@dataclass
class Hub:
    """What is stored, and what goes wrong.

    Attributes:
        faults: status by the word in the path of the requests that fail with it.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)


@contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._route("GET")

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    def _route(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{method} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        for word, status in self.hub.faults.items():
            if word in path:
                return self._json({"error": "out of order"}, status)
        parts = path.strip("/").split("/")
        if parts[0] != "lfs-objects" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._json({"error": "Invalid credentials"}, 401)
        if parts[0] == "lfs-objects":
            assert hashlib.sha256(body).hexdigest() == parts[1]
            self.hub.objects[parts[1]] = body
            return self._json({})
        if path == "/":
            return self._json({})
        if path == "/api/whoami-v2":
            return self._json({"name": "writer", "type": "user", "orgs": [{"name": "org"}], "auth": {}})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        if parts[0] == "api":
            return self._api(parts, body)
        return self._file(parts, with_body=method == "GET")

    def _chunks(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline().strip(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'writer'}/{asked['name']}"
        if name in self.hub.repositories:
            return self._json({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.repositories[name] = Repository(private=bool(private))
        return self._json({"url": f"{self.hub.url}/{name}"})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {**item, "actions": {"upload": {"href": f"{self.hub.url}/lfs-objects/{item['oid']}"}}}
            for item in asked["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _api(self, parts: list[str], body: bytes) -> None:
        name = "/".join(parts[2:4])
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return
        what = parts[4] if len(parts) > 4 else "revision"
        oid, files = repository.at(parts[5] if len(parts) > 5 else "main")
        match what:
            case "preupload":
                asked = json.loads(body)["files"]
                modes = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(_LARGE) else "regular",
                        "shouldIgnore": False,
                    }
                    for file in asked
                ]
                self._json({"files": modes})
            case "commit":
                self._commit(repository, name, body)
            case "tag":
                repository.tags[json.loads(body)["tag"]] = oid
                self._json({})
            case "refs":
                tags = [
                    {"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": at} for tag, at in repository.tags.items()
                ]
                head = {"name": "main", "ref": "refs/heads/main", "targetCommit": repository.head}
                self._json({"branches": [head], "tags": tags, "converts": [], "pullRequests": []})
            case "tree":
                self._json([{"type": "file", "path": p, "size": len(c), "oid": "0" * 40} for p, c in files.items()])
            case _:
                siblings = [{"rfilename": path} for path in files]
                self._json({"id": name, "sha": oid, "private": repository.private, "siblings": siblings, "tags": []})

    def _commit(self, repository: Repository, name: str, body: bytes) -> None:
        files = dict(repository.commits[-1])
        for line in body.decode().splitlines():
            step = json.loads(line)
            value = step["value"]
            match step["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.objects[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        repository.commits.append(files)
        url = f"{self.hub.url}/{name}/commit/{repository.head}"
        self._json({"success": True, "commitOid": repository.head, "commitUrl": url, "hookOutput": ""})

    def _file(self, parts: list[str], *, with_body: bool) -> None:
        repository = self.hub.repositories.get("/".join(parts[:2]))
        if repository is None or parts[2] != "resolve":
            return self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        oid, files = repository.at(parts[3])
        content = files.get("/".join(parts[4:]))
        if content is None:
            return self._json(
                {"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid}
            )
        headers = {"X-Repo-Commit": oid, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        return self._send(content, 200, headers, with_body=with_body)

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        headers = {"Content-Type": "application/json", **(headers or {})}
        self._send(json.dumps(value).encode(), status, headers, with_body=self.command != "HEAD")

    def _send(self, content: bytes, status: int, headers: dict[str, str], *, with_body: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)
