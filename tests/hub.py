"""A model hub on this machine: the part of the Hub's HTTP interface that uploads and downloads need, over real sockets.

It answers as https://huggingface.co does to `huggingface_hub` without Xet: repositories are made and looked at, a
card's metadata is checked, files are told to go into the commit or to the large-file store (Git LFS,
https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md), and a commit of JSON lines puts them in place. Who may
read is told by status and `X-Error-Code`; a repository that is not gated is read without a token. A dataset's name
begins with `datasets/`.
"""

import base64
import hashlib
import io
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

COMMIT = "5" * 40
"""The commit of everything that is read."""
LARGE = (".safetensors", ".png")


@dataclass
class Repository:
    """A repository: what it holds, and every commit's summary. A `gated` one is listed to all and gives its files to
    nobody."""

    private: bool
    gated: bool = False
    files: dict[str, bytes | Path] = field(default_factory=lambda: {".gitattributes": b"*.safetensors filter=lfs\n"})
    """Contents, or where they lie on the disk."""
    ignored: tuple[str, ...] = ()
    """Beginnings of paths that its .gitignore leaves out."""
    commits: list[str] = field(default_factory=list)

    def tree(self) -> list[dict[str, Any]]:
        """Its files as the Hub lists them."""
        return [
            {"type": "file", "path": name, "size": size_of(content), "oid": name_of(content)}
            for name, content in self.files.items()
        ]


def size_of(content: bytes | Path) -> int:
    """The bytes of a file."""
    return content.stat().st_size if isinstance(content, Path) else len(content)


def name_of(content: bytes | Path) -> str:
    """What tells a file's content from another's; a file on the disk keeps its content."""
    known = f"{content} {size_of(content)}".encode() if isinstance(content, Path) else content
    return hashlib.sha1(known).hexdigest()


class Hub(ThreadingHTTPServer):
    """The hub, with one user's `token`. `trouble` is what becomes of a request whose path ends so: "die" cuts the
    connection, "hang" answers nothing until `released`, a number is an answer of that status."""

    daemon_threads = True

    def __init__(self, token: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token = token
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.stored: list[str] = []  # digests of large files, as they were sent
        self.trouble: dict[str, str | int] = {}
        self.released = threading.Event()
        self.requests: list[str] = []
        self.cut: int | None = None
        """Cuts the connection after so many bytes of a file that is longer."""
        self.cut_for_good = False
        """Whether a cut is the end of this hub: it answers nobody after it."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def hub(token: str) -> Iterator[Hub]:
    """A hub that runs while it is needed."""
    server = Hub(token)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *arguments: object) -> None:
        """Nobody reads it."""

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        path = urlsplit(self.path).path
        body = self._body()
        self.server.requests.append(f"{self.command} {path}")
        trouble = next((what for end, what in self.server.trouble.items() if path.endswith(end)), None)
        if trouble == "hang":
            self.server.released.wait(30)
        if trouble in ("die", "hang"):
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif isinstance(trouble, int):
            self._answer(trouble, {"error": "The hub is not well"})
        elif path.startswith("/store/"):
            self._store(path.removeprefix("/store/"), body)
        elif self._reads(path):
            pass
        elif (given := self.headers.get("Authorization")) != f"Bearer {self.server.token}":
            self._answer(401, {"error": f"Invalid credentials in Authorization header: {given}"})
        else:
            self._route(path, body)

    def _reads(self, path: str) -> bool:
        """Answers a request that only reads a public repository; whether it was one."""
        found = re.fullmatch(
            r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|auth-check)(?:/([^/]+)(?:/(.+))?)?)?", path
        )
        file = re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if self.command not in ("GET", "HEAD") or not (found or file):
            return False
        if file:
            name, what, revision = file[1], "file", file[2]
        else:
            assert found is not None
            name, what, revision = ("datasets/" * (found[1] == "datasets")) + found[2], found[3], found[4]
        repository = self.server.repositories.get(name)
        if repository is None or repository.private:
            if repository is not None and self.headers.get("Authorization"):
                return False
            self._refuse(401, "RepoNotFound", "Invalid username or password.")
        elif revision not in (None, "main") and not re.fullmatch("[0-9a-f]{40}", revision):
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif repository.gated and what in ("file", "auth-check"):
            self._refuse(403, "GatedRepo", f"Access to model {name} is restricted.")
        elif what == "tree":
            assert found is not None
            folder = "" if found[5] is None else f"{found[5]}/"
            entries = [entry for entry in repository.tree() if entry["path"].startswith(folder)]
            if entries:
                self._answer(200, entries)
            else:
                self._refuse(404, "EntryNotFound", f"{found[5]} does not exist")
        elif file:
            self._send_file(repository, file[3])
        else:
            siblings = [{"rfilename": path} for path in repository.files]
            self._answer(200, {"id": name.removeprefix("datasets/"), "sha": COMMIT, "siblings": siblings})
        return True

    def _refuse(self, status: int, code: str, message: str) -> None:
        data = json.dumps({"error": message}).encode()
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _send_file(self, repository: Repository, path: str) -> None:
        """A file of a repository, or the part of it that is asked for; `server.cut` bytes of it and then silence."""
        content = repository.files.get(path)
        if content is None:
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        size = size_of(content)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first = int(asked[1]) if asked else 0
        end = int(asked[2]) + 1 if asked and asked[2] else size
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{name_of(content)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{end - 1}/{size}")
        self.send_header("Content-Length", str(end - first))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.server.cut is not None and size > self.server.cut
        if cut:
            end = min(end, first + (self.server.cut or 0))
        with content.open("rb") if isinstance(content, Path) else io.BytesIO(content) as file:
            file.seek(first)
            while first < end:
                first += self.wfile.write(file.read(min(end - first, 1 << 22)))
        if cut:
            if self.server.cut_for_good:
                self.server.trouble[""] = "die"
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _answer(self, status: int, document: Any) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _store(self, digest: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != digest:
            self._answer(400, {"error": "the bytes are not those of the digest"})
            return
        self.server.objects[digest] = body
        self.server.stored.append(digest)
        self._answer(200, {})

    def _route(self, path: str, body: bytes) -> None:
        if path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            is_card = json.loads(body)["content"].startswith("---\n")
            self._answer(200 if is_card else 400, {"errors": [] if is_card else [{"message": "no metadata"}]})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._answer(
                200, {"transfer": "basic", "objects": [self._object(one) for one in json.loads(body)["objects"]]}
            )
        elif path.startswith("/api/models/"):
            owner, name, *what = path.removeprefix("/api/models/").split("/")
            repository = self.server.repositories.get(f"{owner}/{name}")
            if repository is None:
                self._answer(404, {"error": "Repository not found"})
            else:
                self._model(f"{owner}/{name}", repository, what, body)
        else:
            self._answer(404, {"error": "no such page"})

    def _create(self, wanted: dict[str, Any]) -> None:
        repo = f"{wanted['organization']}/{wanted['name']}"
        known = repo in self.server.repositories
        self.server.repositories.setdefault(repo, Repository(private=wanted["visibility"] == "private"))
        document = {"url": f"{self.server.url}/{repo}"}
        self._answer(
            409 if known else 200, {**document, "error": "You already created this model repo"} if known else document
        )

    def _object(self, wanted: dict[str, Any]) -> dict[str, Any]:
        found = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] in self.server.objects:
            return found
        return {**found, "actions": {"upload": {"href": f"{self.server.url}/store/{wanted['oid']}"}}}

    def _model(self, repo: str, repository: Repository, what: list[str], body: bytes) -> None:
        match what:
            case []:
                self._answer(200, {"id": repo, "private": repository.private, "sha": "0" * 40, "siblings": []})
            case ["preupload", "main"]:
                self._answer(200, {"files": [self._mode(repository, one) for one in json.loads(body)["files"]]})
            case ["commit", "main"]:
                self._commit(repo, repository, body)
            case ["tree", _]:
                self._answer(200, repository.tree())
            case _:
                self._answer(404, {"error": "no such page"})

    def _mode(self, repository: Repository, wanted: dict[str, Any]) -> dict[str, Any]:
        path = wanted["path"]
        mode = "lfs" if path.endswith(LARGE) else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": path.startswith(repository.ignored or ("\0",))}

    def _commit(self, repo: str, repository: Repository, body: bytes) -> None:
        header, *lines = [json.loads(line) for line in body.splitlines()]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            else:
                repository.files[value["path"]] = self.server.objects[value["oid"]]
        repository.commits.append(header["value"]["summary"])
        oid = f"{len(repository.commits):040x}"
        self._answer(200, {"commitUrl": f"{self.server.url}/{repo}/commit/{oid}", "commitOid": oid})
