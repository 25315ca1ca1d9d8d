"""The UDP port outlives a restart, so that old invites go on working; a stale one is answered with what to do."""

import asyncio
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tests.integration.net_nodes import TIMEOUT, MeshNode, join, running

from mesh_llm.core.types.errors import MeshError
from mesh_llm.daemon.mesh import port_notices

SOON: dict[str, Any] = {"dial_timeout": 1.0}


def port_of(node: MeshNode) -> int:
    return node.net.endpoint.ports[0]


async def free(port: int) -> None:
    """Wait until a closed endpoint has let go of its socket: that takes it a moment."""
    async with asyncio.timeout(TIMEOUT):
        while True:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return
            await asyncio.sleep(0)


async def refused(joiner: MeshNode) -> MeshError:
    """The first problem of a node that nobody admits."""
    async with running(joiner):
        report = await joiner.net.joiner.join()
    assert report.admitted is None
    return report.problems[0]


async def test_an_old_invite_reaches_a_restarted_node(tmp_path: Path) -> None:
    first = MeshNode(home=tmp_path / "a")
    async with running(first):
        token, port = first.net.invite_book.token(), port_of(first)
    again = MeshNode(home=tmp_path / "a")
    joiner = MeshNode(token)
    async with running(again, joiner):
        assert port_of(again) == port
        assert again.net.lost_port == 0
        assert (await joiner.net.joiner.join()).admitted == again.net.node_id


async def test_a_port_that_another_program_has_now_is_given_up(tmp_path: Path) -> None:
    first = MeshNode(home=tmp_path / "a")
    async with running(first):
        port = port_of(first)
    await free(port)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("127.0.0.1", port))
        again = MeshNode(home=tmp_path / "a")
        async with running(again):
            assert again.net.lost_port == port
            moved = port_of(again)
            assert moved != port
    # The new one is kept from here on.
    third = MeshNode(home=tmp_path / "a")
    async with running(third):
        assert (port_of(third), third.net.lost_port) == (moved, 0)


async def test_the_users_port_wins_and_is_kept(tmp_path: Path) -> None:
    first = MeshNode(home=tmp_path / "a")
    async with running(first):
        before = port_of(first)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        wanted: int = probe.getsockname()[1]
    assert wanted != before
    for port in (wanted, 0):
        await free(wanted)
        node = MeshNode(home=tmp_path / "a", port=port)
        async with running(node):
            assert (port_of(node), node.net.lost_port) == (wanted, 0)


async def test_a_chosen_port_whose_tcp_half_is_taken_is_said(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port: int = other.getsockname()[1]
        chosen = MeshNode(port=port)
        async with running(chosen):
            (notice,) = port_notices(chosen.net)
            assert f"TCP port {port} of --quic-port" in notice.text
    await free(port)
    again, unasked = MeshNode(port=port), MeshNode()
    async with running(again, unasked):
        assert [*port_notices(again.net), *port_notices(unasked.net)] == []


async def test_a_node_that_leaves_nothing_behind_keeps_no_port(tmp_path: Path) -> None:
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "quic-ports").write_text("[1, -5]")
    async with running(MeshNode(home=tmp_path / "damaged"), MeshNode()):
        assert not (tmp_path / "quic-ports").exists()


async def test_an_invite_whose_machine_runs_no_node_any_more() -> None:
    first = MeshNode()
    async with running(first):
        token, port = first.net.invite_book.token(), port_of(first)
    error = await refused(MeshNode(token, **SOON))
    assert error.message.startswith(f"No node of the mesh can be reached: nothing listens at 127.0.0.1:{port}")
    assert "Start mesh-llm on that machine" in error.hint
    assert "type `mesh-llm status` there" in error.hint


async def test_an_invite_whose_address_has_another_node_now() -> None:
    first = MeshNode()
    async with running(first):
        token, port = first.net.invite_book.token(), port_of(first)
    await free(port)
    other = MeshNode(port=port)
    async with running(other):
        error = await refused(MeshNode(token))
    assert f"another node, with another key, answers at 127.0.0.1:{port}" in error.message
    assert "type `mesh-llm status` there, and join with the token that it shows" in error.hint


async def test_an_invite_whose_mesh_is_gone() -> None:
    first = MeshNode()
    async with running(first):
        token, port = first.net.invite_book.token(), port_of(first)
    await free(port)
    founded_again = MeshNode(key=first.key, port=port)
    async with running(founded_again):
        error = await refused(MeshNode(token))
    assert error.code == "invite_other_mesh"
    assert "type `mesh-llm status` on the other machine, and join with its token" in error.hint


async def test_an_address_that_answers_nothing() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mute:
        mute.bind(("127.0.0.1", 0))
        port: int = mute.getsockname()[1]
        first = MeshNode()
        async with running(first):
            token = first.net.invite_book.token()
            lost = port_of(first)
        joiner = MeshNode(token, **SOON)
        addresses = joiner.net.connections.addresses
        (contact,) = joiner.net.joiner.contacts()
        addresses.learn(contact.node, (f"127.0.0.1:{port}",), "")
        error = await refused(joiner)
    assert f"127.0.0.1:{port}: no answer within 1 s" in error.message
    assert str(lost) not in error.message
    assert "Check that the other machine is on" in error.hint


@pytest.mark.parametrize("how", ["expired", "revoked", "used up"])
async def test_an_invite_that_admits_nobody_any_more_says_what_to_type(how: str) -> None:
    first = MeshNode()
    async with running(first):
        record = first.net.create_invite("serve", 600, 1 if how == "used up" else None)
        if how == "expired":
            first.offset = 700
        elif how == "revoked":
            first.net.revoke_invite(record.id)
        else:
            one = MeshNode(record.token)
            async with running(one):
                await join(one)
        error = await refused(MeshNode(record.token))
    assert error.code == {"expired": "invite_expired", "revoked": "invite_revoked"}.get(how, "invite_uses_exhausted")
    assert "`mesh-llm invite create`" in error.hint
