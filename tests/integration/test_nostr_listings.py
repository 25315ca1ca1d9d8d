"""What is believed of what real relays tell, and what a relay that dies takes with it."""

import asyncio
import time

import pytest
from nostr_sdk import Keys
from tests.support.nostr_relays import TestRelay, relays
from tests.support.postings import Poster, tampered

from mesh_llm.cli.discover import nostr_table
from mesh_llm.core.listing.content import ListedModel, ListingCandidate, ListingQuery, score
from mesh_llm.daemon.mesh_discovery import Candidate, Search
from mesh_llm.discovery.nostr import relays as relays_module
from mesh_llm.discovery.nostr.identity import rotate
from mesh_llm.discovery.nostr.listings import ListingBoard, query_relays, select_listings
from mesh_llm.discovery.nostr.relays import FoundListing, RelayPool, all_listings, read_event
from mesh_llm.net.admission.credentials import verify
from mesh_llm.wire.codec import Malformed
from mesh_llm.wire.discovery import MAX_CONTENT

_DEAD = "ws://127.0.0.1:9"
_SOON = 60.0


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Who waits for a relay that does not answer waits until the test fails; until `undo`."""
    for name in ("CONNECT_SECONDS", "ANSWER_SECONDS"):
        monkeypatch.setattr(relays_module, name, 10 * _SOON)
    return monkeypatch


def refused(event: object, now: float | None = None) -> str:
    read = read_event(event, now=time.time() if now is None else now, verify=verify)  # pyright: ignore[reportArgumentType]
    assert isinstance(read, Malformed), read
    return read.reason


async def test_among_hostile_listings_the_good_one_is_found() -> None:
    good, other = Poster("Good"), Poster("Other")
    async with relays() as (relay,):
        await relay.put(
            good.event(),
            # Somebody copies the good mesh's listing, and signs it with a key of his own.
            good.event(keys=Keys.generate(), created=1),
            # A listing of one mesh with another's invite.
            other.event(good.content()),
            # Terminal escapes in a name; a content far too long; junk; one that never expires.
            Poster().event(Poster().content(name="\x1b[2J\x1b[31mfree GPUs")),
            Poster().event(" " * 2 * MAX_CONTENT + good.content()),
            Poster().event("not even JSON"),
            Poster().event(life=None),
            # Another program's event of the same kind.
            Poster().event(tag="some-other-mesh"),
        )
        seen = await query_relays((relay.url,), verify)
    assert [entry.listing.name for entry in seen.found] == ["Good"]
    assert seen.refused == 6


def test_each_lie_is_refused_for_what_it_is() -> None:
    poster = Poster()
    assert isinstance(read_event(poster.event(), now=time.time(), verify=verify), FoundListing)
    assert "named another author" in refused(poster.event(keys=Keys.generate()))
    assert refused(tampered(poster.event(), content=poster.content(nodes=5000))) == "its signature is wrong"
    assert refused(poster.event(life=30), now=time.time() + 31) == "it expired"
    assert refused(poster.event(life=10**9), now=time.time() + 3601) == "it expired"
    assert refused(poster.event(created=1000)) == "it comes from the future"
    assert refused(poster.event(life=None)) == "it never expires"
    assert refused(poster.event(mesh="ab" * 32)) == "it names two meshes"
    assert "at most" in refused(poster.event("x" * (MAX_CONTENT + 1)))
    assert refused(poster.event(tag="mesh-llm-mesh/2")) == "not a mesh-llm listing"


def test_of_two_listings_of_a_mesh_the_newer_counts_whichever_relay_has_it() -> None:
    poster = Poster()
    old, new = poster.event(created=-20), poster.event(poster.content(nodes=3))
    found, bad = select_listings({"a": [old], "b": [new], "c": [new]}, time.time(), verify)
    assert [(entry.listing.nodes, entry.relays) for entry in found] == [(3, ("b", "c"))]
    assert bad == 0


def test_of_two_meshes_that_one_key_listed_only_the_last_counts() -> None:
    """A node that founded another mesh left a listing of the first one: a ghost, until it expired."""
    first, second, other = Poster("First"), Poster("Second"), Poster("Other")
    second.keys = first.keys
    ghost, now = first.event(created=-20), second.event()
    for answers in ({"a": [ghost, now, other.event()]}, {"a": [now, ghost], "b": [ghost, other.event()]}):
        found, bad = select_listings(answers, time.time(), verify)
        assert sorted(entry.listing.name for entry in found) == ["Other", "Second"]
        assert bad == 0
    # What another key lists of the first mesh stays.
    member = Poster("First")
    member.mesh = first.mesh
    theirs = member.event(member.content(mesh=first.mesh.mesh_id), created=-30)
    found, _ = select_listings({"a": [ghost, now, theirs]}, time.time(), verify)
    assert sorted(entry.listing.name for entry in found) == ["First", "Second"]


def test_what_is_shown_of_a_listing_moves_no_cursor_and_turns_no_line_around() -> None:
    poster = Poster()
    sly = poster.event(poster.content(name="Lab \u202eelttab", serving=(ListedModel(name="a\u200b\u2066b"),)))
    (found,), _ = select_listings({"a": [sly]}, time.time(), verify)
    candidate = Candidate(
        listing=found.listing,
        token=found.token,
        rtt_ms=1.0,
        score=score(ListingCandidate(listing=found.listing), ListingQuery()),
        author=found.author,
        expires=found.expires,
        relays=found.relays,
    )
    shown = nostr_table(
        Search(candidates=(candidate,), seen=1, unreachable=0, answered=("a",), failed={}, refused=0),
        ListingQuery(),
        explain=True,
    )
    assert all(char.isprintable() for char in shown.replace("\n", ""))
    assert "\\x202eelttab" in shown


async def test_a_flood_of_junk_is_read_only_so_far() -> None:
    async with relays() as (relay,):
        await relay.put(*[Poster.event(junk, "{}") for junk in [Poster() for _ in range(260)]])
        seen = await query_relays((relay.url,), verify)
    assert seen.found == ()
    assert seen.refused <= 200


async def test_dead_relays_delay_nobody_and_no_answer_is_no_empty_answer(patient: pytest.MonkeyPatch) -> None:
    async with relays() as (relay,), asyncio.timeout(_SOON):
        seen = await query_relays((relay.url, _DEAD), verify)
        assert (seen.found, seen.answered, list(seen.failed)) == ((), (relay.url,), [_DEAD])
    patient.undo()
    nothing = await query_relays((_DEAD,), verify)
    assert (nothing.answered, list(nothing.failed)) == ((), [_DEAD])
    search = Search(candidates=(), seen=0, unreachable=0, answered=(), failed=nothing.failed, refused=0)
    with pytest.raises(Exception, match="No Nostr relay answered"):
        search.check(ListingQuery())


async def test_a_silent_relay_is_given_up_on(patient: pytest.MonkeyPatch) -> None:
    """It takes connections and never says a word."""

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with relays() as (relay,):
        good = Poster()
        await relay.put(good.event())
        async with asyncio.timeout(_SOON):
            seen = await query_relays((url, relay.url), verify)
        assert [entry.listing.mesh for entry in seen.found] == [good.mesh.mesh_id]
        patient.undo()
        assert list((await query_relays((url,), verify)).failed) == [url]
    server.close()


class Listed:
    """A board, and what it told of its rounds."""

    def __init__(self, which: list[TestRelay], poster: Poster) -> None:
        self.outcomes: list[tuple[int, str]] = []
        self.told = asyncio.Event()
        self.poster = poster
        self.urls = tuple(relay.url for relay in which)

    async def open(self) -> ListingBoard:
        pool = await RelayPool.open(self.urls)
        return ListingBoard(pool, self.poster.keys, self.poster.mesh.mesh_id, self._told)

    def _told(self, accepted: int, problem: str) -> None:
        self.outcomes.append((accepted, problem))
        self.told.set()

    async def accepted(self, count: int) -> None:
        async with asyncio.timeout(15):
            while not self.outcomes or self.outcomes[-1][0] != count:
                self.told.clear()
                await self.told.wait()


async def test_a_board_replaces_within_a_second_goes_on_without_a_dead_relay_and_deletes() -> None:
    async with relays(2) as (first, second):
        listed = Listed([first, second], Poster())
        board = await listed.open()
        for nodes in (1, 2, 3):
            listed.outcomes.clear()
            board.publish(listed.poster.content(nodes=nodes), 60.0)
            await listed.accepted(2)
        for relay in (first, second):
            assert [content["nodes"] for content in await relay.contents()] == [3]
        await second.stop()
        listed.outcomes.clear()
        board.publish(listed.poster.content(nodes=4), 60.0)
        await listed.accepted(1)
        assert [content["nodes"] for content in await first.contents()] == [4]
        await board.close()
        assert await first.contents() == []


async def test_a_board_deletes_what_its_key_listed_before_and_nothing_else() -> None:
    async with relays(2) as (first, second):
        poster, earlier, stranger = Poster("Now"), Poster("Earlier"), Poster("Stranger")
        earlier.keys = poster.keys
        await first.put(earlier.event(created=-5), stranger.event())
        await second.put(earlier.event(created=-5))
        listed = Listed([first, second], poster)
        board = await listed.open()
        board.publish(poster.content(), 60.0)
        await first.until(lambda there: sorted(c["name"] for c in there) == ["Now", "Stranger"], "only the last")
        await second.until(lambda there: [c["name"] for c in there] == ["Now"], "only the last")
        await board.close()
        assert [content["name"] for content in await first.contents()] == ["Stranger"]


async def test_a_board_says_that_nobody_listens_and_tries_on() -> None:
    async with relays() as (relay,):
        listed = Listed([relay], Poster())
        await relay.stop()
        board = await listed.open()
        board.publish(listed.poster.content(), 60.0)
        await listed.accepted(0)
        assert relay.url in listed.outcomes[0][1]
        await board.close()


async def test_rotating_deletes_what_the_old_key_listed_first(tmp_path: object) -> None:
    from pathlib import Path

    path = Path(str(tmp_path)) / "nostr.nsec"
    poster, stranger = Poster(), Poster()
    path.write_text(poster.keys.secret_key().to_bech32())
    async with relays() as (relay,):
        await relay.put(poster.event(), stranger.event())
        done = await rotate(path, (relay.url, _DEAD))
        assert (done.old, done.deleted, list(done.failed)) == (poster.keys.public_key().to_hex(), 1, [_DEAD])
        assert [content["mesh"] for content in await relay.contents()] == [stranger.mesh.mesh_id]
    assert done.new != done.old
    assert path.stat().st_mode & 0o777 == 0o600
    before = path.read_text()
    with pytest.raises(Exception, match="No relay answered"):
        await rotate(path, (_DEAD,))
    assert path.read_text() == before


def test_a_filter_of_ours_leaves_other_programs_out() -> None:
    assert '"#k":["mesh-llm-mesh/1"]' in all_listings().as_json()
