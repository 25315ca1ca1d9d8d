"""A node's wish that its mesh be listed, as it travels within its announcement."""

from typing import Annotated

import msgspec

from mesh_llm.core import bounds
from mesh_llm.core.publicity import MAX_CLIENTS, MAX_MESH_NAME, MAX_REGION, ListingScope, Publicity


class WirePublicity(msgspec.Struct, frozen=True, array_like=True):
    """core.publicity.Publicity, field by field; an array that may grow."""

    name: Annotated[str, msgspec.Meta(max_length=MAX_MESH_NAME, pattern=bounds.ONE_LINE)] = ""
    region: Annotated[str, msgspec.Meta(max_length=MAX_REGION, pattern=bounds.ONE_LINE)] = ""
    max_clients: Annotated[int, msgspec.Meta(ge=0, le=MAX_CLIENTS)] = 0
    scope: ListingScope = "serve"
    failing: bool = False


def publicity_out(publicity: Publicity) -> WirePublicity:
    """As it travels."""
    return WirePublicity(
        publicity.name,
        publicity.region,
        publicity.max_clients,
        publicity.scope,
        publicity.failing,
    )


def publicity_in(wire: WirePublicity) -> Publicity:
    """The opposite."""
    return Publicity(
        name=wire.name,
        region=wire.region,
        max_clients=wire.max_clients,
        scope=wire.scope,
        failing=wire.failing,
    )
