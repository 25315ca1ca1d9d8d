"""The Nostr key that signs a home's listings: `MESH_LLM_HOME/nostr.nsec`, 0600. It has nothing of the node's key."""

import os
from pathlib import Path

from nostr_sdk import Keys

from mesh_llm.core.errors import MeshError
from mesh_llm.discovery.sdk_errors import SdkError, reason_of
from mesh_llm.runtime.files import write_atomic

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
