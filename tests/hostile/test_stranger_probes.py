"""A stranger that looks for what others asked: by what an engine says of the prompts that it has in its slots."""

import asyncio
import json
from typing import Any

import pytest
from tests.integration.engine_fixtures import Model, embedded, model, small_spec, started, supervisor
from tests.support.api_harness import ELSEWHERE, THERE, FakeEngines, local, peer_streams, route, running_api

from mesh_llm.api.transcript import Transcript
from mesh_llm.api.types import ApiConfig, Usage
from mesh_llm.core.trust.strangers import NO_LIMITS
from mesh_llm.engine.sources.embedded.source import EmbeddedSource
from mesh_llm.engine.supervisor import Supervisor

__all__ = ["embedded", "model", "supervisor"]

SECRET = "the mesh has a node that says what it was asked and what it is to say of it to all who ask " * 2
WAYS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 2},
    "/v1/completions": {"prompt": SECRET, "max_tokens": 2},
    "/completion": {"prompt": SECRET, "n_predict": 2},
    "/v1/messages": {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 2},
    "/v1/responses": {"input": SECRET, "max_output_tokens": 2},
}


async def asked(address: str, path: str, fields: dict[str, Any]) -> Usage:
    """What an engine says that it counted for another node's request."""
    body = json.dumps(fields).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: mesh\r\nx-mesh-llm-model: small\r\ncontent-length: {len(body)}\r\n\r\n"
    name, _, port = address.partition(":")
    reader, writer = await asyncio.open_connection(name, int(port))
    writer.write(head.encode() + body)
    answer = await reader.read()
    writer.close()
    assert b" 200 " in answer[:20], answer
    transcript = Transcript()
    transcript.add(answer)
    return transcript.usage()


async def test_another_node_does_not_learn_where_a_models_file_is(
    supervisor: Supervisor, embedded: EmbeddedSource, model: Model
) -> None:
    """The path has the user's name in it."""
    engine = await started(supervisor, embedded, small_spec(model("small"), slots=1), "small")
    assert engine.info is not None
    async with running_api([route("small", local(engine.info.address))]) as api:
        api.server.use_engines(FakeEngines(key=engine.info.key))
        async with peer_streams(api.server, ELSEWHERE) as member:
            name, _, port = member.partition(":")
            reader, writer = await asyncio.open_connection(name, int(port))
            writer.write(b"GET /props HTTP/1.1\r\nhost: mesh\r\nx-mesh-llm-model: small\r\n\r\n")
            answer = await reader.read()
            writer.close()
    assert b'"chat_template"' in answer
    assert model("small").name.encode() in answer
    assert str(model("small").parent).encode() not in answer


@pytest.mark.parametrize("path", WAYS)
@pytest.mark.parametrize("wish", [{}, {"cache_prompt": True}, {"stream": True}])
async def test_a_stranger_cannot_find_out_what_others_asked(
    supervisor: Supervisor, embedded: EmbeddedSource, model: Model, path: str, wish: dict[str, Any]
) -> None:
    """It could guess a prompt token by token: an engine says how much of one it has read before."""
    wish = wish | ({"stream_options": {"include_usage": True}} if "stream" in wish else {})
    engine = await started(supervisor, embedded, small_spec(model("small"), slots=1), "small")
    assert engine.info is not None
    config = ApiConfig(port=0, stranger_limits=NO_LIMITS)
    async with running_api([route("small", local(engine.info.address))], config=config) as api:
        api.server.use_engines(FakeEngines(key=engine.info.key))
        api.server.strangers.source_of = lambda node: "192.0.2.7" if node == THERE else None
        async with peer_streams(api.server, ELSEWHERE) as member, peer_streams(api.server, THERE) as stranger:
            first = await asked(member, path, WAYS[path])
            assert (first.cached, first.prompt > 30) == (0, True)
            # A member's next turn is quick.
            assert (await asked(member, path, WAYS[path])).cached > 0
            probed = await asked(stranger, path, WAYS[path] | wish)
            assert (probed.cached, probed.prompt) == (0, first.prompt)
