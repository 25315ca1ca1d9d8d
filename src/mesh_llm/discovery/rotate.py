"""A new Nostr identity: every listing of the old one is deleted first."""

import time
from pathlib import Path

import msgspec
from nostr_sdk import Keys

from mesh_llm.core.errors import MeshError
from mesh_llm.discovery.events import deletion_event, listings_of, mesh_of
from mesh_llm.discovery.identity import load, make
from mesh_llm.discovery.relays import RelayError, RelayLink, RelayPool
from mesh_llm.runtime.tasks import TaskScope


class Rotation(msgspec.Struct, frozen=True, kw_only=True):
    """How it went: the old key (hex; empty where there was none), the new one, listings deleted, silent relays."""

    old: str
    new: str
    deleted: int
    failed: dict[str, str]


async def rotate(path: Path, urls: tuple[str, ...], *, force: bool = False) -> Rotation:
    """Delete the old key's listings, then put a new key in its place.

    Raises:
        MeshError: `no_relay`, none answered, so that nothing could be deleted; not with `force`.
    """
    keys = load(path)
    deleted, failed = (0, dict[str, str]()) if keys is None else await delete_listings(urls, keys)
    if len(failed) == len(urls) and not force:
        raise MeshError(
            code="no_relay",
            message=f"No relay answered, so the old key's listing could not be deleted: {next(iter(failed.values()))}.",
            hint="Try again later; or give --force: the old listing expires by itself within two minutes.",
            status=503,
        )
    old = keys.public_key().to_hex() if keys is not None else ""
    return Rotation(old=old, new=make(path).public_key().to_hex(), deleted=deleted, failed=failed)


async def delete_listings(urls: tuple[str, ...], keys: Keys) -> tuple[int, dict[str, str]]:
    """Delete all that this key listed; how many, and which relays could not be asked."""
    pool = await RelayPool.open(urls)
    try:
        async with TaskScope("delete") as scope:
            tasks = {link.url: scope.spawn(_delete(link, keys), link.url) for link in pool.links}
            outcomes: dict[str, set[str] | str] = {url: await task for url, task in tasks.items()}
    finally:
        await pool.close()
    failed = {url: outcome for url, outcome in outcomes.items() if isinstance(outcome, str)}
    meshes = {mesh for outcome in outcomes.values() if not isinstance(outcome, str) for mesh in outcome}
    return len(meshes), failed


async def _delete(link: RelayLink, keys: Keys) -> set[str] | str:
    try:
        events = await link.fetch(listings_of(keys.public_key()))
        meshes = {mesh: event.created_at().as_secs() for event in events if (mesh := mesh_of(event))}
        for mesh, created in meshes.items():
            await link.send(deletion_event(keys, mesh, created=max(int(time.time()), created)))
    except RelayError as error:
        return str(error)
    return set(meshes)
