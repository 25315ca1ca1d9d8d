"""ggml's element types: how many elements make a block, and how many bytes a block takes.

Source: `enum ggml_type` in ggml.h, and `ggml_blck_size` and `ggml_type_size` of the pinned engine build.

How fast a machine reads weights, which is most of what generating a token takes. Measured at the edge.

How one model lies on several machines: who computes how many of its layers, and what that takes of their memory.

What the core knows of a model, of a machine, and of one launch of the one on the other. Sizes are bytes.
"""

import math
from enum import StrEnum
from typing import NamedTuple

import msgspec

from mesh_llm.core.types.ids import ModelName, NodeId


class GgmlType(NamedTuple):
    """One element type: a row is a whole number of blocks of `block` elements and `bytes` bytes each."""

    name: str
    block: int
    bytes: int

    @property
    def alignment(self) -> int:
        """What addresses are multiples of; blocks are structures of parts of 4 bytes at most."""
        return min(self.bytes & -self.bytes, 8 if self.block == 1 else 4)


GGML_TYPES: dict[int, GgmlType] = {
    0: GgmlType("f32", 1, 4),
    1: GgmlType("f16", 1, 2),
    2: GgmlType("q4_0", 32, 18),
    3: GgmlType("q4_1", 32, 20),
    6: GgmlType("q5_0", 32, 22),
    7: GgmlType("q5_1", 32, 24),
    8: GgmlType("q8_0", 32, 34),
    9: GgmlType("q8_1", 32, 36),
    10: GgmlType("q2_K", 256, 84),
    11: GgmlType("q3_K", 256, 110),
    12: GgmlType("q4_K", 256, 144),
    13: GgmlType("q5_K", 256, 176),
    14: GgmlType("q6_K", 256, 210),
    15: GgmlType("q8_K", 256, 292),
    16: GgmlType("iq2_xxs", 256, 66),
    17: GgmlType("iq2_xs", 256, 74),
    18: GgmlType("iq3_xxs", 256, 98),
    19: GgmlType("iq1_s", 256, 50),
    20: GgmlType("iq4_nl", 32, 18),
    21: GgmlType("iq3_s", 256, 110),
    22: GgmlType("iq2_s", 256, 82),
    23: GgmlType("iq4_xs", 256, 136),
    24: GgmlType("i8", 1, 1),
    25: GgmlType("i16", 1, 2),
    26: GgmlType("i32", 1, 4),
    27: GgmlType("i64", 1, 8),
    28: GgmlType("f64", 1, 8),
    29: GgmlType("iq1_m", 256, 56),
    30: GgmlType("bf16", 1, 2),
    34: GgmlType("tq1_0", 256, 54),
    35: GgmlType("tq2_0", 256, 66),
    39: GgmlType("mxfp4", 32, 17),
    40: GgmlType("nvfp4", 64, 36),
    41: GgmlType("q1_0", 128, 18),
    42: GgmlType("q2_0", 64, 18),
}
"""By number. The gaps are types that were removed from the format."""

CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
"""What a KV cache can be made of. Source: `kv_cache_types` in llama.cpp's common/arg.cpp."""

_BY_NAME = {kind.name: kind for kind in GGML_TYPES.values()}


def cache_row_bytes(cache_type: str, elements: int) -> int:
    """Bytes of `elements` cache elements, rounded up to whole blocks. Raises KeyError for an unknown type."""
    kind = _BY_NAME[cache_type]
    return -(-elements // kind.block) * kind.bytes


BYTES_PER_THREAD = 32 << 20
"""Weights below which a further CPU thread costs more in waiting for the others than it computes."""

STEPS_PER_LAYER = 18
"""Operations of one layer that wait for each other, beside reading its weights."""

_IN_CACHE = 16 << 20
_IN_MEMORY = 128 << 20


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of weights per second, while they are multiplied by one token's numbers, by the kind of weight."""

    f16: int = 0
    q8: int = 0
    q4: int = 0

    def of(self, bits: float) -> int:
        """For weights of so many bits each, on average: the nearest of the three."""
        return self.f16 if bits >= 12.0 else self.q8 if bits >= 6.8 else self.q4

    def slowed(self, factor: float) -> "Rates":
        """The same, each piece taking `factor` times as long."""
        return Rates(f16=int(self.f16 / factor), q8=int(self.q8 / factor), q4=int(self.q4 / factor))


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured on one machine, with the devices that its models use.

    Attributes:
        cores: CPU threads of `full`; 0 on accelerators, where only `full` counts.
        cached: one thread, weights that stay in the processor's cache.
        one: one thread, weights in memory.
        full: all threads or the accelerator, weights in memory.
        step_ns: nanoseconds of one small operation, on one thread.
        full_step_ns: the same on all threads, which have to wait for each other.
    """

    cores: int = 0
    cached: Rates = Rates()
    one: Rates = Rates()
    full: Rates = Rates()
    step_ns: int = 0
    full_step_ns: int = 0

    @property
    def known(self) -> bool:
        """Whether anything was measured."""
        return self.full.f16 > 0

    def slowed(self, factor: float) -> "Speed":
        """A machine that takes `factor` times as long for everything; `factor` above 0."""
        return Speed(
            cores=self.cores,
            cached=self.cached.slowed(factor),
            one=self.one.slowed(factor),
            full=self.full.slowed(factor),
            step_ns=int(self.step_ns * factor),
            full_step_ns=int(self.full_step_ns * factor),
        )

    def seconds(self, bits: float, whole_bytes: int, read_bytes: float, layers: int) -> float:
        """Of computing one token through a part of a model.

        Args:
            bits: of each weight.
            whole_bytes: of the whole model: the number of threads goes by it.
            read_bytes: weights of the part.
            layers: of the part.
        """
        full, steps = self.full.of(bits), layers * STEPS_PER_LAYER
        threads = 1 + whole_bytes // BYTES_PER_THREAD
        if not self.cores or (threads >= self.cores > 1):
            return read_bytes / full + steps * self.full_step_ns * 1e-9
        single = self._single(bits, read_bytes)
        if threads == 1 or self.cores == 1:
            return read_bytes / single + steps * self.step_ns * 1e-9
        return read_bytes / min(threads * single, max(single, full)) + steps * self.full_step_ns * 1e-9

    def _single(self, bits: float, size: float) -> float:
        """One thread over weights of `size` bytes: between cache and memory by how much of it the cache can hold."""
        near, far = self.cached.of(bits), self.one.of(bits)
        if size <= _IN_CACHE:
            return near
        part = min(1.0, math.log(size / _IN_CACHE) / math.log(_IN_MEMORY / _IN_CACHE))
        return near ** (1.0 - part) * far**part


MAX_SPLIT_NODES = 16
"""Nodes of one group that compute at once: each costs every token a hop."""


class SplitShare(msgspec.Struct, frozen=True, kw_only=True):
    """One node's part of a split model.

    Attributes:
        node: who.
        layers: how many of the model's repeating layers, in the order of the shares.
        memory_bytes: weights, cache and buffers there, as planned.
    """

    node: NodeId
    layers: int
    memory_bytes: int = 0


class SplitLayout(msgspec.Struct, frozen=True, kw_only=True):
    """A whole split model.

    Attributes:
        term: number of the group's present form; rises with every change of host or shares.
        shares: the host first, then the workers in the order in which a token visits them.
        rpc_version: ggml RPC protocol that all of them speak.
    """

    term: int
    shares: tuple[SplitShare, ...]
    rpc_version: str = ""

    @property
    def host(self) -> SplitShare:
        """The node that drives the others and answers requests."""
        return self.shares[0]

    @property
    def workers(self) -> tuple[SplitShare, ...]:
        """The other nodes."""
        return self.shares[1:]

    def share(self, node: NodeId) -> SplitShare | None:
        """A node's part, if it has one."""
        return next((share for share in self.shares if share.node == node), None)


class Lending(msgspec.Struct, frozen=True, kw_only=True):
    """This node computes a part of a model for its group's host.

    Attributes:
        model: which.
        host: the elected one; nobody else may use this node.
        layout: the group's form; its workers may hand each other what they computed.
        memory_bytes: what this node keeps free for it.
    """

    model: ModelName
    host: NodeId
    layout: SplitLayout
    memory_bytes: int


DEFAULT_SLOTS = 4
"""Requests answered at once, where memory allows and the user did not say."""

_SLOTS = (DEFAULT_SLOTS, 2, 1)
# Not 3: llama.cpp aborts where embeddings are pooled and the slots do not divide the batch (ggml_can_mul_mat).


class ModelKind(StrEnum):
    """What a GGUF file is good for."""

    CHAT = "chat"
    EMBEDDING = "embedding"
    RERANK = "rerank"
    DRAFT = "draft"
    PROJECTOR = "projector"


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a GGUF header tells, as far as placement needs it. Travels in announcements.

    Attributes:
        name: served name (file stem, or `general.name` of a built-in).
        kind: what it is offered as.
        size_bytes: all tensors' bytes, over all parts.
        layers: repeating blocks (`block_count`).
        context_train: longest context it was trained for, tokens.
        embedding_length: width of the residual stream.
        vocabulary: number of tokens.
        kv_bytes_per_token: KV cache bytes of one token with f16 K and V, all layers.
        kv_window_bytes_per_token: the part of `kv_bytes_per_token` in layers that see the last `window` tokens only.
        window: tokens that those layers see; 0 where there are none.
        state_bytes: recurrent state of one slot, whatever its context; 0 for pure attention.
        compute_width: numbers that one token needs at the widest point of a layer's computation, at most; 0 unknown.
        companion_bytes: what is loaded with it on its host besides, such as a vision projector.
        output_bytes: bytes of the output layer and the token embedding.
        head_bytes: bytes of the output layer alone, also where it is the token embedding. Does not travel.
        active_bytes: weights that one token reads: of a mixture of experts, those that are used. Does not travel.
        weight_bits: bits per weight of matrices, on average. Does not travel.
        architecture: `general.architecture`; of a projector, its kind (`clip.projector_type`).
        pooling: how an embedding model or reranker makes one vector of its tokens, as in `mean`; empty where the file
            does not say. Does not travel.
        encoder: it has neither output layer nor KV cache. Does not travel.
        fingerprint: 32 hex digits over the header and the size: the same file has the same one.
        source: where it can be fetched (`hf:owner/repo:file@revision`), or empty.
    """

    name: ModelName
    kind: ModelKind = ModelKind.CHAT
    size_bytes: int
    layers: int
    context_train: int
    embedding_length: int
    vocabulary: int
    kv_bytes_per_token: int
    kv_window_bytes_per_token: int = 0
    window: int = 0
    state_bytes: int = 0
    compute_width: int = 0
    companion_bytes: int = 0
    output_bytes: int = 0
    head_bytes: int = 0
    active_bytes: int = 0
    weight_bits: float = 0.0
    architecture: str = "llama"
    pooling: str = ""
    encoder: bool = False
    fingerprint: str = ""
    source: str = ""

    @property
    def one_batch(self) -> bool:
        """Whether an input must be computed in one batch, and so cannot be longer than that.

        Source: llama.cpp, tools/server/server-context.cpp, `can_split`.
        """
        return self.kind in {ModelKind.EMBEDDING, ModelKind.RERANK} and (
            self.encoder or self.pooling in {"mean", "cls"}
        )


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """What a node offers to models.

    Attributes:
        memory_bytes: the most that models may take in all, after reserve, `--max-vram` and the like.
        memory_total_bytes: what the devices have.
        devices: human names of the devices that would be used, as in `NVIDIA RTX 4090` or `CPU`.
        engine: engine source and build, as in `embedded b11549`; empty where the node runs none.
        rpc_version: ggml RPC protocol, as in `8.0.0`; empty where RPC is not there.
        speed: how fast it reads weights; measured once, and told when it is known.
    """

    memory_bytes: int = 0
    memory_total_bytes: int = 0
    devices: tuple[str, ...] = ()
    engine: str = ""
    rpc_version: str = ""
    speed: Speed = Speed()


class LaunchOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the user fixed by hand; None means: choose.

    Attributes:
        context: tokens per slot (`--ctx-size`).
        slots: parallel requests (`--parallel`).
        draft: path of a draft model, or None (`--draft`).
        draft_max: most tokens drafted at once (`--draft-max`).
        use_draft: False with `--no-draft`.
        cache_type: KV cache element type, as in `f16`, `q8_0`.
        use_projector: False with `--no-mmproj`.
        most_slots: parallel requests that may be chosen, where `slots` is left open.
    """

    context: int | None = None
    slots: int | None = None
    draft: str | None = None
    draft_max: int = 16
    use_draft: bool = True
    cache_type: str = "f16"
    use_projector: bool = True
    most_slots: int = DEFAULT_SLOTS

    @property
    def slots_to_try(self) -> tuple[int, ...]:
        """Numbers of slots to plan for, the best first."""
        return (self.slots,) if self.slots is not None else tuple(n for n in _SLOTS if n <= max(1, self.most_slots))


class LaunchPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One launch that fits: what the daemon turns into an engine's command line.

    Attributes:
        model: what to launch.
        context: tokens that each slot can use.
        slots: requests answered at once.
        memory_bytes: the sum that was checked against the capacity; of a split model this node's part.
        cache_type: KV cache element type.
        draft: model beside it that guesses ahead, where one was found for it and its memory is counted.
        split: who else computes a part of it; None for a launch on this node alone.
    """

    model: ModelName
    context: int
    slots: int
    memory_bytes: int
    cache_type: str = "f16"
    draft: ModelName | None = None
    split: SplitLayout | None = None


class ModelStatus(StrEnum):
    """State of a model on one node, or in the mesh."""

    COLD = "cold"
    LOADING = "loading"
    WARM = "warm"
    STOPPING = "stopping"
    FAILED = "failed"


class Role(StrEnum):
    """What a node does for the mesh."""

    SERVE = "serve"
    STANDBY = "standby"
    CLIENT = "client"
