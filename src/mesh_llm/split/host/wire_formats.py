"""In which format each activation travels: what the host wants, where both ends of the way know it."""

from mesh_llm.wire.ggml_rpc.activations import Bytes, Format, WireFormats, knows


class LinkFormats:
    """Of one engine's session. Workers are named by numbers; what a worker knows is in the answer that opens a session.

    Attributes:
        wanted: at this moment. Every message says its format, so it may change at any time.
    """

    def __init__(self, wanted: WireFormats) -> None:
        self.wanted = wanted
        self._known: dict[int, int] = {}

    def knows(self, worker: int, formats: int) -> None:
        """A worker reads and writes these formats."""
        self._known[worker] = formats

    def between_host_and(self, worker: int, tensor: Bytes) -> Format:
        """The format for a tensor (296 bytes) between the host and a worker."""
        wanted = self.wanted.of(tensor)
        return wanted if knows(self._known.get(worker, 0), wanted) else Format.F32

    def between(self, source: int, target: int, tensor: Bytes) -> Format:
        """The format for a tensor from worker to worker."""
        wanted = self.between_host_and(source, tensor)
        return wanted if knows(self._known.get(target, 0), wanted) else Format.F32

    @property
    def unable(self) -> frozenset[int]:
        """The workers that do not know all that is wanted: to them and from them it is F32."""
        return frozenset(
            worker for worker, known in self._known.items() if not all(knows(known, kind) for kind in self.wanted)
        )
