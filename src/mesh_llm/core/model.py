"""What the core knows of a model, of a machine, and of one launch of the one on the other. Sizes are bytes."""

from enum import StrEnum

import msgspec

from mesh_llm.core.ids import ModelName
from mesh_llm.core.speed import Speed
from mesh_llm.core.split_layout import SplitLayout

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
