from pathlib import Path

import pytest

from mesh_llm.core.listing.content import Listing, ListingCandidate, ListingQuery, score
from mesh_llm.core.types.announcement import ListingPolicy
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import MeshId
from mesh_llm.daemon import mesh_discovery as auto_join
from mesh_llm.daemon.mesh_discovery import Candidate, MeshChoice, Search, discover_mesh, wish_for
from mesh_llm.daemon.published_state import Progress, Stage
from mesh_llm.daemon.settings import DiscoverySettings, Settings
from mesh_llm.discovery.nostr.consent import consent_text


def candidate(name: str) -> Candidate:
    listing = Listing(mesh=MeshId("a" * 64), name=name)
    scored = score(ListingCandidate(listing=listing), ListingQuery())
    return Candidate(
        listing=listing, token=f"mesh2{name}", rtt_ms=1.0, score=scored, author="b" * 64, expires=0.0, relays=("a",)
    )


def search(*names: str, answered: bool = True) -> Search:
    relays = ("ws://a",) if answered else ()
    failed = {} if answered else {"ws://a": "no answer"}
    found = tuple(candidate(name) for name in names)
    return Search(candidates=found, seen=len(found), unreachable=0, answered=relays, failed=failed, refused=0)


def life(
    tmp_path: Path, *, models: tuple[str, ...] = ("tiny",), client: bool = False, publish: bool = False
) -> MeshChoice:
    discovery = DiscoverySettings(auto=True, publicity=ListingPolicy() if publish else None)
    settings = Settings(home=tmp_path, models=models, client=client, discovery=discovery)
    return MeshChoice(settings=settings, searched=False)


async def found(monkeypatch: pytest.MonkeyPatch, life: MeshChoice, result: Search) -> tuple[MeshChoice, str]:
    async def search_for(settings: Settings) -> Search:
        return result

    told: list[Progress] = []
    monkeypatch.setattr(auto_join, "search_for", search_for)
    outcome = await discover_mesh(life, told.append)
    return outcome, " ".join(entry.text for entry in told if isinstance(entry, Stage))


async def test_the_best_is_joined_and_the_next_ones_are_at_hand(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    outcome, told = await found(monkeypatch, life(tmp_path), search("best", "second"))
    assert outcome.settings.join == ("mesh2best",)
    assert "joining best" in told
    second = outcome.next()
    assert second is not None
    assert (second.settings.join, second.others) == (("mesh2second",), ())
    own = second.next()
    assert own is not None
    assert own.settings.join == ()
    assert "a mesh of its own" in own.text
    assert own.next() is None


async def test_with_a_model_it_starts_its_own_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    outcome, told = await found(monkeypatch, life(tmp_path, publish=True), search())
    assert outcome.settings.join == ()
    assert "No meshes are listed" in told
    assert "Starting a mesh of its own, and listing it" in told
    _, told = await found(monkeypatch, life(tmp_path), search(answered=False))
    assert "No Nostr relay answered" in told


@pytest.mark.parametrize("client", [True, False])
async def test_without_one_there_is_nothing_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, client: bool
) -> None:
    with pytest.raises(MeshError) as none:
        await found(monkeypatch, life(tmp_path, models=(), client=client), search())
    with pytest.raises(MeshError) as silent:
        await found(monkeypatch, life(tmp_path, models=(), client=client), search(answered=False))
    assert (none.value.code, silent.value.code) == ("no_mesh_found", "no_relay")


def test_who_serves_needs_more_than_who_asks(tmp_path: Path) -> None:
    assert wish_for(life(tmp_path).settings).scope == "serve"
    assert wish_for(life(tmp_path, client=True).settings).scope == "client"


@pytest.mark.parametrize("scope", ["client", "serve", "split"])
def test_consent_names_everything_that_becomes_public(scope: str) -> None:
    publicity = ListingPolicy(name="Sydney Lab", region="AU", scope=scope)  # pyright: ignore[reportArgumentType]
    text = consent_text(publicity, ("ws://a", "ws://b"))
    for word in ("Sydney Lab", "AU", "ws://a, ws://b", "nodes", "clients", "memory", "busy", "serve, want", "on disk",
                 "version", "invite", "network addresses", "Never public", f"--publish-scope {scope}"):  # fmt: skip
        assert word in text
    assert ("read" in text.split("Whoever reads the invite")[1].split("Never public")[0]) == (scope != "client")
