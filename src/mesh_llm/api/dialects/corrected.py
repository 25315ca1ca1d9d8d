"""What every dialect's corrections share: the corrected request, and the reply that corrects an answer on its way."""

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from mesh_llm.api.json_values import Json
from mesh_llm.api.request import Reply
from mesh_llm.api.transcript import WholeEvents
from mesh_llm.api.validation import Fields
from mesh_llm.core.types.errors import UNREADABLE, MeshError

MAX_WHOLE = 64 * 1024 * 1024
"""Bytes of an answer without streaming that are held to be corrected; a longer one passes as it is."""

CorrectWhole = Callable[[Json], Json]
"""Corrects an answer that is not streamed."""
CorrectError = Callable[[Json, int], Json]
"""Turns an error and its status into another dialect's."""
CorrectEvents = Callable[[bytes], bytes]
"""Corrects a piece of a stream, which consists of whole server-sent events."""


@dataclass(frozen=True, slots=True)
class Corrected:
    """A request as an engine gets it, and what its answer needs.

    Attributes:
        body: the request's body.
        whole: corrects an answer that is not streamed; None: nothing in it needs it.
        events: the same for a stream.
        path: which answers it, where it is another than the client asked; else empty.
        error: turns an error of that path.
    """

    body: bytes
    whole: CorrectWhole | None = None
    events: CorrectEvents | None = None
    path: str = ""
    error: CorrectError | None = None

    def reply(self, reply: Reply) -> Reply:
        """The way back: the client's own where nothing is corrected on it."""
        return CorrectedReply(reply, self) if self.whole is not None or self.events is not None else reply


class CorrectedReply:
    """A request.Reply that corrects an answer with status 200; errors have their path's shape already."""

    def __init__(self, reply: Reply, corrected: Corrected) -> None:
        self._reply = reply
        self._corrected = corrected
        self._events: CorrectEvents | None = None
        self._correct: CorrectWhole | None = None
        self._status = 200
        self._cut = WholeEvents()
        self._head: list[tuple[bytes, bytes]] = []
        self._held: list[bytes] | None = None
        self._held_bytes = 0
        self.started = False
        self.watch = reply.watch
        self.unwatch = reply.unwatch
        self.abort = reply.abort

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Send the head, or keep it until an answer is whole."""
        self.started = True
        kind = next((value for name, value in headers if name == b"content-type"), b"")
        if status == 200 and kind.startswith(b"text/event-stream"):
            self._events = self._corrected.events
        elif kind.startswith(b"application/json") and (correct := self._of_status(status)) is not None:
            self._correct, self._status = correct, status
            self._head, self._held = headers, []
            return
        await self._reply.start(status, headers)

    def _of_status(self, status: int) -> CorrectWhole | None:
        if status == 200:
            return self._corrected.whole
        turn = self._corrected.error
        return None if turn is None else lambda answer: turn(answer, status)

    async def write(self, data: bytes) -> None:
        """Send a piece of the body."""
        if self._events is not None:
            data = self._cut.cut(data)
            if data:
                await self._reply.write(self._events(data))
        elif self._held is None:
            await self._reply.write(data)
        else:
            await self._hold(data)

    async def end(self, data: bytes = b"") -> None:
        """Send the last piece of the body."""
        if self._events is not None:
            whole = self._cut.cut(data)
            await self._reply.end((self._events(whole) if whole else b"") + self._cut.rest())
            return
        if self._held is not None:
            self._held.append(data)
            data = self._whole(b"".join(self._held))
            await self._reply.start(
                self._status, [*_without_length(self._head), (b"content-length", b"%d" % len(data))]
            )
        await self._reply.end(data)

    async def _hold(self, data: bytes) -> None:
        assert self._held is not None  # noqa: S101 - the caller saw it
        self._held.append(data)
        self._held_bytes += len(data)
        if self._held_bytes > MAX_WHOLE:
            held, self._held = b"".join(self._held), None
            await self._reply.start(self._status, self._head)
            await self._reply.write(held)

    def _whole(self, data: bytes) -> bytes:
        correct = self._correct
        assert correct is not None  # noqa: S101 - nothing is held otherwise
        try:
            answer = msgspec.json.decode(data, type=Json)
        except UNREADABLE:
            return data
        return msgspec.json.encode(correct(answer))


def _without_length(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in headers if name != b"content-length"]


class RequestEdit:
    """A request's top-level fields, of which some are replaced; the others are not parsed."""

    def __init__(self, body: bytes, fields: Fields) -> None:
        self._body = body
        self._fields = dict(fields)
        self._changed = False

    def get(self, name: str) -> object:
        """A field's value, decoded; None where it is not there."""
        raw = self._fields.get(name)
        return None if raw is None else msgspec.json.decode(raw)

    def raw(self, name: str) -> bytes:
        """A field as it was sent; empty where it is not there."""
        return bytes(self._fields.get(name, b""))

    def is_true(self, name: str) -> bool:
        """Whether the field is `true`."""
        return self.raw(name) == b"true"

    def set(self, name: str, value: object) -> None:
        """Replace a field, or add it."""
        self._fields[name] = msgspec.Raw(msgspec.json.encode(value))
        self._changed = True

    def drop(self, name: str) -> None:
        """Take a field out."""
        self._changed |= self._fields.pop(name, None) is not None

    def drop_nulls(self) -> None:
        """Take out what is null: vendors read it as not given, the engine refuses some of it."""
        for name in [name for name, raw in self._fields.items() if bytes(memoryview(raw)[:5]) == b"null"]:
            self.drop(name)

    @property
    def body(self) -> bytes:
        """The body with all changes; the very one that came where there is none."""
        return msgspec.json.encode(self._fields) if self._changed else self._body


def refused(code: str, message: str, hint: str, param: str) -> MeshError:
    """400 for something that the vendor's API has and this one has not."""
    return MeshError(code, message, hint, 400, param=param)


def format_request(schema: object) -> str:
    """A sentence for the prompt that asks for a format, where tools may be called as well.

    The engine cannot enforce both: with a format it calls no tool. `schema`: a JSON schema; None: any JSON.
    """
    if schema is None:
        return "If you call no tool, answer with JSON and nothing else."
    wanted = msgspec.json.encode(schema).decode()
    return f"If you call no tool, answer with JSON that matches this JSON schema, and nothing else: {wanted}"


def edit_event(event: bytes, edit: Callable[[Json], Json | None]) -> bytes:
    """Edit the JSON of one server-sent event, without its end; what is not JSON, or needs no edit (None), stays."""
    head, found, data = event.partition(b"data: ")
    if not found:
        return event
    try:
        decoded = msgspec.json.decode(data, type=Json)
    except UNREADABLE:
        return event
    edited = edit(decoded)
    return event if edited is None else b"%bdata: %b" % (head, msgspec.json.encode(edited))
