"""The tables of `mesh-llm discover`: meshes of one name are told apart, and each shows why it was found."""

from mesh_llm.cli.discover import FoundMesh, FoundNode, lan_table, nostr_table
from mesh_llm.core.listing.content import ListedModel, Listing, ListingCandidate, ListingQuery, score
from mesh_llm.core.types.ids import MeshId
from mesh_llm.daemon.mesh_discovery import Candidate, Search


def models(*names: str) -> tuple[ListedModel, ...]:
    return tuple(ListedModel(name=name) for name in names)


def rows(wish: ListingQuery, *listings: Listing) -> list[str]:
    found = tuple(
        Candidate(
            listing=listing,
            token="mesh2abc",
            rtt_ms=1.0,
            score=score(ListingCandidate(listing=listing), wish),
            author="b" * 64,
            expires=0.0,
            relays=("a",),
        )
        for listing in listings
    )
    search = Search(candidates=found, seen=len(found), unreachable=0, answered=("a",), failed={}, refused=0)
    return nostr_table(search, wish, explain=False).splitlines()[: len(found) + 1]


def test_meshes_of_one_name_are_told_apart_by_their_keys() -> None:
    listings = [Listing(mesh=MeshId(digit * 64), name=name) for digit, name in (("a", "Lab"), ("b", "Lab"), ("c", ""))]
    head, *lines = rows(ListingQuery(), *listings)
    assert head.split()[:2] == ["MESH", "KEY"]
    assert [line.split()[:2] for line in lines] == [["Lab", "a" * 16], ["Lab", "b" * 16], ["-", "c" * 16]]


def test_what_was_looked_for_and_is_not_served_is_shown_and_marked() -> None:
    mesh = Listing(
        mesh=MeshId("a" * 64),
        serving=models("tiny"),
        wanted=models("GLM-4", "other"),
        on_disk=models("GLM-4", "glm-edge", "tiny"),
    )
    for part, shown in (
        ("glm", "GLM-4 (wanted), glm-edge (on disk), tiny"),
        ("edge", "glm-edge (on disk), tiny"),
        ("TIN", "tiny"),
        ("", "tiny"),
    ):
        assert rows(ListingQuery(model=part), mesh)[1].endswith(f"  {shown}"), part


def lan_mesh(digit: str, name: str) -> FoundMesh:
    node = FoundNode(node_id="e" * 64, key="abcd", name="desk", addresses=("10.0.0.1:1",), version="1")
    return FoundMesh(mesh_id=digit * 64, name=name, models=(), more_models=0, nodes=(node,))


def test_on_the_local_network_too() -> None:
    lines = lan_table([lan_mesh("a", "Lab"), lan_mesh("b", "lab "), lan_mesh("c", "Other")])
    assert [line.strip().split("  ")[0] for line in lines[1:4]] == ["Lab (aaaa)", "lab (bbbb)", "Other"]
    assert "--lan --mesh-name NAME." in lines[-1]
    assert "--lan. " in lan_table([lan_mesh("a", "")])[-1]
