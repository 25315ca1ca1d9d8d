"""The paths of Ollama's API that change which models this node's disk holds.

They are this node's own: other nodes of the mesh do not reach them. Without API keys only the node's own user may call
them, by a program: a web page, and a program of another user of the machine, may ask models and no more.
"""

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Protocol

import msgspec

from mesh_llm.api.dialects.ollama.answers import NDJSON, encode_lines
from mesh_llm.api.dialects.ollama.replies import JSON
from mesh_llm.api.dialects.ollama.requests import decode, invalid
from mesh_llm.api.json_values import Json
from mesh_llm.api.request import BodyReader, Reply, Request
from mesh_llm.core.types.errors import MeshError
from mesh_llm.runtime.network import is_other_users
from mesh_llm.wire.http.http1 import Headers

BLOBS = "/api/blobs/"
_METHODS = {
    "/api/pull": "POST",
    "/api/push": "POST",
    "/api/delete": "DELETE",
    "/api/copy": "POST",
    "/api/create": "POST",
}
_CHANGES = ("system", "template", "parameters", "messages", "adapters", "quantize", "quantization", "draft_files")
"""What Ollama changes in a model that it creates; a GGUF file has its own."""
_BATCH = 4 * 1024 * 1024


class PullStep(msgspec.Struct, frozen=True, kw_only=True):
    """Where a download is.

    Attributes:
        phase: `asking`, `waiting`, `fetching`, `checking`, …; `done` at its end.
        digest: names the download; empty while it is not known.
        total: bytes; 0 unknown.
        completed: bytes that are here.
    """

    phase: str
    digest: str = ""
    total: int = 0
    completed: int = 0


class ModelStore(Protocol):
    """The models on this machine's disk. Every method may raise MeshError."""

    def pull(self, model: str) -> AsyncGenerator[PullStep]:
        """Fetch a model; the last step is `done`. The download goes on if nobody asks for the next step."""
        ...

    async def delete(self, model: str) -> None:
        """Remove a model from the disk."""
        ...

    async def copy(self, source: str, destination: str) -> str:
        """Give a model a further name; returns it."""
        ...

    async def create(self, model: str, digest: str) -> str:
        """Make a model of an uploaded file; returns its name."""
        ...

    def has_blob(self, digest: str) -> bool:
        """Whether a file with this digest was uploaded."""
        ...

    async def store_blob(self, digest: str, size: int | None, pieces: AsyncIterator[bytes]) -> None:
        """Store an uploaded file. `size`: its bytes, where they are known."""
        ...


class _NamedBody(msgspec.Struct):
    model: str | None = None
    name: str | None = None
    stream: bool | None = None

    @property
    def asked(self) -> str:
        if not (self.model or self.name):
            raise invalid("model is required", param="model")
        return self.model or self.name or ""


class _CopyBody(msgspec.Struct):
    source: str = ""
    destination: str = ""


class _CreateBody(_NamedBody):
    origin: str | None = msgspec.field(name="from", default=None)
    files: dict[str, str] | None = None


_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


class OllamaManagement:
    """Answers these paths.

    Attributes:
        store: the models on the disk; None on a node that keeps none.
    """

    def __init__(
        self, bodies: BodyReader, keyed: Callable[[], bool], limited: Callable[[str], bool], idle_seconds: float
    ) -> None:
        """What is asked of the API.

        Args:
            bodies: reads requests.
            keyed: whether every client has shown an API key.
            limited: whether the keys of a name have a limit: then they are those of guests.
            idle_seconds: longest pause within an upload.
        """
        self.store: ModelStore | None = None
        self._bodies = bodies
        self._keyed = keyed
        self._limited = limited
        self._idle_seconds = idle_seconds

    def takes(self, path: str) -> bool:
        """Whether a path is one of these."""
        return path in _METHODS or path.startswith(BLOBS)

    async def answer(self, request: Request, reply: Reply, cors: Headers) -> None:
        """Answer a request whose client is authenticated. Raises MeshError."""
        self._check_caller(request)
        if self.store is None:
            message = "This node keeps no models."
            raise MeshError("not_available", message, "Ask a node that serves: mesh-llm status shows them.", 400)
        if request.path.startswith(BLOBS):
            await self._blob(self.store, request, reply, cors)
            return
        if request.method != _METHODS[request.path]:
            message = f"This path takes {_METHODS[request.path]} only."
            raise MeshError("method_not_allowed", message, "", 405)
        body = await self._bodies.read(request)
        try:
            await self._change(self.store, request, body, reply, cors)
        finally:
            self._bodies.release(body)

    def may_change(self, request: Request) -> bool:
        """Whether the client of a request may change this node's models."""
        try:
            self._check_caller(request)
        except MeshError:
            return False
        return True

    def _check_caller(self, request: Request) -> None:
        """Raises MeshError (403) unless this is the node's user, or a client with an API key that has no limit."""
        if request.trusted:
            return
        if self._keyed():
            if self._limited(request.key):
                message = "An API key with a limit may ask models, and not change those of this node."
                raise MeshError("change_refused", message, "Use a key without --key-limit.", 403)
            return
        hint = "Start the node with --api-key-file FILE, and send a key; or type it: mesh-llm models --help"
        if request.header(b"origin") is not None or request.header(b"sec-fetch-site") is not None:
            raise MeshError("change_refused", "A web page may not change the models of this node.", hint, 403)
        if request.client is None or is_other_users(request.client):
            raise MeshError("change_refused", "Only the node's own user may change its models.", hint, 403)

    async def _change(self, store: ModelStore, request: Request, body: bytes, reply: Reply, cors: Headers) -> None:
        if request.path == "/api/push":
            raise MeshError(
                "not_supported", "Models are not pushed from here: there is no registry.",
                "Other nodes of the mesh fetch them from this one: mesh-llm download NAME", 400,
            )  # fmt: skip
        if request.path == "/api/copy":
            copied = decode(body, _CopyBody)
            for name in (copied.source, copied.destination):
                _check_name(name)
            await store.copy(copied.source, copied.destination)
            await _respond(reply, cors)
            return
        if request.path == "/api/delete":
            asked = decode(body, _NamedBody).asked
            _check_name(asked)
            await store.delete(asked)
            await _respond(reply, cors)
            return
        if request.path == "/api/pull":
            pulled = decode(body, _NamedBody)
            _check_name(pulled.asked.removeprefix("hf:"))
            await _progress(reply, cors, _pull_lines(store, pulled.asked), stream=pulled.stream is not False)
            return
        created = decode(body, _CreateBody)
        _check_name(created.asked)
        _check_changes(body)
        await _progress(reply, cors, _create_lines(store, created), stream=created.stream is not False)

    async def _blob(self, store: ModelStore, request: Request, reply: Reply, cors: Headers) -> None:
        digest = request.path.removeprefix(BLOBS)
        if request.method not in ("HEAD", "POST"):
            raise MeshError("method_not_allowed", "This path takes HEAD and POST only.", "", 405)
        found = store.has_blob(digest)
        if request.method == "HEAD":
            if not found:
                raise MeshError("blob_not_found", "There is no such file.", "Upload it by POST.", 404)
            await _respond(reply, cors)
            return
        if found:
            await _respond(reply, cors)
            return
        length = request.header(b"content-length") or b""
        size = int(length) if length.isdigit() and len(length) < 19 else None
        await store.store_blob(digest, size, self._pieces(request))
        await _respond(reply, cors, 201)

    async def _pieces(self, request: Request) -> AsyncGenerator[bytes]:
        """The body in batches. Raises MeshError (408) for a client that stops sending."""
        if request.whole is not None:
            yield request.whole
            return
        batch = bytearray()
        while True:
            try:
                async with asyncio.timeout(self._idle_seconds):
                    piece = await request.read()
            except TimeoutError:
                raise MeshError("request_timeout", "The file came too slowly.", "Send it again, faster.", 408) from None
            batch += piece
            if len(batch) >= _BATCH or not piece:
                yield bytes(batch)
                batch.clear()
            if not piece:
                return


_NAME = re.compile(
    r"(?:[A-Z0-9][\w.-]{0,79}(?::\d{1,5})?/){0,2}[A-Z0-9][\w.-]{0,119}(?::[\w.-]{1,80})?", re.ASCII | re.IGNORECASE
)
"""`[HOST[:PORT]/][NAMESPACE/]MODEL[:TAG]`."""


def _check_name(name: str) -> None:
    """Raises MeshError (400) for what is no name of Ollama's; a path is none."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise invalid("invalid model name", param="model")


def _check_changes(body: bytes) -> None:
    """Raises MeshError (400) for changes to a model that only Ollama makes."""
    fields = _fields.decode(body)
    given = [name for name in _CHANGES if bytes(fields.get(name, b"null")) not in (b"null", b'""', b"{}", b"[]")]
    if given:
        raise invalid(
            f"A model is created here as its GGUF file is, without {', '.join(given)}.",
            "Leave it out: send it with each request, or set it for the model in the configuration file.",
            given[0],
        )


async def _pull_lines(store: ModelStore, model: str) -> AsyncGenerator[Json]:
    """The progress of a download, as Ollama reports it."""
    yield {"status": "pulling manifest"}
    checked = False
    async with aclosing(store.pull(model)) as steps:
        async for step in steps:
            if step.phase == "checking" and not checked:
                checked = True
                yield {"status": "verifying sha256 digest"}
            elif step.digest and step.total and not checked:
                line: Json = {"status": f"pulling {step.digest[7:19]}", "digest": step.digest, "total": step.total}
                yield line | ({"completed": step.completed} if step.completed else {})
    yield {"status": "writing manifest"}
    yield {"status": "success"}


async def _create_lines(store: ModelStore, body: _CreateBody) -> AsyncGenerator[Json]:
    if body.origin:
        _check_name(body.origin)
        yield {"status": "reading model metadata"}
        await store.copy(body.origin, body.asked)
    elif body.files:
        if len(body.files) != 1:
            raise invalid("A model is created of one GGUF file.", "Name one file in `files`.", "files")
        yield {"status": "parsing GGUF"}
        await store.create(body.asked, next(iter(body.files.values())))
    else:
        raise invalid("neither 'from' or 'files' was specified")
    yield {"status": "writing manifest"}
    yield {"status": "success"}


async def _progress(reply: Reply, cors: Headers, lines: AsyncGenerator[Json], *, stream: bool) -> None:
    """Send lines of progress as they come; without a stream only the last. Ends when the client leaves."""
    left = asyncio.Event()
    reply.watch(left.set)
    last: Json = {}
    try:
        async with aclosing(lines):
            async for line in lines:
                if left.is_set():
                    return
                if stream and not reply.started:
                    await reply.start(200, [(b"content-type", NDJSON), *cors])
                if stream:
                    await reply.write(encode_lines([line]))
                last = line
    except MeshError as error:
        if not reply.started:
            raise
        await reply.end(encode_lines([{"error": str(error)}]))
        return
    finally:
        reply.unwatch()
    if stream:
        await reply.end()
    else:
        await _respond(reply, cors, body=msgspec.json.encode(last))


async def _respond(reply: Reply, cors: Headers, status: int = 200, body: bytes = b"") -> None:
    head = [(b"content-type", JSON), (b"content-length", b"%d" % len(body)), *cors]
    await reply.start(status, head)
    await reply.end(body)
