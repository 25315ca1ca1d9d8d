"""Looks for meshes on Nostr, measures the way to the best of them, and puts them in order."""

import asyncio
import importlib
from collections.abc import Collection

import msgspec

from mesh_llm.core.errors import MeshError
from mesh_llm.core.ids import MeshId
from mesh_llm.core.listing import Listing
from mesh_llm.core.listing_choice import Offer, Score, Wish, best_first
from mesh_llm.net.endpoint import EndpointSettings
from mesh_llm.net.identity import verify
from mesh_llm.net.probing import MOST_AT_ONCE, measure
from mesh_llm.wire.invite import Invite, parse_invite

DIRECT_SECONDS = 2.5
RELAYED_SECONDS = 5.0
"""How long a node may take to answer where only its addresses lead to it, and where a relay of the network helps."""


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A mesh that can be joined. `rtt_ms`: to the node that its invite names; `token`: that invite."""

    listing: Listing
    token: str
    rtt_ms: float
    score: Score
    author: str
    expires: float
    relays: tuple[str, ...]


class Search(msgspec.Struct, frozen=True, kw_only=True):
    """What was found.

    Attributes:
        candidates: best first, all of which can be reached.
        seen: how many meshes are listed.
        unreachable: how many that match did not answer.
        answered: relays that did.
        failed: why the others did not.
        refused: how many events on the relays were not believed.
    """

    candidates: tuple[Candidate, ...]
    seen: int
    unreachable: int
    answered: tuple[str, ...]
    failed: dict[str, str]
    refused: int

    def check(self, wish: Wish) -> None:
        """Raise MeshError where there is nothing to join: `no_relay`, or `no_mesh_found` with why."""
        if self.candidates:
            return
        if not self.answered:
            reasons = "; ".join(f"{url}: {reason}" for url, reason in self.failed.items())
            raise MeshError(
                code="no_relay",
                message=f"No Nostr relay answered ({reasons}).",
                hint="Whether there are meshes is not known. Check the network, or ask other relays: --nostr-relay URL",
                status=503,
            )
        if not self.seen:
            message = "No meshes are listed at present."
        elif self.unreachable:
            message = f"None of the {self.unreachable} meshes that match can be reached (of {self.seen} listed)."
        else:
            message = f"None of the {self.seen} meshes that are listed is what you look for{_described(wish)}."
        raise MeshError(
            code="no_mesh_found",
            message=message,
            hint="Start one: mesh-llm --model NAME --publish. All that are listed: mesh-llm discover",
            status=404,
        )


async def search(
    urls: tuple[str, ...],
    wish: Wish,
    endpoint: EndpointSettings,
    skip: Collection[MeshId] = (),
    most: int = MOST_AT_ONCE,
) -> Search:
    """Ask the relays, leave out what does not match and `skip`, dial the best `most`, and order what answers.

    Takes a few seconds at most: relays and nodes are asked all at once.
    """
    # A large library: loading it in this thread would hold up whatever streams now.
    await asyncio.to_thread(importlib.import_module, "mesh_llm.discovery.look")
    from mesh_llm.discovery.look import look

    seen = await look(urls, verify)
    found = {entry.listing.mesh: entry for entry in seen.found if entry.listing.mesh not in skip}
    promising = best_first((Offer(listing=entry.listing) for entry in found.values()), wish)[:most]
    invites: dict[MeshId, Invite] = {}
    for offer, _ in promising:
        invite = parse_invite(found[offer.listing.mesh].token)
        if isinstance(invite, Invite):
            invites[offer.listing.mesh] = invite
    measured = await measure(invites, endpoint, RELAYED_SECONDS if endpoint.relay else DIRECT_SECONDS)
    near = [
        Offer(listing=offer.listing, rtt_ms=rtt)
        for offer, _ in promising
        if (rtt := measured.get(offer.listing.mesh)) is not None
    ]
    candidates = tuple(
        Candidate(
            listing=offer.listing,
            token=found[offer.listing.mesh].token,
            rtt_ms=offer.rtt_ms or 0.0,
            score=scored,
            author=found[offer.listing.mesh].author,
            expires=found[offer.listing.mesh].expires,
            relays=found[offer.listing.mesh].relays,
        )
        for offer, scored in best_first(near, wish)
    )
    return Search(
        candidates=candidates,
        seen=len(found),
        unreachable=len(promising) - len(near),
        answered=seen.answered,
        failed=seen.failed,
        refused=seen.refused,
    )


def _described(wish: Wish) -> str:
    parts = [
        f"a model named {wish.model}" if wish.model else "",
        f"in {wish.region}" if wish.region else "",
        f"with {wish.min_memory_bytes / 1e9:g} GB" if wish.min_memory_bytes else "",
        f"open to scope {wish.scope}" if wish.scope != "client" else "",
    ]
    said = ", ".join(part for part in parts if part)
    return f" ({said})" if said else ""
