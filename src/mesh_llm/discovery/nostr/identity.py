"""The Nostr key that signs a home's listings: `MESH_LLM_HOME/nostr.nsec`, 0600. It has nothing of the node's key.

A new Nostr identity: every listing of the old one is deleted first.
"""

import os
import time
from pathlib import Path

import msgspec
from nostr_sdk import Keys

from mesh_llm.core.types.errors import MeshError
from mesh_llm.discovery.nostr.relays import (
    RelayError,
    RelayLink,
    RelayPool,
    SdkError,
    deletion_event,
    listings_of,
    mesh_of,
    reason_of,
)
from mesh_llm.runtime.home import write_atomic
from mesh_llm.runtime.supervision import TaskScope

_MAX_FILE = 256


def load(path: Path) -> Keys | None:
    """Read the key; None where there is none. Raises MeshError(nostr_key_unreadable)."""
    try:
        text = path.read_bytes()[:_MAX_FILE].decode("ascii").strip()
        keys = Keys.parse(text)
    except FileNotFoundError:
        return None
    except PermissionError:
        # The home is another user's: said by whoever uses the home.
        raise
    except (OSError, UnicodeDecodeError, SdkError) as error:
        raise MeshError(
            code="nostr_key_unreadable",
            message=f"The Nostr key in {path} cannot be used: {reason_of(error)}.",
            hint="Put the right file back, or move it away to get a new one.",
        ) from None
    if os.name == "posix" and path.stat().st_mode & 0o077:
        path.chmod(0o600)
    return keys


def load_or_make(path: Path) -> Keys:
    """Read the key, or make one."""
    keys = load(path)
    return keys if keys is not None else make(path)


def make(path: Path) -> Keys:
    """Make a new key in place of whatever is there, and keep it."""
    keys = Keys.generate()
    write_atomic(path, keys.secret_key().to_bech32().encode() + b"\n", 0o600)
    return keys


def public_bytes(keys: Keys) -> bytes:
    """The public key, 32 bytes."""
    return bytes.fromhex(keys.public_key().to_hex())


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
