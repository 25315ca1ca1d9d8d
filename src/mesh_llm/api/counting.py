"""Counts the tokens of an answer so far, as the engine counts them that is to go on with it."""

import asyncio

import msgspec

from mesh_llm.api.upstream import Upstream, UpstreamRequest
from mesh_llm.core.routing import Target
from mesh_llm.wire.continuing import Story

_SECONDS = 10.0
_MOST_BYTES = 4 * 1024 * 1024

Headers = tuple[tuple[bytes, bytes], ...]


class _Tokens(msgspec.Struct):
    tokens: list[msgspec.Raw]


class _Prompt(msgspec.Struct):
    prompt: str


async def counted(upstream: Upstream, target: Target, story: Story, headers: Headers) -> int | None:
    """How many tokens the answer so far is; None where the target does not say in time.

    Marks that open and close reasoning are tokens as well, but no client is told them: the engine's own template shows
    where they stand. Where it does not, they go uncounted.

    Raises:
        TargetLostError: the target was lost.
    """
    try:
        async with asyncio.timeout(_SECONDS):
            total = 0
            for text in await _texts(upstream, target, story, headers):
                body = msgspec.json.encode({"content": text, "parse_special": True})
                answer = await _ask(upstream, target, UpstreamRequest("POST", "/tokenize", headers, body))
                total += len(msgspec.json.decode(answer, type=_Tokens).tokens)
            return total
    except (TimeoutError, msgspec.MsgspecError, UnicodeDecodeError):
        return None


async def _texts(upstream: Upstream, target: Target, story: Story, headers: Headers) -> list[str]:
    probes = story.probes
    if probes is None:
        return story.texts
    try:
        before, after = [
            msgspec.json.decode(
                await _ask(upstream, target, UpstreamRequest("POST", "/apply-template", headers, probe)), type=_Prompt
            ).prompt
            for probe in probes
        ]
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return story.texts
    if not after.startswith(before) or not after.endswith(story.texts[-1]):
        return story.texts
    return [after.removeprefix(before)]


async def _ask(upstream: Upstream, target: Target, asked: UpstreamRequest) -> bytes:
    response = await upstream.send(target, asked)
    try:
        body = b""
        while not (response.complete and body) and len(body) < _MOST_BYTES:
            piece = await response.read()
            if not piece:
                break
            body += piece
        return body
    finally:
        response.close()
