"""An index of wheels on loopback that fails on request, and real wheels made of the installed engine's files."""

import base64
import hashlib
import json
import re
import threading
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import distribution
from pathlib import Path
from typing import Self

from packaging.tags import sys_tags

from mesh_llm.engine.sources.embedded.archive import PACKAGE, VERSION

JSON = "application/vnd.pypi.simple.v1+json"
_PIECE = 1 << 16


def this_platform() -> str:
    """The part of a wheel's name that fits this system best."""
    return next(tag.platform for tag in sys_tags() if "manylinux" in tag.platform or "macosx" in tag.platform)


def wheel_name(version: str = VERSION, tags: str = "", package: str = PACKAGE) -> str:
    """The file name of a wheel, by default for this system."""
    return f"{package}-{version}-{tags or f'cp310-abi3-{this_platform()}'}.whl"


def metadata(version: str = VERSION, requires: tuple[str, ...] = ()) -> bytes:
    """A wheel's METADATA."""
    lines = ["Metadata-Version: 2.4", f"Name: {PACKAGE}", f"Version: {version}"]
    return "\n".join([*lines, *(f"Requires-Dist: {one}" for one in requires), ""]).encode()


def write_wheel(path: Path, files: Mapping[str, bytes | Path], record: bytes | None = None) -> Path:
    """A wheel with these files, and a RECORD of them in the directory of the notes."""
    notes = f"{PACKAGE}-{VERSION}.dist-info"
    lines: list[str] = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as wheel:
        for name, content in files.items():
            data = content if isinstance(content, bytes) else content.read_bytes()
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
            lines.append(f"{name},sha256={digest},{len(data)}\n")
            wheel.writestr(name, data)
        lines.append(f"{notes}/RECORD,,\n")
        wheel.writestr(f"{notes}/RECORD", "".join(lines).encode() if record is None else record)
    return path


def small_files(version: str = VERSION, requires: tuple[str, ...] = ()) -> dict[str, bytes | Path]:
    """The least that a wheel of the engine must have; it cannot be loaded."""
    notes = f"{PACKAGE}-{VERSION}.dist-info"
    return {
        f"{PACKAGE}/__init__.py": b"",
        f"{PACKAGE}/{PACKAGE}.abi3.so": b"\x7fELF" + bytes(100_000),
        f"{notes}/METADATA": metadata(version, requires),
    }


def engine_files() -> dict[str, bytes | Path]:
    """All files of the installed engine."""
    found: dict[str, bytes | Path] = {}
    for file in distribution(PACKAGE).files or ():
        if "__pycache__" not in file.parts and file.name not in {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json"}:
            found[file.as_posix()] = Path(str(file.locate()))
    return found


@dataclass
class Answer:
    """What a path answers.

    Attributes:
        body: whole.
        kind: its Content-Type.
        status: of an answer without faults.
        location: where a redirect leads.
        cut_after: the connection breaks after so many bytes, `cuts` times.
        cuts: how often.
        ranges: parts are sent.
        sized: the size is sent.
        claims: the size that is said to be the whole one, instead of the real one; 0 for the real one.
    """

    body: bytes = b""
    kind: str = "text/html"
    status: int = 200
    location: str = ""
    cut_after: int | None = None
    cuts: int = 1
    ranges: bool = True
    sized: bool = True
    claims: int = 0


@dataclass
class WheelIndex:
    """The server; a context manager. `answers` by path; `seen`: (path, Range) of all requests."""

    answers: dict[str, Answer] = field(default_factory=dict[str, Answer])
    seen: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])

    def __enter__(self) -> Self:
        index = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                index.answer(self)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def address(self) -> str:
        """Of the index's root."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/whl"

    def add(self, folder: str, wheel: Path, *, sha256: str | None = None, as_json: bool = False) -> Answer:
        """List a wheel in a folder, as in `vulkan`; returns its answer. `sha256`: empty for none, None for the real."""
        data = wheel.read_bytes()
        digest = hashlib.sha256(data).hexdigest() if sha256 is None else sha256
        page = f"/whl/{folder}/{PACKAGE}/".replace("//", "/")
        self.answers[f"/files/{wheel.name}"] = answer = Answer(body=data, kind="application/octet-stream")
        if as_json:
            one = {"filename": wheel.name, "url": f"../../../files/{wheel.name}", "size": len(data)}
            listed = {"meta": {"api-version": "1.1"}, "name": PACKAGE, "files": [one | {"hashes": {"sha256": digest}}]}
            self.answers[page] = Answer(body=json.dumps(listed).encode(), kind=JSON)
        else:
            fragment = f"#sha256={digest}" if digest else ""
            link = f'<a href="/files/{wheel.name.replace("+", "%2B")}{fragment}">{wheel.name}</a>'
            known = self.answers.get(page, Answer()).body
            self.answers[page] = Answer(body=known + link.encode())
        return answer

    def requested(self, name: str) -> list[str]:
        """The ranges of all requests for a file."""
        return [ranges for path, ranges in self.seen if path.endswith(name)]

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Answer one request."""
        ranges = request.headers.get("Range", "")
        path = request.path.replace("%2B", "+")
        self.seen.append((path, ranges))
        found = self.answers.get(path, Answer(status=404, body=b"no such page"))
        if found.location:
            request.send_response(302)
            request.send_header("Location", found.location)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        body, match = found.body, re.fullmatch(r"bytes=(\d+)-(\d+)", ranges)
        if match is not None and found.ranges and found.status == 200:
            begin, end = int(match[1]), min(int(match[2]) + 1, len(body))
            body = body[begin:end]
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {begin}-{end - 1}/{found.claims or len(found.body)}")
        else:
            request.send_response(found.status)
        request.send_header("Content-Type", found.kind)
        if found.sized:
            request.send_header("Content-Length", str(len(body)))
        else:
            request.close_connection = True
        request.end_headers()
        self._send(request, found, body)

    def _send(self, request: BaseHTTPRequestHandler, found: Answer, body: bytes) -> None:
        for start in range(0, len(body), _PIECE):
            piece = body[start : start + _PIECE]
            if found.cut_after is not None and found.cuts and start + len(piece) > found.cut_after:
                found.cuts -= 1
                request.close_connection = True
                return
            try:
                request.wfile.write(piece)
            except OSError:
                request.close_connection = True
                return
