"""What the core knows of a model, a machine, and a launch of the one on the other. Sizes are bytes.

In this order: a model, a machine and its speed, a split model, a launch, ggml's element types.
"""

import math
from enum import StrEnum
from typing import Annotated, Literal, NamedTuple

import msgspec

from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model_settings import EngineOptions, ModelSettings, takes_draft

LATER = msgspec.Meta(extra={"later": True})
"""Marks fields at the end of a struct that earlier versions do not know: at their defaults they do not travel."""


class ModelKind(StrEnum):
    """What a GGUF file is for."""

    CHAT = "chat"
    EMBEDDING = "embedding"
    RERANK = "rerank"
    DRAFT = "draft"
    PROJECTOR = "projector"


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


class LayerFacts(msgspec.Struct, frozen=True, array_like=True):
    """One layer of a model, in bytes.

    Attributes:
        weights: all its tensors.
        experts: of them, those of a mixture's experts.
        row: KV cache of one token, with f16 K and V.
        windowed: it sees only the last `ModelFacts.window` tokens.
        state: recurrent state of one slot.
        products: multiplications of one token's queries with keys, and weights with values, for each token of its
            context; not bytes.
    """

    weights: int
    experts: int = 0
    row: int = 0
    windowed: bool = False
    state: int = 0
    products: int = 0


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What placement needs of a GGUF header. Announced, except the fields that say so.

    Attributes:
        name: served name (file stem, or `general.name` of a built-in).
        kind: what it is offered as.
        size_bytes: all tensors' bytes, over all parts.
        layers: repeating blocks (`block_count`).
        context_train: longest trained context, tokens.
        embedding_length: width of the residual stream.
        vocabulary: number of tokens.
        kv_bytes_per_token: KV cache bytes of one token with f16 K and V, all layers.
        kv_window_bytes_per_token: the part of `kv_bytes_per_token` in layers that see only the last `window` tokens.
        window: tokens that those layers see; 0 where there are no such layers.
        state_bytes: recurrent state of one slot, for any context; 0 for pure attention.
        compute_width: most numbers per token at the widest point of a layer's computation; 0 unknown.
        companion_bytes: what its host loads beside it, such as a vision projector.
        output_bytes: bytes of the output layer and the token embedding.
        head_bytes: bytes of the output layer alone, also where it is the token embedding. Not announced.
        active_bytes: weights that one token reads; of a mixture of experts, the used ones. Not announced.
        weight_bits: bits per weight of matrices, on average. Not announced.
        layer_facts: each layer; empty where that is not known. Not announced.
        input_bytes: what is read with a prompt's tokens, before the first layer: the token embedding above all. Not
            announced.
        largest_bytes: the largest tensor of a layer. Not announced.
        mtp_layers: its last layers that guess tokens ahead (multi-token prediction), where the engine can use them. Not
            announced.
        mtp_row: KV cache bytes of one token in those layers, f16; not in `kv_bytes_per_token`. Not announced.
        quantises: every backend can keep its KV cache quantised, with flash attention. Not announced.
        architecture: `general.architecture`; of a projector, its kind (`clip.projector_type`).
        pooling: how an embedding model or reranker makes one vector of its tokens, as in `mean`; empty where the file
            does not say. Not announced.
        encoder: it has neither output layer nor KV cache. Not announced.
        fingerprint: 32 hex digits over the header and the size; equal for equal files.
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
    layer_facts: tuple[LayerFacts, ...] = ()
    input_bytes: int = 0
    largest_bytes: int = 0
    mtp_layers: int = 0
    mtp_row: int = 0
    quantises: bool = False
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


BYTES_PER_THREAD = 32 << 20
"""With fewer bytes of weights, a further CPU thread costs more in waiting than it computes."""

STEPS_PER_LAYER = 18
"""Operations of one layer that wait for each other, beside the read of its weights."""

_IN_CACHE = 16 << 20
_IN_MEMORY = 128 << 20


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of weights per second in the computation of one token, by the kind of weight."""

    f16: int = 0
    q8: int = 0
    q4: int = 0

    def of(self, bits: float) -> int:
        """The rate of the kind nearest to `bits` per weight."""
        return self.f16 if bits >= 12.0 else self.q8 if bits >= 6.8 else self.q4

    def slowed(self, factor: float) -> "Rates":
        """Rates of a machine that takes `factor` times as long."""
        return Rates(f16=int(self.f16 / factor), q8=int(self.q8 / factor), q4=int(self.q4 / factor))


class AttentionRates(msgspec.Struct, frozen=True, kw_only=True):
    """Multiplications of queries with keys, and of weights with values, per second; f16 keys and values.

    Attributes:
        prompt: many tokens at once, all threads or the accelerator; 0: not measured.
        token: one token, all threads or the accelerator; 0: not measured.
    """

    prompt: int = 0
    token: int = 0

    def slowed(self, factor: float) -> "AttentionRates":
        """Rates of a machine that takes `factor` times as long."""
        return AttentionRates(prompt=int(self.prompt / factor), token=int(self.token / factor))


_PROMPT_ATTENTION = 0.75
"""Where attention was not measured: its multiplications per second, relative to those of weights with many tokens.
Measured in llama.cpp on an AMD EPYC: 22.8 of 31.5 billion."""

_TOKEN_ATTENTION = 0.17
"""The same for one token on one thread of a processor, relative to weights in its cache. Measured there: 4.6 of
26.5 billion."""

_F16_BYTES = 2.0


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """How fast one machine computes, measured on the devices that its models use.

    Attributes:
        cores: CPU threads of `full`; 0 on accelerators, where only `full` counts.
        cached: one thread, weights in the processor's cache.
        one: one thread, weights in memory.
        full: all threads or the accelerator, weights in memory.
        step_ns: nanoseconds of one small operation, on one thread.
        full_step_ns: the same on all threads, which wait for each other.
        batch: all threads or the accelerator, many tokens of a prompt at once: bytes of weights that the tokens would
            read one by one, per second.
        attention: the part that grows with the context.
    """

    cores: int = 0
    cached: Rates = Rates()
    one: Rates = Rates()
    full: Rates = Rates()
    step_ns: int = 0
    full_step_ns: int = 0
    batch: Annotated[Rates, LATER] = Rates()
    attention: Annotated[AttentionRates, LATER] = AttentionRates()

    @property
    def known(self) -> bool:
        """Whether anything was measured."""
        return self.full.f16 > 0

    def slowed(self, factor: float) -> "Speed":
        """Speed of a machine that takes `factor` times as long; `factor` above 0."""
        return Speed(
            cores=self.cores,
            cached=self.cached.slowed(factor),
            one=self.one.slowed(factor),
            full=self.full.slowed(factor),
            step_ns=int(self.step_ns * factor),
            full_step_ns=int(self.full_step_ns * factor),
            batch=self.batch.slowed(factor),
            attention=self.attention.slowed(factor),
        )

    def seconds(self, bits: float, whole_bytes: int, read_bytes: float, layers: int) -> float:
        """Seconds of one token through a part of a model.

        Args:
            bits: per weight.
            whole_bytes: of the whole model; the number of threads depends on it.
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

    def prompt_seconds(self, bits: float, whole_bytes: int, read_bytes: float, tokens: int) -> float | None:
        """Seconds of `tokens` of a prompt through a part of a model; arguments as of `seconds`. None: not measured."""
        rate = self.batch.of(bits)
        return read_bytes * tokens / (rate * self._used(whole_bytes)) if rate else None

    def prompt_attention_seconds(self, whole_bytes: int, products: float) -> float:
        """Seconds that a prompt's tokens attend to each other and to what is before them.

        Args:
            whole_bytes: as of `seconds`.
            products: multiplications of all its tokens.
        """
        rate = self.prompt_attention
        return products / (rate * self._used(whole_bytes)) if rate else 0.0

    @property
    def prompt_attention(self) -> float:
        """Multiplications of a prompt's attention per second: measured, or else derived from `batch`."""
        return self.attention.prompt or _PROMPT_ATTENTION * self.batch.f16 / _F16_BYTES

    def token_attention_seconds(self, whole_bytes: int, products: float, cache_bytes: float) -> float:
        """Seconds that one token attends to its context.

        Args:
            whole_bytes: as of `seconds`.
            products: multiplications of the token.
            cache_bytes: of keys and values that it reads, f16.
        """
        read = cache_bytes / self.full.f16 if self.full.f16 else 0.0
        rate = self.attention.token or _TOKEN_ATTENTION * self.cached.f16 / _F16_BYTES * self.cores
        return max(read, products / (rate * self._used(whole_bytes))) if rate else read

    def _used(self, whole_bytes: int) -> float:
        """The part of the threads that an engine has for a model: as many for prompts as for answers."""
        return min(self.cores, 1 + whole_bytes // BYTES_PER_THREAD) / self.cores if self.cores else 1.0

    def _single(self, bits: float, size: float) -> float:
        """Rate of one thread over weights of `size` bytes: between cache and memory, by how much the cache can hold."""
        near, far = self.cached.of(bits), self.one.of(bits)
        if size <= _IN_CACHE:
            return near
        part = min(1.0, math.log(size / _IN_CACHE) / math.log(_IN_MEMORY / _IN_CACHE))
        return near ** (1.0 - part) * far**part


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """What a node offers to models.

    Attributes:
        memory_bytes: most memory for all models together, after the reserve and `--max-vram`: video memory on a node
            with a GPU, else main memory.
        memory_total_bytes: memory of the devices.
        devices: names of the devices for people, as in `NVIDIA RTX 4090` or `CPU`.
        engine: engine source and build, as in `embedded b11549`; empty where the node runs none.
        rpc_version: ggml RPC protocol, as in `8.0.0`; empty without RPC.
        speed: how fast it reads weights, once it was measured.
        host_bytes: on a node with a GPU: main memory for what does not fit into `memory_bytes`, after its reserve. An
            integrated GPU's memory is counted there only.
        host_speed: on such a node: how fast its processor reads weights, once it was measured.
    """

    memory_bytes: int = 0
    memory_total_bytes: int = 0
    devices: tuple[str, ...] = ()
    engine: str = ""
    rpc_version: str = ""
    speed: Speed = Speed()
    host_bytes: Annotated[int, LATER] = 0
    host_speed: Annotated[Speed, LATER] = Speed()

    @property
    def on_processor(self) -> bool:
        """Whether the processor computes the node's models: there is no memory beside a GPU's, and no GPU's speed."""
        return not self.host_bytes and (self.speed.cores > 0 or not self.speed.known)


MAX_SPLIT_NODES = 16
"""Most nodes that compute one model. Each costs every token a hop."""


class SplitShare(msgspec.Struct, frozen=True, kw_only=True):
    """One node's part of a split model.

    Attributes:
        node: its id.
        layers: number of repeating layers; the shares follow each other in the order of the layers.
        memory_bytes: planned memory of weights, cache and buffers there.
    """

    node: NodeId
    layers: int
    memory_bytes: int = 0


class SplitLayout(msgspec.Struct, frozen=True, kw_only=True):
    """How a model is split over nodes.

    Attributes:
        term: rises with every change of host or shares.
        shares: the host, then the workers in the order in which a token visits them.
        rpc_version: ggml RPC protocol of all nodes.
        micro_batch: tokens of a prompt that the host's engine has computed at once; 0: as many as usual
            (`placement.fit.batch_tokens`), or not known here.
        groups: engines of the host, each with an equal part of the slots, that share the weights.
        groups_why: why that many, as a clause for people; empty elsewhere than on the host.
    """

    term: int
    shares: tuple[SplitShare, ...]
    rpc_version: str = ""
    micro_batch: int = 0
    groups: int = 1
    groups_why: str = ""

    @property
    def host(self) -> SplitShare:
        """The part of the node that drives the others and answers requests."""
        return self.shares[0]

    @property
    def workers(self) -> tuple[SplitShare, ...]:
        """The parts of the other nodes."""
        return self.shares[1:]

    def share(self, node: NodeId) -> SplitShare | None:
        """The part of a node, if it has one."""
        return next((share for share in self.shares if share.node == node), None)


WireFormat = Literal["f32", "f16", "q8"]
"""How an activation travels from node to node: as it is, as half precision, or as blocks of eight bits."""

AUTO_WIRE = "auto"
"""Chosen by what is predicted to be gained (`performance.wire`)."""


class Wire(msgspec.Struct, frozen=True, kw_only=True):
    """How the activations of a split model travel: those of prompts, and those of single tokens."""

    prompts: WireFormat = "f32"
    tokens: WireFormat = "f32"

    @property
    def text(self) -> str:
        """In words, as in `f16` or `f16 for prompts, f32 for tokens`."""
        if self.prompts == self.tokens:
            return self.prompts
        return f"{self.prompts} for prompts, {self.tokens} for tokens"


class Lending(msgspec.Struct, frozen=True, kw_only=True):
    """This node computes a part of a model as a worker.

    Attributes:
        model: its name.
        host: the elected host; no other node may use this one.
        layout: of the group; its workers may push results to each other.
        memory_bytes: what this node reserves for it.
    """

    model: ModelName
    host: NodeId
    layout: SplitLayout
    memory_bytes: int


AUTO_CACHE = "auto"
"""The KV cache's element type is chosen."""

DEFAULT_SLOTS = 4
"""Requests answered at once where memory allows and the user did not choose."""

_SLOTS = (DEFAULT_SLOTS, 2, 1)
# Not 3: llama.cpp aborts if embeddings are pooled and the slots do not divide the batch (ggml_can_mul_mat).


class LaunchOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the user fixed by hand. None: choose.

    Attributes:
        context: tokens per slot (`--ctx-size`).
        slots: parallel requests (`--parallel`).
        draft: path of a draft model, or None (`--draft`).
        draft_max: most tokens drafted at once (`--draft-max`).
        use_draft: False with `--no-draft`, and where `--spec` names a kind of speculation without a draft.
        cache_type: KV cache element type, as in `f16` or `q8_0` (`--cache-type`); AUTO_CACHE: f16 where the wanted
            context fits, else q8_0, else q4_0.
        gpu_layers: layers on the GPU, counted from the last, on a node with one; more than there are: all
            (`--gpu-layers`).
        cpu_moe: of a mixture of experts: layers whose experts are in main memory, counted from the first (`--cpu-moe`).
        use_projector: False with `--no-mmproj`.
        most_slots: most parallel requests to choose where `slots` is None.
        engine: what is fixed of the engine beside the sizes.
    """

    context: int | None = None
    slots: int | None = None
    draft: str | None = None
    draft_max: int = 16
    use_draft: bool = True
    cache_type: str = "f16"
    gpu_layers: int | None = None
    cpu_moe: int | None = None
    use_projector: bool = True
    most_slots: int = DEFAULT_SLOTS
    engine: EngineOptions = EngineOptions()

    def adapted(self, settings: ModelSettings) -> "LaunchOptions":
        """These options with the settings of one model in their place."""
        engine, speculation = settings.engine, settings.speculation
        use_draft = self.use_draft if speculation is None else takes_draft(speculation)
        if speculation is None and settings.draft is None:
            engine = msgspec.structs.replace(engine, speculation=self.engine.speculation)
        return LaunchOptions(
            context=settings.ctx_size or self.context,
            slots=settings.parallel or self.slots,
            draft=settings.draft or self.draft,
            draft_max=settings.draft_max or self.draft_max,
            use_draft=use_draft or (speculation is None and settings.draft is not None),
            cache_type=settings.cache_type or self.cache_type,
            gpu_layers=_chosen(settings.gpu_layers, self.gpu_layers),
            cpu_moe=_chosen(settings.cpu_moe, self.cpu_moe),
            use_projector=self.use_projector if settings.mmproj is None else settings.mmproj,
            most_slots=self.most_slots,
            engine=engine,
        )

    @property
    def slots_to_try(self) -> tuple[int, ...]:
        """Numbers of slots to try, the best first."""
        return (self.slots,) if self.slots is not None else tuple(n for n in _SLOTS if n <= max(1, self.most_slots))


def _chosen(setting: int | str | None, otherwise: int | None) -> int | None:
    """A number of layers of a model's settings; `auto` is None, which means: choose."""
    return otherwise if setting is None else setting if isinstance(setting, int) else None


class Offload(msgspec.Struct, frozen=True, kw_only=True):
    """A model that is larger than video memory: what the GPU computes, and what the processor.

    Attributes:
        gpu_layers: layers on the GPU, counted from the last; with them the output layer. 0: the processor alone.
        cpu_moe: layers whose experts are in main memory, counted from the first.
        host_bytes: main memory.
    """

    gpu_layers: int
    cpu_moe: int = 0
    host_bytes: int = 0

    def divided(self, layers: int) -> bool:
        """Whether the processor computes a part of a model with so many layers; else only its input is there."""
        return self.gpu_layers < layers or self.cpu_moe > 0

    def text(self, layers: int) -> str:
        """For people, of a model with so many layers: `31 of 48 layers on the GPU, experts in memory`."""
        if not self.gpu_layers:
            return "all layers on the processor"
        whole = self.gpu_layers >= layers
        here = f"all {layers} layers on the GPU" if whole else f"{self.gpu_layers} of {layers} layers on the GPU"
        if self.cpu_moe <= layers - self.gpu_layers:
            return here
        return f"{here}, experts {'' if self.cpu_moe >= layers else f'of {self.cpu_moe} '}in memory"


class LaunchPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One launch that fits. The daemon makes an engine's command line of it.

    Attributes:
        model: what to launch.
        context: tokens that each slot can use.
        slots: requests answered at once.
        memory_bytes: what it takes on this node: of `Capacity.memory_bytes`.
        cache_type: KV cache element type.
        draft: the draft model found for it, if its memory is counted.
        split: the layout over several nodes; None: this node alone.
        offload: what is on the GPU and what in main memory, where both are needed; None: all on the node's devices.
    """

    model: ModelName
    context: int
    slots: int
    memory_bytes: int
    cache_type: str = "f16"
    draft: ModelName | None = None
    split: SplitLayout | None = None
    offload: Offload | None = None

    @property
    def host_bytes(self) -> int:
        """What it takes of `Capacity.host_bytes`."""
        return 0 if self.offload is None else self.offload.host_bytes


class GgmlType(NamedTuple):
    """One of ggml's element types. A row is a whole number of blocks of `block` elements and `bytes` bytes each.

    Source: `enum ggml_type` in ggml.h, and `ggml_blck_size` and `ggml_type_size` of the pinned engine build.
    """

    name: str
    block: int
    bytes: int

    @property
    def alignment(self) -> int:
        """Addresses are multiples of this. Blocks are structures with members of at most 4 bytes."""
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
"""By number. Gaps are types that were removed from the format."""

CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
"""Element types of a KV cache. Source: `kv_cache_types` in llama.cpp's common/arg.cpp."""

_BY_NAME = {kind.name: kind for kind in GGML_TYPES.values()}


def cache_row_bytes(cache_type: str, elements: int) -> int:
    """Bytes of `elements` cache elements, rounded up to whole blocks. Raises KeyError for an unknown type."""
    kind = _BY_NAME[cache_type]
    return -(-elements // kind.block) * kind.bytes
