"""Fast keys without cryptography: only the holder of a secret can make its signature."""

import hashlib

from mesh_llm.core.types.ids import MeshId, NodeId

_SECRETS: dict[bytes, bytes] = {}


class ToyKey:
    """Stands in for an Ed25519 secret."""

    def __init__(self, name: str) -> None:
        self._secret = name.encode()
        self.public = hashlib.blake2b(self._secret, digest_size=32).digest()
        _SECRETS[self.public] = self._secret

    @property
    def node_id(self) -> NodeId:
        return NodeId(self.public.hex())

    @property
    def mesh_id(self) -> MeshId:
        return MeshId(self.public.hex())

    def sign(self, payload: bytes) -> bytes:
        return hashlib.blake2b(self._secret + payload, digest_size=64).digest()


def verify(key: bytes, payload: bytes, signature: bytes) -> bool:
    secret = _SECRETS.get(key)
    return secret is not None and hashlib.blake2b(secret + payload, digest_size=64).digest() == signature
