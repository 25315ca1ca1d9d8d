"""Where a node goes that is alone, with larger meshes of its name beside it: nowhere, unless its user said so."""

import asyncio
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from tests.support.postings import Poster

from mesh_llm.core.listing.content import Listing, ListingCandidate, ListingQuery, score
from mesh_llm.core.types.announcement import ListingPolicy
from mesh_llm.core.types.effects import Notice
from mesh_llm.core.types.ids import MeshId
from mesh_llm.core.types.model import Role
from mesh_llm.daemon import mesh_discovery
from mesh_llm.daemon.mesh_discovery import Candidate, MeshChoice, MeshMigration, Search, Select
from mesh_llm.daemon.settings import DiscoverySettings, Settings
from mesh_llm.wire.mesh.invites import Invite, parse_invite

OWN, FRIEND, STRANGER = (MeshId(digit * 64) for digit in "abc")
LOOKS = 12


class LoneNode:
    """What a migration sees of a node: other members at the first look, none at the later ones."""

    def __init__(self) -> None:
        self.role = Role.SERVE
        self.listing = SimpleNamespace(listing=Listing(mesh=OWN, name="Lab"))
        self.looks = 0

    @property
    def stopping(self) -> bool:
        self.looks += 1
        return self.looks > LOOKS

    @property
    def members(self) -> tuple[str, ...]:
        return ("another",) if self.looks == 1 else ()


class Trial:
    """A node of the mesh OWN, called Lab, beside two larger meshes called Lab."""

    def __init__(
        self,
        tmp_path: Path,
        *,
        founder: bool = True,
        held: tuple[MeshId, ...] = (),
        refused: tuple[MeshId, ...] = (),
        listed: tuple[MeshId, ...] = (STRANGER, FRIEND),
        **discovery: Any,
    ) -> None:
        self.moves: list[MeshChoice] = []
        self.dialled: set[MeshId] = set()
        self.rejoined: list[object] = []
        self._listed = listed
        self._net: Any = SimpleNamespace(
            mesh_id=OWN,
            node_id="f" * 64,
            founder=founder,
            scope="serve",
            stores=SimpleNamespace(holds=held.__contains__),
            rejoin_by=self.rejoined.append,
        )
        settings = DiscoverySettings(period=0.004, publicity=ListingPolicy(name="Lab"), **discovery)
        self._life = MeshChoice(settings=Settings(home=tmp_path, models=("tiny",), discovery=settings), refused=refused)

    async def search_for(self, _: Settings, select: Select | None = None) -> Search:
        listings = [Listing(mesh=mesh, name="Lab", nodes=9) for mesh in self._listed]
        chosen = listings if select is None else [*select(listings)]
        self.dialled |= {listing.mesh for listing in chosen}
        return Search(
            candidates=tuple(map(candidate, chosen)), seen=2, unreachable=0, answered=("a",), failed={}, refused=0
        )

    async def run(self, monkeypatch: pytest.MonkeyPatch) -> list[MeshId]:
        """Where it moves."""
        monkeypatch.setattr(mesh_discovery, "search_for", self.search_for)
        node: Any = LoneNode()
        notices: Any = SimpleNamespace(add=self._noticed)
        async with asyncio.timeout(20):
            await MeshMigration(node, self._net, self._life, notices, lambda: False, self.moves.append).run()
        return [mesh for life in self.moves for mesh in (OWN, *self._listed) if life.settings.join == (token(mesh),)]

    def _noticed(self, notice: Notice) -> None:
        assert notice.code == "mesh_moved"


@cache
def invites() -> dict[MeshId, str]:
    """A readable invite for each mesh; of which mesh it really is does not matter here."""
    return {mesh: Poster("Lab").posting().token for mesh in (OWN, FRIEND, STRANGER)}


def token(mesh: MeshId) -> str:
    return invites()[mesh]


def candidate(listing: Listing) -> Candidate:
    scored = score(ListingCandidate(listing=listing), ListingQuery())
    return Candidate(
        listing=listing,
        token=token(listing.mesh),
        rtt_ms=1.0,
        score=scored,
        author="b" * 64,
        expires=0.0,
        relays=("a",),
    )


async def test_a_larger_mesh_of_the_same_name_takes_nobody_in_and_is_not_even_dialled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for held in ((), (FRIEND,)):
        trial = Trial(tmp_path, held=held)
        assert await trial.run(monkeypatch) == []
        assert trial.dialled == set()


async def test_merge_goes_only_to_the_mesh_of_the_key_or_to_one_that_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for trial in (
        Trial(tmp_path, merge_keys=(FRIEND[:16],)),
        Trial(tmp_path, merge_held=True, held=(FRIEND,)),
    ):
        assert await trial.run(monkeypatch) == [FRIEND]
        assert trial.dialled == {FRIEND}
        assert trial.moves[0].own == OWN
    for trial in (
        Trial(tmp_path, merge_held=True),
        Trial(tmp_path, merge_keys=("d" * 16,)),
        Trial(tmp_path, merge_keys=(OWN[:16],)),
        Trial(tmp_path, merge_keys=(FRIEND[:16],), held=(STRANGER,), listed=(STRANGER,)),
        Trial(tmp_path, merge_keys=(FRIEND[:16],), refused=(FRIEND,)),
    ):
        assert await trial.run(monkeypatch) == []
        assert trial.dialled == set()


async def test_who_merged_and_is_left_alone_looks_for_that_mesh_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = Trial(tmp_path, founder=False, found=True)
    assert await trial.run(monkeypatch) == []
    assert trial.dialled == set()
    trial = Trial(tmp_path, founder=False, found=True, listed=(OWN, STRANGER))
    assert await trial.run(monkeypatch) == []
    assert trial.dialled == {OWN}
    assert trial.rejoined


async def test_auto_goes_to_another_mesh_but_never_with_a_mesh_that_was_founded_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await Trial(tmp_path, founder=False, auto=True).run(monkeypatch) == [STRANGER]
    trial = Trial(tmp_path, founder=True, auto=True)
    assert await trial.run(monkeypatch) == []
    assert trial.dialled == set()


async def test_who_is_not_admitted_returns_to_its_own_mesh_and_does_not_try_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = Trial(tmp_path, merge_keys=(FRIEND[:16],))
    await trial.run(monkeypatch)
    moved = trial.moves[0]
    assert moved.settings.discovery.found
    back = moved.next()
    assert back is not None
    assert (back.settings.join, back.own, back.settings.discovery.found) == ((), OWN, False)
    invite = parse_invite(token(FRIEND))
    assert isinstance(invite, Invite)
    assert back.refused == (invite.mesh_id,)
    assert back.next() is None
    assert msgspec.structs.replace(moved, own=None).next() is None
