"""Time spans, and how invites are listed."""

import time

import click
import msgspec
import pytest
from tests.unit.cli.test_status import BASE

from mesh_llm.cli.invite import _line, invite_lines, means_invite
from mesh_llm.cli.options import Duration
from mesh_llm.console.status import StatusPeer
from mesh_llm.core.types.errors import MeshError
from mesh_llm.net.admission.records import InviteRecord


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30s", 30), ("15m", 900), ("12h", 43_200), ("7d", 604_800), ("2W", 1_209_600), ("1.5h", 5400)],
)
def test_spans(text: str, seconds: float) -> None:
    assert Duration().convert(text, None, None) == seconds


@pytest.mark.parametrize("text", ["", "7", "0d", "-1d", "1y", "d", "1d2h", "nan", "1e9d"])
def test_what_is_no_span(text: str) -> None:
    with pytest.raises(click.BadParameter, match="30m, 12h or 7d"):
        Duration().convert(text, None, None)


def test_states_of_an_invite() -> None:
    soon = time.time() + 90_100
    assert _line(InviteRecord(id="a", scope="serve", created=0, expires=soon)) == "a  serve   expires in 1d 1h"
    assert _line(InviteRecord(id="a", scope="client", created=0, expires=1)) == "a  client  expired"
    assert _line(InviteRecord(id="a", scope="split", created=0, expires=soon, revoked=True)) == "a  split   revoked"
    assert _line(InviteRecord(id="a", scope="serve", created=0, expires=soon, uses_left=2)).endswith(", 2 uses left")


@pytest.mark.parametrize(
    ("scope", "own", "command", "said"),
    [
        ("split", "split", "  mesh-llm --join mesh2x", "To give less: mesh-llm invite create --scope serve"),
        ("serve", "split", "  mesh-llm --join mesh2x", "To give more: mesh-llm invite create --scope split"),
        ("client", "split", "  mesh-llm --client --join mesh2x", "To give more: mesh-llm invite create --scope split"),
        ("serve", "serve", "  mesh-llm --join mesh2x", "This node was admitted with scope serve itself"),
    ],
)
def test_beside_the_token_stands_its_scope_and_how_to_give_another(
    scope: str, own: str, command: str, said: str
) -> None:
    lines = invite_lines("mesh2x", scope, own)
    assert lines[1] == command
    assert lines[2].startswith(f"Its scope is {scope}: it may ")
    assert lines[3].startswith(said)


def test_what_is_revoked_is_an_invite_or_a_member_and_never_guessed() -> None:
    issued = [InviteRecord(id=key + "0" * 14, scope="serve", created=0, expires=1) for key in ("ab", "cd", "ce")]
    peers = tuple(
        StatusPeer(node_id=key * 64, name=name, role="worker", state="alive")
        for key, name in (("1", "bob"), ("2", "lap"), ("3", "lap"), ("4", "cd"))
    )
    status = msgspec.structs.replace(BASE, name="me", peers=peers)

    def meant(what: str) -> bool:
        return means_invite(what, issued, status)

    assert meant("ab")
    assert meant("AB" + "0" * 30)
    assert meant("c")
    # Several members, the node itself, and a key that nobody has: the daemon answers these.
    assert not any(map(meant, ("Bob", "1111", "lap", "lap (2222)", "ME", "7" * 64)))
    with pytest.raises(MeshError, match=r"'cd' fits an invite and a member: invite cd0+, member cd \(4{10}\)"):
        meant("cd")
    with pytest.raises(MeshError, match="No invite of this node and no member of the mesh is called 'shelf'") as error:
        meant("shelf")
    assert "bob, cd, lap (2222), lap (3333)" in error.value.hint
