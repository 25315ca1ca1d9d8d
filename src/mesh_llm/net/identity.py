"""Keys: who this node is, and how statements are signed and checked. Ed25519 through iroh (RFC 8032)."""

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import iroh

from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import MeshId, NodeId
from mesh_llm.runtime.home import Home, write_atomic
from mesh_llm.wire.codec import KEY_BYTES

EPHEMERAL_VARIABLE = "MESH_LLM_EPHEMERAL_KEY"


class SigningKey:
    """An Ed25519 secret. `sign` satisfies wire.signing.Sign."""

    def __init__(self, secret: bytes) -> None:
        """Take a secret of 32 bytes."""
        self._secret = secret
        self._key = iroh.SecretKey.from_bytes(secret)
        self.public: bytes = bytes(self._key.public().to_bytes())

    @classmethod
    def generate(cls) -> "SigningKey":
        """Make a new one from the operating system's randomness."""
        return cls(os.urandom(KEY_BYTES))

    @property
    def secret(self) -> bytes:
        """The 32 secret bytes, for the endpoint."""
        return self._secret

    @property
    def node_id(self) -> NodeId:
        """The public key as a node's name."""
        return NodeId(self.public.hex())

    @property
    def mesh_id(self) -> MeshId:
        """The public key as a mesh's name."""
        return MeshId(self.public.hex())

    def sign(self, payload: bytes) -> bytes:
        """Sign these bytes; 64 bytes."""
        return bytes(self._key.sign(payload).to_bytes())

    def __repr__(self) -> str:
        return f"SigningKey({self.public.hex()[:10]})"


@lru_cache(maxsize=4096)
def _public(key: bytes) -> iroh.EndpointId:
    return iroh.EndpointId.from_bytes(key)


def verify(key: bytes, payload: bytes, signature: bytes) -> bool:
    """Whether `key` signed `payload`: wire.signing.Verify. Never raises."""
    try:
        _public(key).verify(payload, iroh.Signature.from_bytes(signature))
    except iroh.IrohError:
        return False
    return True


def wants_ephemeral(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the user asked for a key that is forgotten at exit."""
    return environment.get(EPHEMERAL_VARIABLE, "") not in {"", "0"}


def node_key(home: Home, *, ephemeral: bool) -> SigningKey:
    """This node's key: kept in the home, made at the first start; or a new one for this life only."""
    return SigningKey.generate() if ephemeral else load_or_make(home.key)


def load(path: Path) -> SigningKey | None:
    """Read a key file; None where there is none. Raises MeshError(key_unreadable)."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    except PermissionError:
        # The home is another user's: said by whoever uses the home.
        raise
    except OSError as error:
        raise _unreadable(str(path), str(error)) from None
    key = parse(text, str(path))
    # A key that others can read is no identity; a copy by a careless tool is put right, not complained about.
    if os.name == "posix" and path.stat().st_mode & 0o077:
        path.chmod(0o600)
    return key


def parse(text: bytes, where: str) -> SigningKey:
    """Read a secret as it is kept, 64 hex digits. Raises MeshError(key_unreadable), which names `where`."""
    try:
        secret = bytes.fromhex(text.decode("ascii").strip())
    except ValueError as error:
        raise _unreadable(where, str(error)) from None
    if len(secret) != KEY_BYTES:
        raise _unreadable(where, f"{len(secret)} bytes instead of {KEY_BYTES}")
    return SigningKey(secret)


def render(key: SigningKey) -> bytes:
    """The opposite."""
    return key.secret.hex().encode() + b"\n"


def load_or_make(path: Path) -> SigningKey:
    """Read a key file, or make one, 0600."""
    key = load(path)
    if key is None:
        key = SigningKey.generate()
        save(path, key)
    return key


def save(path: Path, key: SigningKey) -> None:
    """Write a key file, 0600."""
    write_atomic(path, render(key), 0o600)


def _unreadable(where: str, reason: str) -> MeshError:
    return MeshError(
        code="key_unreadable",
        message=f"The key file {where} cannot be used: {reason}.",
        hint="Put the right file back, or move it away to become a new node.",
    )
