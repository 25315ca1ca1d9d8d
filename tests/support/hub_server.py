"""A hub on loopback: speaks the parts of the Hugging Face protocol that fetching models needs, and fails on request.

Metadata by HEAD on /resolve/, redirects to a second host name that holds the contents, ranges, entity tags that are
the SHA-256 of large files, the model and search API, gated and private repositories. Faults are set per file.
Source of paths and headers: huggingface_hub's own client (file_download.py, hf_api.py, utils/_http.py).
"""

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, quote, unquote, urlsplit

_PIECE = 64 * 1024


@dataclass
class Fault:
    """What goes wrong with a file's content, `times` times (None: always).

    Attributes:
        cut_after: the connection breaks after so many bytes of an answer.
        wrong_at: the byte at this offset of the file is another one.
        status: the answer is this status instead.
        retry_after: with `status`: what Retry-After says.
        bytes_per_second: each connection is this slow.
        size: with a file's metadata: that it has so many bytes.
        no_ranges: the whole file is sent, whatever was asked for.
        times: answers that it spoils.
    """

    cut_after: int | None = None
    wrong_at: int | None = None
    status: int = 0
    retry_after: str = ""
    bytes_per_second: int = 0
    size: int | None = None
    no_ranges: bool = False
    times: int | None = None


@dataclass
class HubFile:
    """One file of a repository; large ones (`lfs`) are named by their SHA-256 and come from the second host."""

    data: bytes
    lfs: bool = True

    @property
    def sha256(self) -> str:
        """Digest of the content."""
        return hashlib.sha256(self.data).hexdigest()

    @property
    def etag(self) -> str:
        """What the hub names the content by."""
        blob = b"blob %d\0" % len(self.data) + self.data
        return self.sha256 if self.lfs else hashlib.sha1(blob).hexdigest()


@dataclass
class Repository:
    """Files by path. `gated`: a token is needed, and given it, whether terms were accepted does not matter."""

    files: dict[str, HubFile] = field(default_factory=dict[str, HubFile])
    gated: bool = False
    downloads: int = 0
    licence: str = "apache-2.0"

    @property
    def commit(self) -> str:
        """Changes with the content."""
        names = json.dumps({path: file.etag for path, file in sorted(self.files.items())})
        return hashlib.sha1(names.encode()).hexdigest()


@dataclass
class Asked:
    """One request, as the server saw it; `sent` bytes of content went out, or are about to.

    What a client has received is always counted: the client may be done before the server's thread goes on.
    """

    method: str
    path: str
    host: str
    range: str
    authorised: bool
    status: int
    sent: int = 0


class HubServer:
    """Use as a context manager; `endpoint` is what HF_ENDPOINT is to be."""

    def __init__(self, token: str = "hf_secret") -> None:
        self.token = token
        self.repositories: dict[str, Repository] = {}
        self.faults: dict[str, Fault] = {}
        self.asked: list[Asked] = []
        self.instead: bytes | None = None
        """Answered to everything, with 200, as a captive portal or a broken mirror does."""
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        port = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{port}"
        self.content_host = f"localhost:{port}"

    def add(self, repository: str, path: str, data: bytes, *, lfs: bool = True) -> HubFile:
        """Put a file into a repository, which is made if there is none."""
        file = HubFile(data, lfs)
        self.repositories.setdefault(repository, Repository()).files[path] = file
        return file

    def content_bytes(self) -> int:
        """Bytes of large files sent so far."""
        with self._lock:
            return sum(asked.sent for asked in self.asked if asked.path.startswith("/content/"))

    def note(self, asked: Asked) -> None:
        """Write a request down."""
        with self._lock:
            self.asked.append(asked)

    def sending(self, asked: Asked, count: int) -> None:
        """Count bytes that are about to be sent."""
        with self._lock:
            asked.sent += count

    def fault(self, path: str) -> Fault:
        """The fault that spoils this answer; one that spoils nothing where there is none."""
        with self._lock:
            fault = self.faults.get(path)
            if fault is None or fault.times == 0:
                return Fault()
            if fault.times is not None:
                fault.times -= 1
            return fault

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], hub: HubServer) -> None:
        self.hub = hub
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is what some tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class calls it so
        """Tests read `asked` instead."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        instead = self.server.hub.instead
        if instead is not None:
            kind = "application/json" if instead[:1] in {b"[", b"{"} else "text/html"
            asked = self._begin(200, len(instead), {"Content-Type": kind})
            self._send(asked, instead, Fault())
        elif path == "/api/models":
            self._search(parse_qs(parts.query))
        elif path.startswith("/api/models/"):
            self._model(path)
        elif path.startswith("/content/"):
            self._content(path)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+|refs/pr/\d+)/(.+)", path):
            self._resolve(*match.groups())
        else:
            self._refuse(404, "EntryNotFound")

    @property
    def _authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.server.hub.token}"

    def _search(self, query: dict[str, list[str]]) -> None:
        words = " ".join(query.get("search", [])).lower().split()
        found: list[dict[str, Any]] = [
            {"id": name, "modelId": name, "downloads": repository.downloads, "likes": 0, "tags": ["gguf"]}
            for name, repository in self.server.hub.repositories.items()
            if all(word in name.lower() for word in words)
        ]
        found.sort(key=lambda item: -item["downloads"])
        self._json(found[: int(query.get("limit", ["100"])[0])])

    def _model(self, path: str) -> None:
        name, _, revision = path.removeprefix("/api/models/").partition("/revision/")
        repository = self._repository(name, revision or "main")
        if repository is None:
            return
        siblings = [
            {
                "rfilename": path,
                "size": len(file.data),
                "blobId": file.etag[:40],
                **({"lfs": {"sha256": file.sha256, "size": len(file.data), "pointerSize": 130}} if file.lfs else {}),
            }
            for path, file in repository.files.items()
        ]
        card = {"license": repository.licence}
        gated = "manual" if repository.gated else False
        self._json(
            {"id": name, "sha": repository.commit, "gated": gated, "siblings": siblings, "cardData": card, "tags": []}
        )

    def _resolve(self, name: str, revision: str, path: str) -> None:
        hub = self.server.hub
        repository = self._repository(name, revision)
        if repository is None:
            return
        if repository.gated and not self._authorised:
            self._refuse(401, "GatedRepo")
            return
        fault = hub.fault(f"{name}/{path}#metadata")
        if fault.status:
            self._refuse(fault.status, "", {"Retry-After": fault.retry_after} if fault.retry_after else {})
            return
        file = repository.files.get(path)
        if file is None:
            self._refuse(404, "EntryNotFound", {"X-Repo-Commit": repository.commit})
            return
        headers = {
            "X-Repo-Commit": repository.commit,
            "X-Linked-Size": str(len(file.data) if fault.size is None else fault.size),
            "X-Linked-Etag": f'"{file.etag}"',
            "ETag": f'"{file.etag}"',
        }
        if file.lfs:
            headers["Location"] = f"http://{hub.content_host}/content/{quote(name)}/{quote(path)}?signature=x"
            self._begin(302, 0, headers)
        else:
            asked = self._begin(200, len(file.data), headers)
            self._send(asked, file.data, Fault())

    def _content(self, path: str) -> None:
        hub = self.server.hub
        owner, name, inside = path.removeprefix("/content/").split("/", 2)
        file = hub.repositories[f"{owner}/{name}"].files[inside]
        fault = hub.fault(f"{owner}/{name}/{inside}")
        if fault.status:
            self._refuse(fault.status, "", {"Retry-After": fault.retry_after} if fault.retry_after else {})
            return
        data = file.data
        if fault.wrong_at is not None:
            data = data[: fault.wrong_at] + bytes([data[fault.wrong_at] ^ 0xFF]) + data[fault.wrong_at + 1 :]
        headers = {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        status = 200
        if asked and not fault.no_ranges:
            begin = int(asked[1])
            end = min(int(asked[2]) + 1 if asked[2] else len(data), len(data))
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
            status, data = 206, data[begin:end]
        asked = self._begin(status, len(data), headers)
        self._send(asked, data, fault)

    def _repository(self, name: str, revision: str) -> Repository | None:
        repository = self.server.hub.repositories.get(name)
        if repository is None:
            self._refuse(401, "RepoNotFound")
        elif revision not in {"main", repository.commit}:
            self._refuse(404, "RevisionNotFound")
        else:
            return repository
        return None

    def _json(self, value: object) -> None:
        data = json.dumps(value).encode()
        asked = self._begin(200, len(data), {"Content-Type": "application/json"})
        self._send(asked, data, Fault())

    def _refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        extra = {"X-Error-Code": code, "X-Error-Message": f"{code or status}"} if code else {}
        self._begin(status, 0, {**extra, **(headers or {})})

    def _begin(self, status: int, length: int, headers: dict[str, str]) -> Asked:
        asked = self._note(status)
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        return asked

    def _send(self, asked: Asked, data: bytes, fault: Fault) -> None:
        if self.command == "HEAD":
            return
        stop = len(data) if fault.cut_after is None else min(len(data), fault.cut_after)
        sent = 0
        while sent < stop and not self.server.hub.closing.is_set():
            piece = data[sent : min(stop, sent + _PIECE)]
            if fault.bytes_per_second:
                self.server.hub.closing.wait(len(piece) / fault.bytes_per_second)
            self.server.hub.sending(asked, len(piece))
            try:
                self.wfile.write(piece)
            except OSError:
                self.close_connection = True
                break
            sent += len(piece)
        if sent < len(data):
            self.close_connection = True

    def _note(self, status: int) -> Asked:
        asked = Asked(
            method=self.command,
            path=unquote(urlsplit(self.path).path),
            host=self.headers.get("Host", ""),
            range=self.headers.get("Range", ""),
            authorised=self.headers.get("Authorization") is not None,
            status=status,
        )
        self.server.hub.note(asked)
        return asked
