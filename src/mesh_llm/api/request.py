"""One request: how it arrived, its body, and the model that it names. The same for clients and for other nodes."""

import asyncio
import re
from codecs import BOM_UTF8
from collections.abc import Awaitable, Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol
from urllib.parse import parse_qs, quote

import msgspec

from mesh_llm.api.recording import Recording
from mesh_llm.api.telemetry import RequestTrace
from mesh_llm.api.types import MIB, ApiConfig
from mesh_llm.api.validation import Fields
from mesh_llm.core.trust.circle import Circle
from mesh_llm.core.types.errors import UNREADABLE, MeshError
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.wire.http.http1 import Headers
from mesh_llm.wire.http.multipart import FormError, FormPart, boundary_of, parse_form, write_form

MODEL_HEADER = b"x-mesh-llm-model"
ASKED_HEADER = b"x-mesh-llm-asked-model"
"""On an answer of the default model: the unknown name that the request has."""
PROMPT_AT_HEADER = b"x-mesh-llm-prompt-at"
"""On a request to another node: the node that got more of this prompt before."""
CIRCLE_HEADER = b"x-mesh-llm-circle"
"""On a request to another node: the owners whose nodes may see the prompt, or `-` for none but the two nodes."""
RESUME_HEADER = b"x-mesh-llm-resume"
"""On a request: `off` where an interrupted answer must not be resumed on another node."""

_FORWARDED = frozenset((b"accept", b"content-type", b"user-agent", b"anthropic-version", b"anthropic-beta"))
_MAX_MODEL_NAME = 512
_FORM_NUMBER = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")

ReadPiece = Callable[[], Awaitable[bytes]]
"""Returns the next piece of a request's body, b"" once at its end. Raises ConnectionError if the client is gone."""


@dataclass(slots=True)
class Request:
    """One request as it arrived.

    Attributes:
        method: as in `POST`.
        path: decoded, without the query; of a client's request, as `canonical_path` gives it.
        query: raw, without the question mark.
        headers: as sent; names lower-case.
        read: the body's next piece, for a body that has not arrived as a whole.
        whole: the whole body, where it arrived together with the head; `read` is not used then.
        peer: the node that forwards the request; None for a client of this node.
        stranger: the address of a peer that came by a public listing, as its quota is counted; None: it is no stranger.
        key: the name of the API key that it shows; empty without one.
        address: the client's IP address; empty where it is not known.
        trusted: another part of this process authenticated the client: host, origin and key are not checked.
        owner: the client whose limits the request counts against, as `Auth.owner` names it.
        trace: record of what happens to the request.
        id: the name by which a client's answer carries it, in a header and in errors.
        client: address and port of a client's end of its connection; None where that is not known.
        for_ollama: it came by the port for clients of Ollama.
        asked_path: the path that the client asked, where `path` is what a dialect made of it; else empty.
        circle: the owners whose nodes may see its prompt; None: any.
        recording: for its receipt, if it gets one.
        hint: sends headers before the answer, to a peer; None where there is no such way.
        summed: of a stream from the engine a dialect makes an answer in one piece: nothing may come before it.
    """

    method: str
    path: str
    query: str
    headers: Headers
    read: ReadPiece
    whole: bytes | None = None
    peer: NodeId | None = None
    stranger: str | None = None
    key: str = ""
    address: str = ""
    trusted: bool = False
    owner: str = ""
    trace: RequestTrace | None = None
    circle: Circle = None
    recording: Recording | None = None
    id: str = ""
    client: tuple[str, int] | None = None
    for_ollama: bool = False
    asked_path: str = ""
    summed: bool = False
    hint: Callable[[Headers], Awaitable[None]] | None = None

    def header(self, name: bytes) -> bytes | None:
        """The first value of a header (its name lower-case), or None."""
        for key, value in self.headers:
            if key == name:
                return value
        return None

    @property
    def target(self) -> str:
        """The request target in origin form (RFC 9112, section 3.2.1)."""
        return f"{self.path}?{self.query}" if self.query else self.path

    def forwarded_headers(self, model: ModelName) -> Headers:
        """What a target gets: headers on the body and the API's version. Keys, cookies and origins stay here."""
        kept = [(name, value) for name, value in self.headers if name in _FORWARDED]
        if self.circle is not None:
            kept.append((CIRCLE_HEADER, ",".join(sorted(self.circle)).encode() or b"-"))
        return (*kept, (MODEL_HEADER, model_header(model)))


class Reply(Protocol):
    """Sends one answer: `start`, any number of `write`, then `end`; or `abort` at any time."""

    @property
    def started(self) -> bool:
        """The head has been sent: nothing can be taken back."""
        ...

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Send the head. A `content-length` among the headers frames the body; without one it is chunked."""
        ...

    async def write(self, data: bytes) -> None:
        """Send a piece of the body; returns when the client can take more (back-pressure)."""
        ...

    async def end(self, data: bytes = b"") -> None:
        """Send the last piece of the body: the answer is complete."""
        ...

    def abort(self) -> None:
        """Cut the connection, so that the client sees that the answer is not complete."""
        ...

    def watch(self, gone: Callable[[], None]) -> None:
        """Call `gone` once, as soon as the client leaves. The request's body must have been read before."""
        ...

    def unwatch(self) -> None:
        """Stop watching."""
        ...


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """A request for a model: its body is read, its model is known.

    Attributes:
        request: as it arrived.
        body: the whole body.
        model: the full name of the model.
        reply: the way back.
        began: when the request arrived, on the API's clock.
        deadline: when it must have a place at a target, on the same clock.
        cors: headers that go on every answer.
    """

    request: Request
    body: bytes
    model: ModelName
    reply: Reply
    began: float
    deadline: float
    cors: Headers = ()


class BodyReader:
    """Reads bodies whole, since they may be sent more than once; bounds their size, time and memory."""

    def __init__(self, config: ApiConfig) -> None:
        self._config = config
        self.held = 0
        """Bytes of all bodies being read or answered."""

    async def read(self, request: Request) -> bytes:
        """Return the whole body, without a byte order mark. Its bytes count as held until `release`.

        Raises:
            MeshError: 413 too large, 415 compressed, 408 too slow, 503 out of memory for bodies.
            ConnectionError: the client is gone.
        """
        self._check_head(request)
        pieces: list[bytes] = []
        try:
            if request.whole is not None:
                self._take(request.whole, pieces, 0)
            else:
                await self._gather(request, pieces)
        except BaseException:
            self.held -= sum(map(len, pieces))
            raise
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        if body.startswith(BOM_UTF8):
            # RFC 8259, section 8.1: a reader of JSON may ignore it. Some programs on Windows write it.
            body = body.removeprefix(BOM_UTF8)
            self.held -= len(BOM_UTF8)
        if request.recording is not None:
            request.recording.got(request.method, request.target, body)
        return body

    def release(self, body: bytes) -> None:
        """The body is not needed any more."""
        self.held -= len(body)

    @contextmanager
    def grown(self, before: int, after: int) -> Generator[None]:
        """Count a body that has `after` bytes in place of `before`, for as long as the block lasts.

        Raises:
            MeshError: 413 too large, 503 out of memory for bodies.
        """
        more = max(0, after - before)
        if more and after > self._config.body_bytes:
            raise self._too_large()
        if more and self.held + more > self._config.buffered_bytes:
            raise _out_of_buffers()
        self.held += more
        try:
            yield
        finally:
            self.held -= more

    async def _gather(self, request: Request, pieces: list[bytes]) -> None:
        config = self._config
        begin = asyncio.get_running_loop().time()
        size = 0
        try:
            async with asyncio.timeout(config.body_seconds) as deadline:
                while piece := await request.read():
                    size = self._take(piece, pieces, size)
                    deadline.reschedule(begin + config.body_seconds + size / config.body_rate)
        except TimeoutError:
            raise MeshError(
                "request_timeout", "The request's body came too slowly.", "Send it again, faster.", 408
            ) from None

    def _take(self, piece: bytes, pieces: list[bytes], size: int) -> int:
        pieces.append(piece)
        self.held += len(piece)
        size += len(piece)
        if size > self._config.body_bytes:
            raise self._too_large()
        if self.held > self._config.buffered_bytes:
            raise _out_of_buffers()
        return size

    def _check_head(self, request: Request) -> None:
        coding = request.header(b"content-encoding")
        if coding is not None and coding.strip().lower() != b"identity":
            raise MeshError(
                "compressed_body", "Compressed request bodies are not accepted.", "Send the body uncompressed.", 415
            )
        length = request.header(b"content-length")
        if length is not None and length.isdigit() and int(length[:20]) > self._config.body_bytes:
            raise self._too_large()

    def _too_large(self) -> MeshError:
        limit = self._config.body_bytes
        shown = f"{limit // MIB} MiB" if limit >= MIB else f"{limit} bytes"
        return MeshError("body_too_large", f"The request's body is larger than {shown}.", "Send less at once.", 413)


def _out_of_buffers() -> MeshError:
    return MeshError("out_of_buffers", "Too many large requests at once.", "Try again shortly.", 503, 1.0)


_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_name = msgspec.json.Decoder(str | None).decode


def json_fields(request: Request, body: bytes) -> Fields:
    """The top-level fields of a JSON body, each still encoded; none for a method without a body.

    Raises:
        MeshError: `invalid_json` (400), or `not_json` (415) for a multipart form.
    """
    if request.method == "POST" and not body:
        raise _invalid_json("The request body is empty.")
    if request.method == "GET" or not body:
        return {}
    if any(name == b"content-type" and b"multipart" in value.lower() for name, value in request.headers):
        raise MeshError("not_json", "Forms are not accepted here.", "Send a JSON object.", 415)
    try:
        return _decode_fields(body)
    except msgspec.ValidationError:
        raise _invalid_json("The request body must be a JSON object.") from None
    except RecursionError:
        raise _invalid_json("The request body is nested too deep.") from None
    except UNREADABLE as error:
        raise _invalid_json(f"The request body is not valid JSON: {_reason(error)}.") from None


_FORM_FIELDS = frozenset(("model", "prompt", "language", "response_format", "stream", "temperature", "max_tokens"))
"""Fields of a form with a sound that an engine gets."""
_MAX_FIELD = 64 * 1024
_MAX_QUERY_FIELDS = 32


def read_transcription(request: Request, body: bytes) -> tuple[Fields, bytes]:
    """The fields of a form with a sound file, as JSON, and the form as an engine gets it.

    llama.cpp takes each text of a form as a field of a chat request. So the form is written anew, with the fields of
    OpenAI's API only; `content-type` of the request is set to match.

    Raises:
        MeshError: `not_a_form` (415), `invalid_form` (400).
    """
    try:
        parts = parse_form(body, boundary_of(request.header(b"content-type") or b""))
    except FormError as error:
        if not (request.header(b"content-type") or b"").lower().startswith(b"multipart/form-data"):
            message = "This path takes a form with a sound file."
            raise MeshError(
                "not_a_form", message, "Send multipart/form-data: curl -F file=@FILE -F model=NAME", 415
            ) from None
        raise _invalid_form(f"The form is not well-formed: {error}.") from None
    texts: dict[str, FormPart] = {}
    files: list[FormPart] = []
    for part in parts:
        if part.name == "file":
            files.append(FormPart(part.name, part.content, "file"))
        elif part.name in _FORM_FIELDS and part.filename is None:
            if len(part.content) > _MAX_FIELD or part.name in texts:
                raise _invalid_form(f"The form's `{part.name}` is too long, or there are several.")
            texts[part.name] = part
    if len(files) != 1:
        raise _invalid_form("The form must have one `file`.")
    for name in ("temperature", "max_tokens"):
        if name in texts and not _FORM_NUMBER.fullmatch(texts[name].content.decode("latin-1")):
            raise _invalid_form(f"The form's `{name}` is not a number.")
    try:
        fields = {name: msgspec.Raw(msgspec.json.encode(part.content.decode())) for name, part in texts.items()}
    except UnicodeDecodeError:
        raise _invalid_form("A text of the form is not UTF-8.") from None
    kind, written = write_form([*texts.values(), *files])
    request.headers = (
        *((name, value) for name, value in request.headers if name != b"content-type"),
        (b"content-type", kind),
    )
    return fields, written


def requested_model(request: Request, fields: Fields) -> str | None:
    """The model named in the query (GET) or in the body's fields; None where none is named.

    Raises:
        MeshError: `invalid_model`, `invalid_json` or `invalid_query` (400).
    """
    if request.method == "GET":
        return _bounded(_query_model(request.query)) if request.query else None
    try:
        return _bounded(_decode_name(fields["model"])) if "model" in fields else None
    except msgspec.ValidationError:
        raise _invalid_model("`model` must be a string.") from None
    except UNREADABLE as error:
        raise _invalid_json(f"The request body is not valid JSON: {_reason(error)}.") from None


@lru_cache(maxsize=1024)
def model_header(model: ModelName) -> bytes:
    """A model's name as a header's value: visible ASCII, the rest percent-encoded."""
    return quote(model, safe="/:+@ ._-()[]").encode("ascii")


def query_fields(query: str) -> Mapping[str, list[str]]:
    """The fields of a query. Raises MeshError `invalid_query` (400) for more than any path reads."""
    try:
        return parse_qs(query, max_num_fields=_MAX_QUERY_FIELDS)
    except ValueError:
        raise MeshError("invalid_query", "The query has too many fields.", "Send fewer.", 400) from None


def _query_model(query: str) -> str | None:
    values = query_fields(query).get("model")
    return values[0] if values else None


def _reason(error: Exception) -> str:
    return str(error).removeprefix("JSON is malformed: ") if isinstance(error, msgspec.DecodeError) else "bad text"


def _bounded(name: str | None) -> str | None:
    if name is not None and len(name) > _MAX_MODEL_NAME:
        raise _invalid_model("`model` is too long to be a name.")
    return name


def _invalid_model(message: str) -> MeshError:
    return MeshError("invalid_model", message, "GET /v1/models lists the names.", 400, param="model")


def _invalid_form(message: str) -> MeshError:
    return MeshError("invalid_form", message, "Send it as: curl -F file=@FILE -F model=NAME", 400)


def _invalid_json(message: str) -> MeshError:
    return MeshError("invalid_json", message, "Send a JSON object.", 400)
