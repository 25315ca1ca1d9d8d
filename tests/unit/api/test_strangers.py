"""Strangers at a host, and what their own nodes make of its refusals."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
from tests.support.api_harness import (
    ELSEWHERE,
    THERE,
    Api,
    local,
    peer_streams,
    remote,
    route,
    running_api,
    snapshot,
)
from tests.support.fake_upstream import Call, FakeUpstream, fake_upstream

from mesh_llm.api.strangers import read_used
from mesh_llm.api.types import ApiConfig
from mesh_llm.core.trust.strangers import CutOff, StrangerLimits, UsedToday
from mesh_llm.core.types.ids import NodeId

LIMITS = StrangerLimits(concurrent=1, tokens_per_day=20, all_concurrent=8, all_tokens_per_day=1000)
HOST = ApiConfig(port=0, resume_wait=0.0, stranger_limits=LIMITS)
ANSWER = b'{"usage":{"prompt_tokens":7,"completion_tokens":5}}'
STRANGER, FRIEND = NodeId("5" * 64), NodeId("f" * 64)


async def answer(call: Call) -> None:
    await call.respond(ANSWER, kind=b"application/json")


def know_strangers(host: Api, *strangers: NodeId, source: str = "192.0.2.7") -> list[tuple[CutOff, str]]:
    """All these come from one address. Returns who is cut off, and why, as it happens."""
    cut: list[tuple[CutOff, str]] = []
    host.server.strangers.source_of = lambda node: source if node in strangers else None
    host.server.strangers.cut_off = lambda who, why: cut.append((who, why))
    return cut


@asynccontextmanager
async def asking(host: Api, peer: NodeId) -> AsyncGenerator[Api]:
    """The API of another node, which sends its requests to the host."""
    async with peer_streams(host.server, peer) as address, running_api() as api:
        api.routes.current = snapshot(route("tiny", remote(THERE)), default="tiny")
        api.mesh.nodes = {THERE: address}
        yield api


@asynccontextmanager
async def serving(engine: FakeUpstream, config: ApiConfig = HOST) -> AsyncGenerator[Api]:
    async with running_api([route("tiny", local(engine.address))], config=config) as host:
        yield host


async def test_a_stranger_is_cut_at_its_tokens_and_a_new_key_at_its_address_too_but_nobody_else():
    async with (
        fake_upstream(answer) as engine,
        serving(engine) as host,
        asking(host, STRANGER) as stranger,
        asking(host, NodeId("6" * 64)) as same_address,
        asking(host, FRIEND) as friend,
    ):
        know_strangers(host, STRANGER, NodeId("6" * 64))
        for _ in range(2):
            assert (await stranger.post()).status_code == 200
        refused = await stranger.post()
        assert refused.status_code == 429
        error = refused.json()["error"]
        assert error["code"] == "stranger_tokens_per_day"
        assert "`tiny`" in error["message"]
        assert "came by the mesh's public listing" in error["message"]
        assert "invite by hand" in error["message"]
        assert 1 <= int(refused.headers["retry-after"]) <= 86400
        assert refused.headers["x-should-retry"] == "false"
        assert (await same_address.post()).json()["error"]["code"] == "stranger_tokens_per_day"
        for _ in range(5):
            assert (await friend.post()).status_code == 200
        used = host.server.summary().strangers
        assert (used.nodes, used.tokens_today, used.running) == (1, 24, 0)
        assert [(one.node_id, one.tokens_today) for one in used.most] == [(STRANGER, 24)]
        assert used.refused_today == 2
        # A host that refused is not asked again for a while, and is not taken for broken.
        calls = len(engine.calls)
        assert (await stranger.post()).status_code == 429
        assert host.server.summary().strangers.refused_today == 2
        assert len(engine.calls) == calls
        assert stranger.traffic.dead == []


async def test_a_strangers_node_goes_to_another_host_where_its_quota_is_used_up():
    async with (
        fake_upstream(answer) as engine,
        fake_upstream(answer) as other,
        serving(engine) as host,
        serving(other) as second,
        asking(host, STRANGER) as stranger,
        peer_streams(second.server, STRANGER) as address,
    ):
        know_strangers(host, STRANGER)
        stranger.mesh.nodes[ELSEWHERE] = address
        stranger.routes.current = snapshot(route("tiny", remote(THERE), remote(ELSEWHERE)), default="tiny")
        for number in range(8):
            assert (await stranger.post(b'{"seed":%d}' % number)).status_code == 200
        assert len(engine.calls) <= 2
        assert len(engine.calls) + len(other.calls) == 8
        assert stranger.traffic.dead == []


async def test_a_strangers_requests_at_once_are_limited_and_one_that_leaves_counts():
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slow(call: Call) -> None:
        begun.set()
        await go_on.wait()
        await call.respond(ANSWER, kind=b"application/json")

    async with (
        fake_upstream(slow) as engine,
        serving(engine) as host,
        asking(host, STRANGER) as stranger,
        asyncio.TaskGroup() as group,
    ):
        know_strangers(host, STRANGER)
        first = group.create_task(stranger.post(b'{"messages":"' + b"x" * 400 + b'"}'))
        await begun.wait()
        assert host.server.summary().strangers.running == 1
        refused = await stranger.post()
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "stranger_concurrent")
        assert int(refused.headers["retry-after"]) <= 3
        first.cancel()
        await host.traffic.all_ended(1)
        go_on.set()
        # A member's request ends after it: by then the first has been counted.
        async with asking(host, FRIEND) as friend:
            assert (await friend.post()).status_code == 200
        used = host.server.summary().strangers
        assert used.running == 0
        # It was read, though no byte of an answer came: about four bytes a token.
        assert used.tokens_today >= 100


async def test_what_was_used_survives_a_restart_and_a_damaged_file_is_no_obstacle(tmp_path: Path):
    file = tmp_path / "strangers.json"
    config = msgspec.structs.replace(HOST, stranger_file=file)
    for expected in (200, 200, 429):
        async with (
            fake_upstream(answer) as engine,
            serving(engine, config) as host,
            asking(host, STRANGER) as stranger,
        ):
            know_strangers(host, STRANGER)
            assert (await stranger.post()).status_code == expected
    assert read_used(file).total == 24
    file.write_bytes(b"\x00{")
    async with fake_upstream(answer) as engine, serving(engine, config) as host, asking(host, STRANGER) as stranger:
        know_strangers(host, STRANGER)
        assert (await stranger.post()).status_code == 200
    assert read_used(file).total == 12
    assert read_used(tmp_path / "none") == UsedToday()


async def test_limits_change_while_the_node_runs():
    async with fake_upstream(answer) as engine, serving(engine) as host, asking(host, STRANGER) as stranger:
        know_strangers(host, STRANGER)
        for _ in range(2):
            await stranger.post()
        host.server.strangers.use_limits(StrangerLimits(tokens_per_day=100))
        assert (await stranger.post()).status_code == 200


async def raw(address: str, data: bytes) -> bytes:
    host, _, port = address.partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(data)
    answered = await reader.read()
    writer.close()
    return answered


def http(body: bytes, path: bytes = b"/v1/chat/completions") -> bytes:
    head = b"POST %b HTTP/1.1\r\nhost: mesh\r\nx-mesh-llm-model: tiny\r\n" % path
    return head + b"content-length: %d\r\n\r\n" % len(body) + body


async def test_a_stranger_that_sends_malformed_requests_is_cut_off_and_a_member_is_not():
    for data in (b"NO SUCH THING\r\n\r\n", http(b"{not json")):
        async with (
            fake_upstream(answer) as engine,
            serving(engine) as host,
            peer_streams(host.server, STRANGER) as bad,
            peer_streams(host.server, FRIEND) as member,
        ):
            cut = know_strangers(host, STRANGER)
            for _ in range(12):
                assert b" 400 " in (await raw(member, data)).partition(b"\r\n")[0] + b" "
            assert cut == []
            # What was wrong fades a little meanwhile.
            for _ in range(11):
                assert b" 400 " in (await raw(bad, data)).partition(b"\r\n")[0] + b" "
            assert cut == [(CutOff(who=STRANGER, source=False, seconds=300.0), "it sent malformed requests")]
            refused = await raw(bad, http(b"{}"))
            assert refused.startswith(b"HTTP/1.1 429 ")
            assert b"x-mesh-llm-error: stranger_cut_off" in refused
            assert engine.calls == []
            assert (await raw(member, http(b"{}"))).startswith(b"HTTP/1.1 200 ")


async def test_a_flood_of_refused_requests_cuts_the_key_and_many_keys_cut_their_address():
    keys = [NodeId(f"{number:064x}") for number in range(1, 5)]
    async with fake_upstream(answer) as engine, serving(engine) as host:
        cut = know_strangers(host, *keys)
        for key in keys:
            async with peer_streams(host.server, key) as address:
                for _ in range(125):
                    await raw(address, http(b"{}"))
        whom = [one.who for one, _ in cut]
        assert whom[:2] == keys[:2]
        assert [one.who for one, _ in cut if one.source] == ["192.0.2.7"]
        assert keys[3] not in whom
        # The address had its tokens of the day once, not once for each key.
        assert len(engine.calls) == 2
