"""`--auto`: finds a mesh on Nostr before the node takes a place in one, and has the next best at hand."""

from collections.abc import Collection

import msgspec

from mesh_llm.core.effects import NoticeLevel
from mesh_llm.core.errors import MeshError
from mesh_llm.core.ids import MeshId
from mesh_llm.core.listing_choice import Wish
from mesh_llm.daemon.finding import Candidate, Search, search
from mesh_llm.daemon.progress import OnProgress, Stage, Told
from mesh_llm.daemon.settings import Settings
from mesh_llm.net.endpoint import EndpointSettings


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """A life's settings, and the meshes to try if theirs does not let this node in.

    `searched`: there is no need to look; `told`: what to tell the user then.
    """

    settings: Settings
    others: tuple[Candidate, ...] = ()
    searched: bool = True
    told: str = ""

    def next(self) -> "Found | None":
        """What to do where the mesh that was chosen did not let this node in; None: nothing is left to try."""
        settings = self.settings
        if self.others:
            best, *others = self.others
            text = f"that one lets nobody in; joining {describe(best)}"
            return Found(settings=joining(settings, best), others=tuple(others), told=text)
        if settings.discovery.auto and settings.join and settings.models and not settings.client:
            text = "none of the listed meshes lets this node in; starting a mesh of its own"
            return Found(settings=msgspec.structs.replace(settings, join=()), told=text)
        return None


def wish_of(settings: Settings) -> Wish:
    """What a node with these settings looks for: who only asks is content with less than who serves."""
    model = settings.models[0] if settings.client and settings.models else ""
    return Wish(model=model, scope="client" if settings.client else "serve", near=settings.discovery.region)


async def look_around(settings: Settings, skip: Collection[MeshId] = ()) -> Search:
    """What is there for such a node."""
    endpoint = EndpointSettings(relay=settings.relay)
    return await search(settings.discovery.urls, wish_of(settings), endpoint, skip)


async def find_mesh(life: Found, on_progress: OnProgress) -> Found:
    """With `--auto` and no token: the best mesh's token, or none where the node begins a mesh of its own.

    Raises:
        MeshError: `no_mesh_found` or `no_relay`, for a node that has no `--model` to begin a mesh with.
    """
    settings = life.settings
    if life.told:
        on_progress(Stage(name="discover", text=life.told, done=True))
    if life.searched or not settings.discovery.auto or settings.join:
        return life
    on_progress(Stage(name="discover", text="looking for a mesh on Nostr", done=False))
    found = await look_around(settings)
    if found.candidates:
        best, *others = found.candidates
        on_progress(Stage(name="discover", text=f"joining {describe(best)}", done=True))
        return Found(settings=joining(settings, best), others=tuple(others))
    try:
        found.check(wish_of(settings))
    except MeshError as error:
        if settings.client or not settings.models:
            raise
        listed = ", and listing it" if settings.discovery.publicity is not None else ""
        on_progress(Stage(name="discover", text=f"{error.message} Starting a mesh of its own{listed}.", done=True))
        on_progress(Told(level=NoticeLevel.INFO, code="mesh_not_found", text=error.message))
    return Found(settings=settings)


def joining(settings: Settings, candidate: Candidate) -> Settings:
    """The settings of a node that joins this mesh."""
    discovery = msgspec.structs.replace(settings.discovery, auto=True)
    return msgspec.structs.replace(settings, join=(candidate.token,), discovery=discovery)


def describe(candidate: Candidate) -> str:
    """A mesh in a few words."""
    listing = candidate.listing
    name = listing.name or f"mesh {listing.mesh[:10]}"
    return f"{name} ({listing.nodes} node{'' if listing.nodes == 1 else 's'}, {candidate.rtt_ms:.0f} ms away)"
