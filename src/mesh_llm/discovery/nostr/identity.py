"""The Nostr key that signs a home's listings: `MESH_LLM_HOME/nostr.nsec`, 0600. It is unrelated to the node's key.

`rotate` deletes all listings of the old key, then makes a new one.
"""

import os
from pathlib import Path

import msgspec
from nostr_sdk import Keys

from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import MeshId
from mesh_llm.discovery.nostr.relays import (
    RelayError,
    RelayLink,
    RelayPool,
    SdkError,
    clear_relay,
    reason_of,
)
from mesh_llm.runtime.home import write_atomic
from mesh_llm.runtime.supervision import TaskScope

_MAX_FILE = 256


def load_key(path: Path) -> Keys | None:
    """Read the key; None if there is none. Raises MeshError(nostr_key_unreadable)."""
    try:
        text = path.read_bytes()[:_MAX_FILE].decode("ascii").strip()
        keys = Keys.parse(text)
    except FileNotFoundError:
        return None
    except PermissionError:
        # The home belongs to another user: Home.explained reports that.
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


def load_or_make_key(path: Path) -> Keys:
    """Read the key, or make one."""
    keys = load_key(path)
    return keys if keys is not None else make_key(path)


def make_key(path: Path) -> Keys:
    """Make and store a new key; it replaces an old one."""
    keys = Keys.generate()
    write_atomic(path, keys.secret_key().to_bech32().encode() + b"\n", 0o600)
    return keys


def public_bytes(keys: Keys) -> bytes:
    """The public key, 32 bytes."""
    return bytes.fromhex(keys.public_key().to_hex())


class Rotation(msgspec.Struct, frozen=True, kw_only=True):
    """The result: old key (hex; empty if there was none), new key, deleted listings, and why relays failed, by URL."""

    old: str
    new: str
    deleted: int
    failed: dict[str, str]


async def rotate(path: Path, urls: tuple[str, ...], *, force: bool = False) -> Rotation:
    """Delete the old key's listings, then put a new key in its place.

    Raises:
        MeshError: `no_relay`, no relay answered, so nothing was deleted; not with `force`.
    """
    keys = load_key(path)
    deleted, failed = (0, dict[str, str]()) if keys is None else await delete_listings(urls, keys)
    if len(failed) == len(urls) and not force:
        raise MeshError(
            code="no_relay",
            message=f"No relay answered, so the old key's listing could not be deleted: {next(iter(failed.values()))}.",
            hint="Try again later; or give --force: the old listing expires by itself within two minutes.",
            status=503,
        )
    old = keys.public_key().to_hex() if keys is not None else ""
    return Rotation(old=old, new=make_key(path).public_key().to_hex(), deleted=deleted, failed=failed)


async def delete_listings(urls: tuple[str, ...], keys: Keys) -> tuple[int, dict[str, str]]:
    """Delete all listings of this key. Returns their number, and why relays failed, by URL."""
    pool = await RelayPool.open(urls)
    try:
        async with TaskScope("delete") as scope:
            tasks = {link.url: scope.spawn(_delete(link, keys), link.url) for link in pool.links}
            outcomes: dict[str, set[MeshId] | str] = {url: await task for url, task in tasks.items()}
    finally:
        await pool.close()
    failed = {url: outcome for url, outcome in outcomes.items() if isinstance(outcome, str)}
    meshes = {mesh for outcome in outcomes.values() if not isinstance(outcome, str) for mesh in outcome}
    return len(meshes), failed


async def _delete(link: RelayLink, keys: Keys) -> set[MeshId] | str:
    try:
        return await clear_relay(link, keys)
    except RelayError as error:
        return str(error)
