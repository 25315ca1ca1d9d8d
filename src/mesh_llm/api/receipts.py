"""Receipts: made at the end of an answer, kept for a while, and given to who asked; also this node's parts of others'.

The asking node records what passes (`recording`), fetches from each host what it signed, and signs the whole. A host
signs a first part before its engine gets the prompt, and sends it at once; and its part before it sends the last bytes
of its answer, which it keeps for the node that asked.
"""

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from urllib.parse import urlencode

import msgspec
import structlog

from mesh_llm.api.errors import method_not_allowed
from mesh_llm.api.recording import FIRST_HEADER, PART_HEADER, Recording, StepRecord, WallClock
from mesh_llm.api.request import Reply, Request, query_fields
from mesh_llm.api.types import ENDPOINTS
from mesh_llm.api.upstream import TargetLostError, Upstream, UpstreamRequest
from mesh_llm.core.trust.receipts import LIMITS, Checked, answered_by, begun_by, examine, holds, who_saw
from mesh_llm.core.types.errors import UNREADABLE, MeshError
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.receipt import MAX_STATEMENT, Announced, FirstPart, Outcome, Receipt, Served, Statement, Step
from mesh_llm.runtime.supervision import TaskScope, wait_for_event
from mesh_llm.wire.codec import SIGNATURE_BYTES, Sign, Verify, copied
from mesh_llm.wire.http.http1 import Headers
from mesh_llm.wire.mesh.receipts import (
    first_text,
    read_receipt,
    read_statement,
    says_the_same,
    sign_first,
    sign_receipt,
    sign_statement,
)

RECEIPT_HEADER = b"x-mesh-llm-receipt"
"""On a client's request: `on` or `off`. On an answer in one piece: the receipt."""
RECEIPT_ID_HEADER = b"x-mesh-llm-receipt-id"
"""On an answer: the id of its receipt, which is at RECEIPTS once the answer has ended."""
RECEIPTS = "/v1/receipts/"
PART_PATH = "/mesh/receipt-part"
"""Where another node asks for what this one signed about a request of it: `?challenge=HEX`."""
COMMENT = b": mesh-llm-receipt "
"""A stream ends with this comment; a client of server-sent events skips it."""

_SECONDS = 24 * 3600.0
_MOST = 1024
_MOST_BYTES = 16 << 20
_PART_SECONDS = 600.0
_MOST_PARTS = 4096
_PARTS_OF_PEER = 512
_FETCH_SECONDS = 2.0
_READY_SECONDS = 1.5
"""How long another node's question waits for the end of the answer that it is about."""
_MOST_PART = 4 * MAX_STATEMENT
_IN_HEADER = 6000
_IN_COMMENT = 32 * 1024
_TEXT = 120
"""Characters of the texts in a statement that nobody looks up by them."""
_log = structlog.get_logger(__name__)


class Part(msgspec.Struct, frozen=True):
    """What a host signed, on the way to the node that asked it."""

    statement: bytes
    signature: bytes


class SeenBy(msgspec.Struct, frozen=True, kw_only=True):
    """A node that saw a prompt; see core.trust.receipts.Seen."""

    node: str
    name: str
    part: str
    signed: bool
    first_only: bool


class FindingShown(msgspec.Struct, frozen=True, kw_only=True):
    """One result of the examination: `mark` is holds, fails or note."""

    mark: str
    text: str


class ReceiptShown(msgspec.Struct, frozen=True, kw_only=True):
    """A receipt for people and programs. All but `receipt` can be derived from it.

    Attributes:
        id: 32 hex digits.
        holds: nothing in the examination fails.
        model and what follows it: as the last host signed it, token counts only at the answer's end; empty or 0 where
            it did not. `content`: SHA-256 of the model's file in hex, as the host says.
        seen: the nodes that saw the prompt.
        findings: the examination.
        limits: what no receipt proves.
        receipt: the signed text, for `mesh-llm receipt verify`.
    """

    id: str
    object: str = "mesh_llm.receipt"
    holds: bool
    model: str = ""
    content: str = ""
    fingerprint: str = ""
    quantisation: str = ""
    context: int = 0
    engine: str = ""
    cache_type: str = ""
    wire_type: str = ""
    prompt_tokens: int = 0
    tokens: int = 0
    seen: tuple[SeenBy, ...]
    findings: tuple[FindingShown, ...]
    limits: tuple[str, ...] = LIMITS
    receipt: str


@dataclass(frozen=True, kw_only=True)
class Notary:
    """What receipts need of the node.

    Attributes:
        node: this node.
        sign: with its key.
        verify: a signature of any key.
        prepare: a launch here gets a request with a receipt: find out what takes long.
        served: facts of a launch here.
        announced: what a host has announced about a model.
        name_of: a node's name for people.
    """

    node: NodeId
    sign: Sign
    verify: Verify
    prepare: Callable[[ModelName], None]
    served: Callable[[ModelName, int], Served]
    announced: Callable[[ModelName, NodeId], Announced]
    name_of: Callable[[NodeId], str]


@dataclass(frozen=True)
class _Kept:
    owner: str
    text: str
    at: float


class Receipts:
    """All receipts of a node. One for the whole API.

    Attributes:
        notary: signs; None until the node has its key: no receipts are made before.
    """

    def __init__(
        self, upstream: Upstream, clock: Callable[[], float], *, always: bool, wall_clock: WallClock = time.time
    ) -> None:
        """`always`: each answer gets a receipt unless its request says `off`."""
        self.notary: Notary | None = None
        self._upstream = upstream
        self._always = always
        self._clock = clock
        self._wall_clock = wall_clock
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._bytes = 0
        self._ending: dict[str, asyncio.Task[object]] = {}
        self._parts: OrderedDict[tuple[NodeId, bytes], tuple[Part, float]] = OrderedDict()
        self._of_peer: Counter[NodeId] = Counter()
        self._expected: dict[tuple[NodeId, bytes], asyncio.Event] = {}
        self._scope = TaskScope("receipts")

    async def close(self) -> None:
        """Stop making receipts."""
        await self._scope.close()

    # Of a request that arrives.

    def record(self, request: Request) -> bool:
        """Record a request, if it gets a receipt. Raises MeshError `bad_receipt_header` (400)."""
        if self.notary is None or request.recording is not None:
            return request.recording is not None
        recording = Recording(request.path, self._wall_clock, self.notary.announced, self.notary.prepare)
        if request.peer is not None:
            value = request.header(PART_HEADER)
            if value is None or not recording.for_peer(request.peer, value):
                return False
            self._expected[request.peer, recording.challenge] = asyncio.Event()
            if request.hint is not None:
                recording.begins = partial(self._sign_first, recording, request.peer, request.hint)
        elif not self._wanted(request):
            return False
        request.recording = recording
        return True

    def _wanted(self, request: Request) -> bool:
        if request.method != "POST" or (request.path in ENDPOINTS and not ENDPOINTS[request.path].kinds):
            return False
        value = (request.header(RECEIPT_HEADER) or b"").strip().lower()
        if value not in (b"", b"on", b"off"):
            raise MeshError("bad_receipt_header", "The header x-mesh-llm-receipt must be on or off.", "Send: on", 400)
        return value == b"on" or (self._always and not value)

    def reply(self, recording: Recording, reply: Reply) -> "RecordedReply":
        """The way back of a recorded request."""
        return RecordedReply(recording, reply, self.end)

    async def end(self, recording: Recording, *, whole: bool) -> str:
        """The answer has ended: sign what there is. Returns the receipt; empty for another node's request, or none."""
        recording.close(whole=whole)
        notary = self.notary
        if notary is None:
            return ""
        if recording.asker is not None:
            self._sign_part(recording, recording.asker, notary)
            return ""
        name = recording.id.hex()
        known = self._kept.get(name)
        if known is not None or not recording.steps:
            return known.text if known is not None else ""
        task = self._ending.get(name)
        if task is None:
            # A task of its own: it is made also for a client that leaves at the answer's last word.
            task = self._ending[name] = self._scope.spawn(self._make(recording, notary), f"receipt {name}")
            task.add_done_callback(lambda _: self._ending.pop(name, None))
        await asyncio.wait({task})
        made = self._kept.get(name)
        return made.text if made is not None else ""

    # Made here.

    async def _make(self, recording: Recording, notary: Notary) -> None:
        if recording.too_many:
            _log.info("no receipt: too many hosts got the request", id=recording.id.hex())
            return
        steps = await asyncio.gather(*(self._signed(recording, step, notary) for step in recording.steps))
        receipt = Receipt(
            node=notary.node,
            id=recording.id,
            path=recording.path[:_TEXT],
            request=recording.request or recording.steps[0].request,
            answer=recording.answer.digest,
            answer_bytes=recording.answer.size,
            status=recording.status,
            began=recording.began,
            ended=recording.ended,
            steps=tuple(steps),
        )
        self._keep(recording, sign_receipt(receipt, notary.sign))

    async def _signed(self, recording: Recording, record: StepRecord, notary: Notary) -> Step:
        """A finished step, with what its host signed."""
        step = record.step()
        if step.outcome is Outcome.REFUSED or step.status >= 400:
            return step
        if record.target.local:
            whole = step.outcome is Outcome.ANSWERED
            made = self._state(record, notary, notary.node, step.challenge, step.previous, recording.ended)
            made = msgspec.structs.replace(
                made, request=step.request, answer=step.answer, answer_bytes=step.answer_bytes, whole=whole
            )
            statement, signature = sign_statement(made, notary.sign)
            return record.step(statement, signature)
        part = await self._fetch(record)
        if part is None:
            return record.step(with_first=True)
        told = read_statement(step.node, part.statement, part.signature, notary.verify) if record.first else None
        # It stays where it says more, or something else, than what was signed at the end.
        stays = not isinstance(told, Statement) or not says_the_same(record.first, told)
        return record.step(part.statement, part.signature, with_first=stays)

    async def _fetch(self, record: StepRecord) -> Part | None:
        """What another node signed; None where it does not say."""
        query = urlencode({"challenge": record.challenge.hex()})
        try:
            async with asyncio.timeout(_FETCH_SECONDS):
                asked = UpstreamRequest("GET", f"{PART_PATH}?{query}", (), b"")
                response = await self._upstream.send(record.target, asked)
                body = b""
                try:
                    while len(body) < _MOST_PART and (piece := await response.read()):
                        body += piece
                finally:
                    response.close()
            if response.head.status != 200:
                return None
            part = msgspec.json.decode(body, type=Part)
        except (TargetLostError, TimeoutError, *UNREADABLE) as error:
            _log.info("a host gave no part of a receipt", node=record.target.node[:10], reason=str(error))
            return None
        fits = 0 < len(part.statement) <= MAX_STATEMENT and len(part.signature) == SIGNATURE_BYTES
        return part if fits else None

    def _state(
        self,
        record: StepRecord,
        notary: Notary,
        asker: NodeId,
        challenge: bytes,
        previous: bytes,
        ended: int,
        known: Served | None = None,
    ) -> Statement:
        """What this node says about one request that an engine here got."""
        served = notary.served(record.model, record.target.term)
        if known is not None:
            # What was signed at first holds; its file may have been read since.
            served = msgspec.structs.replace(known, content=known.content or served.content)
        usage = record.answer.usage()
        return Statement(
            host=notary.node,
            asker=asker,
            challenge=challenge,
            previous=previous,
            request=record.request,
            answer=record.answer.digest,
            answer_bytes=record.answer.size,
            status=record.status,
            whole=True,
            model=record.model,
            content=served.content,
            fingerprint=served.fingerprint[:_TEXT],
            quantisation=served.quantisation[:_TEXT],
            context=served.context,
            engine=_line(served.engine),
            cache_type=served.cache_type[:_TEXT],
            wire_type=served.wire_type[:_TEXT],
            system_prompt=served.system_prompt,
            workers=served.workers,
            prompt_tokens=usage.prompt,
            cached_tokens=usage.cached,
            tokens=usage.generated,
            began=record.began,
            ended=max(ended, record.began),
        )

    def _keep(self, recording: Recording, text: str) -> None:
        now = self._clock()
        self._kept[recording.id.hex()] = _Kept(recording.owner, text, now)
        self._bytes += len(text)
        while self._kept:
            first = next(iter(self._kept.values()))
            if len(self._kept) <= _MOST and self._bytes <= _MOST_BYTES and now - first.at < _SECONDS:
                break
            self._bytes -= len(self._kept.popitem(last=False)[1].text)

    # Parts of other nodes' receipts.

    async def _sign_first(
        self, recording: Recording, asker: NodeId, hint: Callable[[Headers], Awaitable[None]]
    ) -> None:
        """An engine here is about to get another node's prompt: sign that, and say it at once."""
        notary = self.notary
        if notary is None or not recording.steps or not recording.request:
            return
        record = recording.steps[-1]
        recording.served = notary.served(record.model, record.target.term)
        first = copied(FirstPart, self._state_part(recording, record, asker, notary))
        # Who is gone is noticed elsewhere.
        with suppress(OSError):
            await hint(((FIRST_HEADER, first_text(sign_first(first, notary.sign))),))

    def _state_part(self, recording: Recording, record: StepRecord, asker: NodeId, notary: Notary) -> Statement:
        """What this node says about another node's request."""
        ended, known = recording.ended, recording.served
        made = self._state(record, notary, asker, recording.challenge, recording.previous, ended, known)
        return msgspec.structs.replace(
            made,
            request=recording.request,
            answer=recording.answer.digest,
            answer_bytes=recording.answer.size,
            status=recording.status,
            whole=recording.whole,
            began=recording.began,
        )

    def _sign_part(self, recording: Recording, asker: NodeId, notary: Notary) -> None:
        key = (asker, recording.challenge)
        # A challenge that was answered before is not answered anew.
        if key not in self._parts and recording.steps and recording.request:
            made = self._state_part(recording, recording.steps[-1], asker, notary)
            self._parts[key] = (Part(*sign_statement(made, notary.sign)), self._clock())
            self._of_peer[asker] += 1
            self._bound_parts(asker)
        event = self._expected.pop(key, None)
        if event is not None:
            event.set()

    def _bound_parts(self, asker: NodeId) -> None:
        """Drop what is old, and the oldest of a node that has too many, so that it drops nobody else's."""
        now = self._clock()
        while self._parts:
            key, (_, at) = next(iter(self._parts.items()))
            if len(self._parts) <= _MOST_PARTS and now - at < _PART_SECONDS:
                break
            self._drop_part(key)
        if self._of_peer[asker] > _PARTS_OF_PEER:
            self._drop_part(next(key for key in self._parts if key[0] == asker))

    def _drop_part(self, key: tuple[NodeId, bytes]) -> None:
        del self._parts[key]
        self._of_peer[key[0]] -= 1
        if not self._of_peer[key[0]]:
            del self._of_peer[key[0]]

    async def part(self, peer: NodeId, query: str) -> Part:
        """Answer another node's question at PART_PATH. Raises MeshError `no_receipt` (404)."""
        try:
            key = (peer, bytes.fromhex(query_fields(query)["challenge"][0]))
        except (KeyError, ValueError):
            raise MeshError("bad_request", "The question names no challenge.", "", 400) from None
        expected = self._expected.get(key)
        if expected is not None:
            await wait_for_event(expected, _READY_SECONDS)
        found = self._parts.get(key)
        if found is None:
            raise MeshError("no_receipt", "Nothing was signed here about that request.", "", 404)
        return found[0]

    # What clients ask.

    def takes(self, path: str) -> bool:
        """Whether a path is one of a receipt."""
        return path.startswith(RECEIPTS)

    async def answer(self, request: Request, owner: str, reply: Reply, cors: Headers) -> None:
        """Answer a client's question for its receipt. Raises MeshError."""
        if request.method not in ("GET", "HEAD"):
            raise method_not_allowed("GET")
        name = request.path.removeprefix(RECEIPTS)
        ending = self._ending.get(name)
        if ending is not None:
            await asyncio.wait({ending})
        kept, notary = self._kept.get(name), self.notary
        checked = None
        if kept is not None and notary is not None and kept.owner == owner:
            checked = read_receipt(kept.text, notary.verify)
        if kept is None or notary is None or not isinstance(checked, Checked):
            raise MeshError(
                "no_receipt",
                "There is no such receipt here.",
                "A receipt is made when its answer has ended, and kept for a day by the node that was asked, until "
                "that node ends. Ask with the header x-mesh-llm-receipt: on, and with the same key.",
                404,
            )
        body = msgspec.json.encode(shown(checked, kept.text, notary.name_of))
        head = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await reply.start(200, [*head, (b"cache-control", b"no-store"), *cors])
        await reply.end(body if request.method == "GET" else b"")


def shown(checked: Checked, text: str, name_of: Callable[[NodeId], str]) -> ReceiptShown:
    """A receipt as it is shown."""
    findings = examine(checked)
    end = answered_by(checked)
    host = end or begun_by(checked)
    return ReceiptShown(
        id=checked.receipt.id.hex(),
        holds=holds(findings),
        model=host.model if host is not None else "",
        content=host.content.hex() if host is not None else "",
        fingerprint=host.fingerprint if host is not None else "",
        quantisation=host.quantisation if host is not None else "",
        context=host.context if host is not None else 0,
        engine=host.engine if host is not None else "",
        cache_type=host.cache_type if host is not None else "",
        wire_type=host.wire_type if host is not None else "",
        prompt_tokens=end.prompt_tokens if end is not None else 0,
        tokens=end.tokens if end is not None else 0,
        seen=tuple(
            SeenBy(node=one.node, name=name_of(one.node), part=one.part, signed=one.signed, first_only=one.first_only)
            for one in who_saw(checked)
        ),
        findings=tuple(FindingShown(mark=one.mark.value, text=one.text) for one in findings),
        receipt=text,
    )


class RecordedReply:
    """The way back of a recorded request: a request.Reply that digests what is sent, and ends with the receipt.

    The receipt of an answer in one piece goes into a header: its head is held until the answer is there. A stream of
    events ends with a comment. Other streams have the id only.
    """

    def __init__(self, recording: Recording, reply: Reply, end: Callable[..., Awaitable[str]]) -> None:
        self._recording = recording
        self._reply = reply
        self._end = end
        self._head: tuple[int, list[tuple[bytes, bytes]]] | None = None
        self._events = False
        self.started = reply.started
        self.watch = reply.watch
        self.unwatch = reply.unwatch

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Send the head of a stream; hold that of another answer."""
        self.started = True
        self._recording.status = status
        if self._recording.asker is not None:
            await self._reply.start(status, headers)
            return
        kind = next((value for name, value in headers if name == b"content-type"), b"")
        self._events = kind.startswith(b"text/event-stream")
        if self._events or self._recording.steps:
            headers = [*headers, (RECEIPT_ID_HEADER, self._recording.id.hex().encode())]
        if self._events:
            await self._reply.start(status, headers)
        else:
            self._head = (status, headers)

    async def write(self, data: bytes) -> None:
        """Send a piece of the body."""
        await self._send_head()
        self._recording.answer.take(data)
        await self._reply.write(data)

    async def end(self, data: bytes = b"") -> None:
        """Send the last piece, and the receipt where there is a place for it."""
        recording = self._recording
        recording.answer.take(data)
        if recording.asker is not None:
            # Signed before the last bytes go, so that it is there when the other node asks for it.
            await self._end(recording, whole=True)
            await self._reply.end(data)
        elif self._events:
            # The client has all of the answer before the hosts are asked for what they signed.
            if data:
                await self._reply.write(data)
            text = await self._end(recording, whole=True)
            given = text if len(text) <= _IN_COMMENT else recording.id.hex()
            await self._reply.end(COMMENT + given.encode() + b"\n\n" if text else b"")
        elif self._head is not None:
            text = await self._end(recording, whole=True)
            if text and len(text) <= _IN_HEADER:
                self._head[1].append((RECEIPT_HEADER, text.encode()))
            await self._send_head()
            await self._reply.end(data)
        else:
            await self._reply.end(data)
            await self._end(recording, whole=True)

    def abort(self) -> None:
        """Cut the answer off."""
        self._reply.abort()

    async def _send_head(self) -> None:
        if self._head is not None:
            head, self._head = self._head, None
            await self._reply.start(*head)


def _line(text: str) -> str:
    """A text as a statement takes it."""
    return "".join(char for char in text if char.isprintable())[:_TEXT]
