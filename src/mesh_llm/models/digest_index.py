"""The tensors on this machine's disk, by content: what a worker offers, and what a host looks names up in."""

from collections.abc import Iterable
from pathlib import Path

from mesh_llm.models.digests import DigestStore, DigestTensor, ModelDigests, TensorDigest


class DigestIndex:
    """Of one model by name, and of any number of models by content. See split.ports.Weights for the meaning."""

    def __init__(self, store: DigestStore | None = None) -> None:
        """`store` keeps what is learned; None keeps it in memory only."""
        self._store = store
        self._by_digest: dict[bytes, DigestTensor] = {}
        self._by_name: dict[str, DigestTensor] = {}
        self._main: tuple[Path, ModelDigests] | None = None
        self._hashes: dict[str, int] = {}

    def add(self, digests: ModelDigests) -> None:
        """Offer a model's tensors by content."""
        for tensor in digests.tensors:
            if tensor.size:
                self._by_digest[tensor.digest] = _placed(digests, tensor)

    def add_main(self, path: Path, digests: ModelDigests) -> None:
        """The same, and look names up in this one."""
        self.add(digests)
        self._main = (path, digests)
        self._hashes = dict(digests.hashes)
        self._by_name = {tensor.name: _placed(digests, tensor) for tensor in digests.tensors if tensor.size}

    def tensor(self, name: str) -> DigestTensor | None:
        """The main model's tensor of that name."""
        return self._by_name.get(name)

    def holding(self, digest: bytes) -> DigestTensor | None:
        """A tensor with that content."""
        return self._by_digest.get(digest)

    def digests(self) -> Iterable[bytes]:
        """All contents, each once."""
        return self._by_digest.keys()

    def known_hash(self, name: str) -> int | None:
        """llama.cpp's hash of the main model's tensor, where it was learned, and its files have not changed since."""
        if self._main is None or not self._main[1].is_current:
            return None
        return self._hashes.get(name)

    def learn_hash(self, name: str, value: int) -> None:
        """Remember it; kept on disk by `save`."""
        self._hashes[name] = value

    def save(self) -> None:
        """Keep what was learned of the main model. Raises OSError."""
        if self._main is None or self._store is None or self._hashes == self._main[1].hashes:
            return
        path, digests = self._main
        learned = ModelDigests(digests.format, digests.files, digests.tensors, dict(self._hashes))
        self._main = (path, learned)
        self._store.save(path, learned)


def _placed(digests: ModelDigests, tensor: TensorDigest) -> DigestTensor:
    return DigestTensor(digests.files[tensor.file].path, tensor.offset, tensor.size, tensor.digest)
