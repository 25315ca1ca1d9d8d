"""Answers to Responses that a client can come back to, kept on the node that it asked.

Each is a file that only the user can read, in a folder of the API key that asked for it: with another key it does not
exist. They are bounded by number, bytes and age, least recently used ones go first, and they survive a restart.
"""

import asyncio
import os
import re
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import structlog

from mesh_llm.api.dialects.openai_responses import ResponsesContext
from mesh_llm.api.json_values import Json, items, mapping, text
from mesh_llm.api.request import Reply, Request, query_fields
from mesh_llm.api.types import ENDPOINTS, MIB
from mesh_llm.api.validation import Fields
from mesh_llm.core.trust.circle import Circle, narrowest
from mesh_llm.core.types.errors import UNREADABLE, MeshError
from mesh_llm.core.types.ids import OwnerId
from mesh_llm.runtime.home import write_atomic
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.wire.http.http1 import Headers

RESPONSES = "/v1/responses"
PREFIX = RESPONSES + "/"
_ID = re.compile(r"resp_[A-Za-z0-9_-]{1,80}")
_NO_KEY = "open"
_ITEM_ID = re.compile(rb'"id":("(?:[^"\\]|\\.)*")')
_DAY = 86400.0
_MOST_TURNS = 1000
_MOST_LISTED, _USUALLY_LISTED = 100, 20
_COMPACT = PREFIX + "compact"
_log = structlog.get_logger(__name__)


class StoreLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept at most: answers, bytes of all, bytes of one, and seconds since one was last used.

    `conversation_bytes`: of the answers that one request continues, together.
    """

    count: int = 1000
    total_bytes: int = 256 * MIB
    each_bytes: int = 16 * MIB
    conversation_bytes: int = 32 * MIB
    seconds: float = 30 * _DAY


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    """One answer: as the client got it, the items of its own request, and the answer before it; empty: none.

    `circle`: where its prompt could go, and where it may go again; None: everywhere.
    """

    response: dict[str, Any]
    input: list[Any]
    previous: str = ""
    circle: frozenset[OwnerId] | None = None


Name = tuple[str, str]
"""Folder and id of an answer."""


class StoredResponses:
    """The answers of one node, and the paths by which clients come back to them.

    Args:
        directory: where they are kept; None: nowhere (`--no-store`).
        limits: what is kept at most.
        now: the time, UNIX seconds.
    """

    def __init__(
        self, directory: Path | None, limits: StoreLimits | None = None, now: Callable[[], float] = time.time
    ) -> None:
        self._directory = directory
        self._limits = limits or StoreLimits()
        self._now = now
        self._sizes: OrderedDict[Name, int] | None = None
        self._unwritten: dict[Name, bytes] = {}
        self._disk = asyncio.Lock()
        self._reading = asyncio.Lock()
        self._sending = 0
        self._scope = TaskScope("stored responses")

    async def close(self) -> None:
        """Write what is not written yet, and end."""
        await self.write()
        await self._scope.close()

    async def context(
        self, owner: str, fields: Fields, model: str, context: int, circle: Circle = None
    ) -> ResponsesContext:
        """What is known of a request to `/v1/responses` beside its body; `owner`: whose it is; `circle`: its own.

        What a stored answer was asked with goes nowhere else when another request continues it, or refers to it.

        Raises:
            MeshError: `previous_response_not_found`, `item_not_found` or `no_store` (400).
        """
        previous = _text_field(fields, "previous_response_id")
        given = bytes(fields.get("input", b""))
        before, referred, circles = list[Any](), dict[str, Json](), [circle]
        if previous:
            before = await self._conversation(owner, previous, circles)
        if b'"item_reference"' in given:
            referred = await self._items(owner, _references(given), circles)
        within = narrowest(circles)
        stored = self._directory is not None and bytes(fields.get("store", b"")) != b"false"

        def keep(response: Json, asked: list[Any]) -> None:
            kept = Stored(response=response, input=asked, previous=previous, circle=within)
            self._keep((_folder(owner), text(response.get("id"))), kept)

        return ResponsesContext(
            model,
            context,
            int(self._now()),
            stored=stored,
            keep=keep if stored else None,
            before=before,
            referred=referred,
            circle=within,
        )

    def takes(self, path: str) -> bool:
        """Whether a path is that of a stored answer."""
        return path.startswith(PREFIX) and path not in ENDPOINTS and path != _COMPACT

    @asynccontextmanager
    async def reading(self, fields: Fields) -> AsyncGenerator[bool]:
        """Whether a request continues or refers to stored answers: then one is read at a time, to bound the memory."""
        continues = "previous_response_id" in fields or b'"item_reference"' in bytes(fields.get("input", b""))
        if not continues:
            yield False
            return
        async with self._reading:
            yield True

    async def answer(self, request: Request, owner: str, reply: Reply, headers: Headers) -> None:
        """Answer a request for a stored answer, or raise MeshError."""
        name, _, rest = request.path.removeprefix(PREFIX).partition("/")
        if rest == "cancel":
            raise MeshError(
                "no_background", "Only an answer in the background can be cancelled, and there are none here.",
                "Close the connection to cancel an answer.", 400,
            )  # fmt: skip
        if rest not in ("", "input_items"):
            raise MeshError("not_found", "There is nothing at this path.", f"Stored answers are at {PREFIX}ID.", 404)
        stored = await self._find(owner, name)
        if stored is None:
            raise _missing(name, 404, None, kept=self._directory is not None)
        asked = query_fields(request.query)
        if request.method == "DELETE" and not rest:
            await self._delete((_folder(owner), name))
            body: object = {"id": name, "object": "response", "deleted": True}
        elif request.method not in ("GET", "HEAD"):
            raise MeshError("method_not_allowed", "This path does not take that method.", "Use GET or DELETE.", 405)
        elif rest:
            async with self._reading:
                before = await self._conversation(owner, stored.previous, []) if stored.previous else []
                body = _page([*before, *stored.input], asked)
            del before
        elif asked.get("stream") == ["true"]:
            raise MeshError(
                "no_background", "A stored answer cannot be streamed.", "Leave `stream` out.", 400, param="stream"
            )
        else:
            body = stored.response
        data = msgspec.json.encode(body)
        del body, stored
        if self._sending + len(data) > self._limits.total_bytes:
            raise MeshError("out_of_buffers", "Too many stored answers are read at once.", "Try again.", 503, 1.0)
        head = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(data))]
        self._sending += len(data)
        try:
            await reply.start(200, [*head, *headers])
            await reply.end(data if request.method != "HEAD" else b"")
        finally:
            self._sending -= len(data)

    async def _find(self, owner: str, name: str) -> Stored | None:
        """An answer by its id; it counts as used now."""
        data = await self._bytes(owner, name)
        return None if data is None else self._decoded(name, data)

    async def _bytes(self, owner: str, name: str, *, use: bool = True) -> bytes | None:
        if self._directory is None or not _ID.fullmatch(name):
            return None
        key = (_folder(owner), name)
        data = self._unwritten.get(key)
        if data is None:
            async with self._disk:
                data = await asyncio.to_thread(self._read, key, use=use)
        return data

    def _decoded(self, name: str, data: bytes) -> Stored | None:
        try:
            return msgspec.json.decode(data, type=Stored)
        except UNREADABLE:
            _log.warning("a stored response is damaged", id=name)
            return None

    async def _conversation(self, owner: str, last: str, circles: list[Circle]) -> list[Any]:
        """All items of a conversation up to an answer, its own included. Adds the circles of its turns."""
        turns: list[list[Any]] = []
        read: set[str] = set()
        size, name = 0, last
        while name and len(turns) < _MOST_TURNS and name not in read:
            data = await self._bytes(owner, name)
            size += len(data or b"")
            if size > self._limits.conversation_bytes:
                raise MeshError(
                    "conversation_too_large",
                    f"The conversation has more than {self._limits.conversation_bytes >> 20} MiB.",
                    "Begin a new one, or send what matters of it as `input`.",
                    413,
                    param="previous_response_id",
                )
            stored = None if data is None else self._decoded(name, data)
            if stored is None:
                raise _missing(name, 400, "previous_response_id", kept=self._directory is not None)
            read.add(name)
            circles.append(stored.circle)
            turns.append([*stored.input, *items(stored.response.get("output"))])
            name = stored.previous
        return [item for turn in reversed(turns) for item in turn]

    async def _items(self, owner: str, wanted: set[str], circles: list[Circle]) -> dict[str, Json]:
        """Items of stored answers by their ids: what `item_reference` refers to. Adds the circles of these answers."""
        found: dict[str, Json] = {}
        folder = _folder(owner)
        marks = {msgspec.json.encode(one) for one in wanted}
        unwritten = [name for one, name in reversed(self._unwritten) if one == folder]
        async with self._disk:
            names = await asyncio.to_thread(self._names, folder)
        for name in (*unwritten, *names):
            if found.keys() >= wanted:
                break
            # Most answers have none of the items: they are not decoded, and do not count as used.
            data = await self._bytes(owner, name, use=False)
            if data is None or marks.isdisjoint(await asyncio.to_thread(_ITEM_ID.findall, data)):
                continue
            stored = await self._find(owner, name)
            if stored is None:
                continue
            for item in map(mapping, [*stored.input, *items(stored.response.get("output"))]):
                if item.get("id") in wanted and text(item["id"]) not in found:
                    found[text(item["id"])] = item
                    circles.append(stored.circle)
        if missing := wanted - found.keys():
            raise MeshError(
                "item_not_found",
                f"The item `{min(missing)}` is not kept here.",
                "Send the item itself.",
                400,
                param="input",
            )
        return found

    def _keep(self, key: Name, stored: Stored) -> None:
        """Keep an answer; it is written by a job."""
        data = msgspec.json.encode(stored)
        if len(data) > self._limits.each_bytes or not _ID.fullmatch(key[1]) or key in self._unwritten:
            _log.info("response not stored", id=key[1][:100], bytes=len(data))
            return
        self._unwritten[key] = data
        self._scope.spawn(self.write(), "write")

    async def write(self) -> None:
        """Write what is not written yet."""
        async with self._disk:
            while self._unwritten:
                key, data = next(iter(self._unwritten.items()))
                try:
                    await asyncio.to_thread(self._save, key, data)
                except OSError as error:
                    _log.warning("response not stored", id=key[1], reason=str(error))
                if self._unwritten.get(key) is data:
                    del self._unwritten[key]

    async def _delete(self, key: Name) -> None:
        self._unwritten.pop(key, None)
        async with self._disk:
            await asyncio.to_thread(self._remove, key)

    # What follows runs in a thread, one call at a time.

    def _index(self) -> OrderedDict[Name, int]:
        """Sizes of all files, least recently used first."""
        if self._sizes is None:
            found: list[tuple[float, Name, int]] = []
            for path in self._root.glob("*/resp_*.json"):
                facts = path.stat()
                found.append((facts.st_mtime, (path.parent.name, path.stem), facts.st_size))
            self._sizes = OrderedDict((key, size) for _, key, size in sorted(found))
            self._bound()
        return self._sizes

    @property
    def _root(self) -> Path:
        assert self._directory is not None  # noqa: S101 - nothing is asked of the disk without one
        return self._directory

    def _path(self, key: Name) -> Path:
        return self._root / key[0] / f"{key[1]}.json"

    def _names(self, folder: str) -> list[str]:
        """Ids of a folder's answers on the disk, latest first."""
        return [name for owner, name in reversed(self._index()) if owner == folder] if self._directory else []

    def _read(self, key: Name, *, use: bool = True) -> bytes | None:
        sizes = self._index()
        if key not in sizes:
            return None
        path = self._path(key)
        try:
            if self._now() - path.stat().st_mtime > self._limits.seconds:
                self._remove(key)
                return None
            data = path.read_bytes()
            if use:
                self._use(path)
        except FileNotFoundError:
            sizes.pop(key, None)
            return None
        if use:
            sizes.move_to_end(key)
        return data

    def _save(self, key: Name, data: bytes) -> None:
        sizes = self._index()
        if key in sizes:
            # The engine names its answers, and another node's may give the name of an earlier one.
            _log.warning("response not stored: another one has its id", id=key[1])
            return
        folder = self._path(key).parent
        for directory in (self._root, folder):
            directory.mkdir(mode=0o700, exist_ok=True)
        write_atomic(self._path(key), data)
        self._use(self._path(key))
        sizes[key] = len(data)
        sizes.move_to_end(key)
        self._bound()

    def _use(self, path: Path) -> None:
        os.utime(path, (self._now(), self._now()))

    def _bound(self) -> None:
        """Remove what is too old, and the least recently used beyond the limits, of the key that has the most."""
        sizes, limits = self._sizes or OrderedDict(), self._limits
        while sizes and self._is_old(next(iter(sizes))):
            self._remove(next(iter(sizes)))
        counts, totals = Counter(folder for folder, _ in sizes), Counter[str]()
        for (folder, _), size in sizes.items():
            totals[folder] += size
        while (many := len(sizes) > limits.count) or totals.total() > limits.total_bytes:
            [(greedy, _)] = (counts if many else totals).most_common(1)
            key = next(one for one in sizes if one[0] == greedy)
            counts[greedy] -= 1
            totals[greedy] -= sizes[key]
            self._remove(key)

    def _is_old(self, key: Name) -> bool:
        try:
            return self._now() - self._path(key).stat().st_mtime > self._limits.seconds
        except FileNotFoundError:
            return True

    def _remove(self, key: Name) -> None:
        path = self._path(key)
        path.unlink(missing_ok=True)
        (self._sizes or {}).pop(key, None)
        with suppress(OSError):
            path.parent.rmdir()


def _folder(owner: str) -> str:
    return owner[:32] or _NO_KEY


def _text_field(fields: Fields, name: str) -> str:
    raw = fields.get(name)
    return text(msgspec.json.decode(raw)) if raw is not None else ""


def _references(given: bytes) -> set[str]:
    asked = map(mapping, items(msgspec.json.decode(given)))
    return {text(item.get("id")) for item in asked if item.get("type") == "item_reference"}


def _missing(name: str, status: int, param: str | None, *, kept: bool) -> MeshError:
    code = "previous_response_not_found" if param else "response_not_found"
    if not kept:
        hint = "This node keeps no answers (--no-store): send the whole conversation."
    else:
        hint = (
            "It was not stored, was deleted, has expired, or belongs to another API key: send the whole conversation."
        )
    return MeshError(code, f"The response `{name[:100]}` is not kept here.", hint, status, param=param)


def _page(listed: list[Any], asked: Mapping[str, list[str]]) -> Json:
    """Items of a request as a list; the latest first, unless `order` is `asc`."""
    named = [mapping(item) for item in listed]
    if asked.get("order") != ["asc"]:
        named.reverse()
    names = [text(item.get("id")) for item in named]
    limit = next((int(one) for one in asked.get("limit", []) if one.isdecimal() and len(one) < 9), _USUALLY_LISTED)
    limit = min(max(limit, 1), _MOST_LISTED)
    start = names.index(after) + 1 if (after := asked.get("after", [""])[0]) in names else 0
    page = named[start : start + limit]
    return {
        "object": "list",
        "data": page,
        "first_id": names[start] if page else None,
        "last_id": names[start + len(page) - 1] if page else None,
        "has_more": start + len(page) < len(named),
    }
