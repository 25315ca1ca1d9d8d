"""Asks a running engine the few things that tell whether, and how, it can be used."""

import asyncio
from dataclasses import dataclass

import msgspec

from mesh_llm.runtime.tcp import open_address

_MAX_ANSWER = 4 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class HttpAnswer:
    """Status and body of one GET."""

    status: int
    body: bytes


@dataclass(frozen=True, kw_only=True)
class ServerProperties:
    """What a llama-server says of itself: tokens per slot, slots, its build."""

    context: int
    slots: int
    build: str


class _GenerationSettings(msgspec.Struct):
    n_ctx: int = 0


class _Props(msgspec.Struct):
    default_generation_settings: _GenerationSettings = msgspec.field(default_factory=_GenerationSettings)
    total_slots: int = 0
    build_info: str = ""


async def get(address: str, path: str, timeout: float = 5.0, key: str = "") -> HttpAnswer | None:
    """One GET on a server at `unix:PATH` or `host:port`, with its key, at most 4 MiB.

    None when there is no whole HTTP answer within `timeout` seconds.
    """
    authorization = f"Authorization: Bearer {key}\r\n" if key else ""
    request = f"GET {path} HTTP/1.0\r\nHost: localhost\r\n{authorization}Connection: close\r\n\r\n"
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await open_address(address)
            try:
                writer.write(request.encode())
                answer = await _read_all(reader)
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return None
    head, separator, body = answer.partition(b"\r\n\r\n")
    words = head.split(b"\r\n", 1)[0].split()
    if not separator or len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
        return None
    return HttpAnswer(status=int(words[1]), body=body)


async def _read_all(reader: asyncio.StreamReader) -> bytes:
    parts = bytearray()
    while len(parts) < _MAX_ANSWER and (data := await reader.read(65536)):
        parts += data
    return bytes(parts)


async def is_healthy(address: str, timeout: float = 2.0) -> bool:
    """True when `/health` says 200: loaded and answering. 503 means loading."""
    answer = await get(address, "/health", timeout)
    return answer is not None and answer.status == 200


async def properties(address: str, key: str = "") -> ServerProperties | None:
    """What `/props` says; None where it says nothing that can be used."""
    answer = await get(address, "/props", key=key)
    if answer is None or answer.status != 200:
        return None
    try:
        props = msgspec.json.decode(answer.body, type=_Props)
    except msgspec.MsgspecError:
        return None
    return ServerProperties(
        context=props.default_generation_settings.n_ctx, slots=props.total_slots, build=props.build_info
    )
