"""The score of a listed mesh: bounded, explained, and only better for what is better; merging never goes round."""

from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from mesh_llm.core.listing.content import (
    MESH_KEY_DIGITS,
    ListedModel,
    Listing,
    ListingCandidate,
    ListingQuery,
    best_first,
    matches,
    merge_targets,
    score,
)
from mesh_llm.core.types.ids import MeshId

NAMES = st.sampled_from(["GLM-4.5-Air", "glm-edge", "qwen2.5-7b", "tiny", "Llama"])
MODELS = st.lists(st.builds(ListedModel, name=NAMES), max_size=4).map(tuple)
LISTINGS = st.builds(
    Listing,
    mesh=st.integers(0, 2**32).map(lambda number: MeshId(f"{number:064x}")),
    name=st.sampled_from(["", "Lab", " lab", "Other"]),
    region=st.sampled_from(["", "AU", "au", "EU"]),
    max_clients=st.sampled_from([0, 1, 10, 1000]),
    scope=st.sampled_from(["client", "serve", "split"]),
    nodes=st.integers(1, 10**6),
    clients=st.integers(0, 2**53),
    load=st.floats(0.0, 1.0),
    memory_bytes=st.integers(0, 2**53),
    serving=MODELS,
    wanted=MODELS,
    on_disk=MODELS,
)
WISHES = st.builds(
    ListingQuery,
    model=st.sampled_from(["", "glm", "GLM", "tiny", "7b"]),
    region=st.sampled_from(["", "AU", "eu"]),
    min_memory_bytes=st.sampled_from([0, 10**9]),
    scope=st.sampled_from(["client", "serve"]),
    near=st.sampled_from(["", "AU"]),
)
OFFERS = st.builds(ListingCandidate, listing=LISTINGS, rtt_ms=st.none() | st.floats(0.0, 10_000.0))


def changed(offer: ListingCandidate, **fields: Any) -> ListingCandidate:
    return ListingCandidate(listing=msgspec.structs.replace(offer.listing, **fields), rtt_ms=offer.rtt_ms)


@given(OFFERS, WISHES)
def test_a_score_is_the_sum_of_its_parts_and_within_bounds(offer: ListingCandidate, wish: ListingQuery) -> None:
    scored = score(offer, wish)
    assert 0.0 <= scored.total <= 100.0
    assert abs(scored.total - sum(part.points for part in scored.parts)) < 0.06
    assert all(0.0 <= part.points <= part.most and part.why for part in scored.parts)


@given(OFFERS, WISHES, st.floats(0.0, 1.0), st.floats(0.0, 10_000.0))
def test_more_load_clients_or_distance_never_make_it_better(
    offer: ListingCandidate, wish: ListingQuery, load: float, rtt: float
) -> None:
    total = score(offer, wish).total
    assert score(changed(offer, load=max(load, offer.listing.load)), wish).total <= total
    assert score(changed(offer, clients=offer.listing.clients + 1), wish).total <= total
    if offer.rtt_ms is not None:
        farther = ListingCandidate(listing=offer.listing, rtt_ms=max(rtt, offer.rtt_ms))
        assert score(farther, wish).total <= total


@given(OFFERS)
def test_serving_what_is_asked_for_beats_wanting_it_beats_having_it(offer: ListingCandidate) -> None:
    wish, glm = ListingQuery(model="glm"), (ListedModel(name="GLM-5"),)
    none: dict[str, Any] = {"serving": (), "wanted": (), "on_disk": ()}
    totals = [score(changed(offer, **(none | {kind: glm})), wish).total for kind in ("serving", "wanted", "on_disk")]
    assert totals[0] > totals[1] > totals[2] > score(changed(offer, **none), wish).total


@given(st.lists(OFFERS, max_size=8), WISHES, st.randoms())
def test_the_order_does_not_depend_on_who_came_first(
    offers: list[ListingCandidate], wish: ListingQuery, chance: Any
) -> None:
    unique = list({offer.listing.mesh: offer for offer in offers}.values())
    shuffled = chance.sample(unique, len(unique))
    ordered = best_first(unique, wish)
    assert ordered == best_first(shuffled, wish)
    assert {offer.listing.mesh for offer, _ in ordered} == {
        offer.listing.mesh for offer in unique if matches(offer.listing, wish)
    }


@given(LISTINGS, WISHES)
def test_a_full_mesh_or_one_of_too_small_a_scope_is_never_offered(listing: Listing, wish: ListingQuery) -> None:
    if listing.full or (wish.scope == "serve" and listing.scope == "client"):
        assert not matches(listing, wish)


KEYS = st.lists(st.integers(0, 2**32).map(lambda number: f"{number:064x}"[:MESH_KEY_DIGITS]), max_size=3)


def nothing(_: MeshId) -> bool:
    return False


def everything(_: MeshId) -> bool:
    return True


@given(st.lists(LISTINGS, min_size=2, max_size=6))
def test_no_listing_moves_anybody_who_named_and_holds_nothing(listings: list[Listing]) -> None:
    for own in listings:
        assert merge_targets(own, listings, (), nothing) == []


@given(st.lists(LISTINGS, min_size=2, max_size=6))
def test_whoever_merges_by_name_goes_to_a_strictly_larger_mesh_so_nobody_goes_round(listings: list[Listing]) -> None:
    for own in listings:
        for other in merge_targets(own, listings, (), everything):
            assert own.nodes == 1 < other.nodes
            assert own.name.strip().casefold() == other.name.strip().casefold()
            assert own not in merge_targets(other, listings, (), everything)


@given(LISTINGS, st.lists(LISTINGS, max_size=6), KEYS, st.sets(st.integers(0, 5)))
def test_every_target_was_named_by_its_key_or_is_held(
    own: Listing, others: list[Listing], keys: list[str], held: set[int]
) -> None:
    meshes = {others[index].mesh for index in held if index < len(others)}
    for target in merge_targets(own, others, keys, meshes.__contains__):
        assert target.mesh in meshes or any(target.mesh.startswith(key) for key in keys)
        assert target.mesh != own.mesh
        assert target.scope != "client"
        assert not target.full


def test_two_lone_ones_of_a_name_stay_where_they_are_and_the_largest_comes_first() -> None:
    meshes = [Listing(mesh=MeshId(digit * 64), name="Lab", nodes=nodes) for digit, nodes in (("a", 1), ("b", 1))]
    assert merge_targets(meshes[0], meshes, (), everything) == []
    pair, many = (Listing(mesh=MeshId(digit * 64), name=" LAB ", nodes=n) for digit, n in (("c", 2), ("d", 9)))
    assert merge_targets(meshes[0], [meshes[1], pair, many], (), everything) == [many, pair]
    unnamed = Listing(mesh=MeshId("e" * 64), nodes=1)
    assert merge_targets(unnamed, [Listing(mesh=MeshId("f" * 64), nodes=5)], (), everything) == []


def test_a_mesh_named_by_its_key_counts_whatever_its_name_and_size_and_comes_first() -> None:
    own, lone = Listing(mesh=MeshId("a" * 64), name="Lab"), Listing(mesh=MeshId("b" * 64), name="Other")
    held = Listing(mesh=MeshId("c" * 64), name="Lab", nodes=9)
    assert merge_targets(own, [held, lone], ["b" * MESH_KEY_DIGITS], nothing) == [lone]
    assert merge_targets(own, [held, lone], ["b" * MESH_KEY_DIGITS], everything) == [lone, held]
    twin = Listing(mesh=MeshId("b" * 63 + "c"), name="Other")
    assert merge_targets(own, [lone, twin], ["b" * MESH_KEY_DIGITS], nothing) == []
    assert merge_targets(own, [lone, twin], ["b" * 64], nothing) == [lone]
