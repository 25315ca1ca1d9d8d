"""Facts that placement needs about a model, from its GGUF headers: kind, sizes, cache per token, weights per token.

Source of keys, defaults and rules: llama.cpp (llama-arch.cpp, llama-hparams.cpp, llama-model.cpp `create_memory`, and
the files of the architectures under src/models). If a rule is not known here, the layer counts in full: an estimate may
be too large, but not too small.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import GGML_TYPES, LayerFacts, ModelFacts, ModelKind
from mesh_llm.models.gguf.header import GgufError, GgufHeader, TensorInfo

_F16_BYTES = 2
_F32_BYTES = 4
_MAX_LAYERS = 512
_MAX_NUMBER = 1 << 24

# Every n-th layer sees the whole context, the others a window, if the file does not list the layers.
_WINDOW_PATTERN = {
    "cohere2": 4,
    "exaone4": 4,
    "gemma2": 2,
    "gemma3": 6,
    "gemma3n": 5,
    "gpt-oss": 2,
    "llama4": 4,
    "olmo2": 4,
}
_WINDOW_DEFAULT = {"llama4": 8192}
_WINDOW_UNUSED = frozenset({"phi3"})
_NO_CACHE = frozenset({
    "bert", "dream", "eurobert", "gemma-embedding", "gemma-embedding2", "jina-bert-v2", "jina-bert-v3", "llada",
    "llada-moe", "modern-bert", "neo-bert", "nomic-bert", "nomic-bert-moe", "rnd1",
})  # fmt: skip
_RECURRENT = frozenset({"arwkv7", "mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7"})
_RECURRENT_AND_ATTENTION = frozenset({"falcon-h1"})
_INTERVAL = frozenset({"minimax-01", "qwen35", "qwen35moe", "qwen3next", "qwen4exp"})

_PLAIN = frozenset({
    "gemma", "glm4", "granite", "granitemoe", "internlm2", "llama", "mistral3", "qwen2", "qwen2moe", "qwen3",
    "qwen3moe", "starcoder2",
})  # fmt: skip
"""Architectures with one ordinary KV cache, and positions in one dimension."""


class CacheShape(NamedTuple):
    """An ordinary KV cache: key and value heads of each layer; elements of a head's key, and of its value."""

    heads: tuple[int, ...]
    key: int
    value: int


class Shape:
    """The shape of a model, from the keys with its architecture's prefix."""

    def __init__(self, header: GgufHeader) -> None:
        self._header = header
        self.architecture = header.text("general.architecture")
        self.layers = self.number("block_count")
        if not 0 < self.layers <= _MAX_LAYERS:
            raise GgufError(f"it has {self.layers} layers, not 1 to {_MAX_LAYERS}")
        self.width = self.number("embedding_length")
        self.layers_ahead = min(self.layers, self.optional("nextn_predict_layers"))
        self._cached_layers = self.layers - self.layers_ahead
        self._heads = self._per_layer("attention.head_count", [0] * self.layers)
        self._kv_heads = self._per_layer("attention.head_count_kv", self._heads)
        head_size = self.width // max(1, *self._heads)
        self._key = self.optional("attention.key_length") or head_size
        self._value = self.optional("attention.value_length") or head_size
        self._is_mla = self.optional("attention.key_length_mla") > 0
        self._window = self._window_length()
        self._windowed = self._window_layers() if self._window else frozenset[int]()

    def number(self, key: str) -> int:
        """A required number. Raises GgufError if it is missing or out of bounds."""
        value = self._header.integer(f"{self.architecture}.{key}")
        if value is None:
            raise GgufError(f"it has no {self.architecture}.{key}, so it is no language model")
        return self._bounded(key, value)

    def optional(self, key: str) -> int:
        """A number; 0 if it is missing."""
        value = self._header.integer(f"{self.architecture}.{key}")
        return 0 if value is None else self._bounded(key, value)

    def cache_bytes_per_token(self) -> int:
        """KV cache of one token, f16, of all layers that have one."""
        return sum(self._cache_row(layer) for layer in self._attention_layers())

    def row_bytes_ahead(self) -> int:
        """KV cache of one token, f16, of the layers that guess tokens ahead, which have it only while they do."""
        return sum(self._cache_row(layer) for layer in range(self._cached_layers, self.layers))

    def plain_cache(self) -> CacheShape | None:
        """The cache's shape, where every layer attends to the whole context and nothing else is kept; else None."""
        plain = self.architecture in _PLAIN and not (self._window or self._is_mla or self._recurrent_layers())
        if not plain or len(self._attention_layers()) != self.layers:
            return None
        return CacheShape(tuple(self._kv_heads), self._key, self._value)

    def window(self) -> tuple[int, int]:
        """The sliding window, and the cache bytes per token of layers with it; (0, 0) if there is none."""
        row = sum(self._cache_row(layer) for layer in self._attention_layers() if layer in self._windowed)
        return (self._window, row) if row else (0, 0)

    def state_bytes(self) -> int:
        """Recurrent state of one slot, f32, of all layers that have one."""
        count = len(self._recurrent_layers())
        return count * self._state_numbers() * _F32_BYTES if count else 0

    def layer_facts(self, headers: Sequence[GgufHeader]) -> tuple[LayerFacts, ...]:
        """Weights, cache, state and attention of each layer."""
        weights, experts = [0] * self.layers, [0] * self.layers
        for tensor in _tensors(headers):
            match = _LAYER.match(tensor.name)
            if match is not None and int(match[1]) < self.layers:
                weights[int(match[1])] += tensor.size
                experts[int(match[1])] += tensor.size if _MOVED_EXPERTS.search(tensor.name) else 0
        cached, recurrent = set(self._attention_layers()), set(self._recurrent_layers())
        attending = self._attending_layers()
        state = self._state_numbers() * _F32_BYTES if recurrent else 0
        return tuple(
            LayerFacts(
                weights=weights[layer],
                experts=experts[layer],
                row=self._cache_row(layer) if layer in cached else 0,
                windowed=layer in self._windowed,
                state=state if layer in recurrent else 0,
                products=self._products(layer) if layer in attending else 0,
            )
            for layer in range(self.layers)
        )

    @property
    def quantises(self) -> bool:
        """Whether all backends have flash attention with quantised K and V for its heads."""
        sizes = {self._key, self._value, self.optional("attention.key_length_swa") or self._key}
        plain = not self._is_mla and self.architecture not in _NO_FLASH_ATTENTION
        return plain and len(sizes) == 1 and sizes <= _FLASH_HEADS

    def compute_width(self) -> int:
        """Upper bound of the numbers per token at the widest point of a layer.

        Derived from the buffers that the engine allocates for models of many shapes: a dense block holds three
        feed-forward rows and a few rows of the residual's width, experts two rows per used expert, attention three rows
        of queries.
        """
        width = self.width
        forward = max(self._per_layer("feed_forward_length", [4 * width] * self.layers))
        used = max(self._per_layer("expert_used_count", [0] * self.layers))
        expert = max(self._per_layer("expert_feed_forward_length", [forward] * self.layers))
        shared = self.optional("expert_shared_feed_forward_length") + self.optional("expert_shared_count") * expert
        mixture = 3 * (used * expert + shared) + 5 * width if used else 0
        gathered = 2 * used * width + 6 * width + 3 * shared
        heads = max(self._heads)
        query = 3 * heads * self._key + max(self._kv_heads) * (self._key + self._value) + 3 * width
        if self._is_mla:
            query += heads * self.optional("attention.key_length_mla") + 2 * width
        inner = 4 * self.optional("ssm.inner_size") + 5 * width
        return max(3 * forward + 5 * width, mixture, gathered, query, inner)

    def _bounded(self, key: str, value: int) -> int:
        # Context lengths reach tens of millions. Everything else is a dimension.
        if not 0 <= value <= (1 << 31 if key == "context_length" else _MAX_NUMBER):
            raise GgufError(f"its {self.architecture}.{key} of {value} makes no sense")
        return value

    def _per_layer(self, key: str, default: list[int]) -> list[int]:
        """One number per layer; the file has one for all, or a list."""
        array = self._header.array(f"{self.architecture}.{key}")
        if array is None:
            value = self._header.integer(f"{self.architecture}.{key}")
            return default if value is None else [self._bounded(key, value)] * self.layers
        values = array.values or ()
        if len(values) < self.layers:
            raise GgufError(f"its {self.architecture}.{key} has {array.count} entries for {self.layers} layers")
        return [self._bounded(key, value) if isinstance(value, int) else 0 for value in values[: self.layers]]

    def _head_sizes(self, layer: int) -> tuple[int, int]:
        """Elements of a head's key, and of its value."""
        if layer not in self._windowed:
            return self._key, self._value
        key, value = self.optional("attention.key_length_swa"), self.optional("attention.value_length_swa")
        return key or self._key, value or self._value

    def _cache_row(self, layer: int) -> int:
        key, value = self._head_sizes(layer)
        if self._is_mla:
            # Keys and values are one compressed row.
            value = 0
        return self._kv_heads[layer] * (key + value) * _F16_BYTES

    def _products(self, layer: int) -> int:
        """Multiplications of a token's attention for each token of its context."""
        return self._heads[layer] * sum(self._head_sizes(layer))

    def _attending_layers(self) -> frozenset[int]:
        """The layers with attention over a context, also where its keys and values are another layer's."""
        if self.architecture in _NO_CACHE or self.architecture in _RECURRENT:
            return frozenset()
        recurrent = () if self.architecture in _RECURRENT_AND_ATTENTION else self._recurrent_layers()
        return frozenset(range(self._cached_layers)).difference(recurrent)

    def _attention_layers(self) -> list[int]:
        if self.architecture in _NO_CACHE or self.architecture in _RECURRENT:
            return []
        last = self._cached_layers
        if self.architecture == "gemma3n":
            last = min(last, 20)
        last = max(0, last - self.optional("attention.shared_kv_layers"))
        recurrent: set[int] = set()
        if self.architecture not in _RECURRENT_AND_ATTENTION:
            recurrent = set(self._recurrent_layers())
        return [layer for layer in range(last) if layer not in recurrent]

    def _recurrent_layers(self) -> list[int]:
        layers = range(self._cached_layers)
        if self.architecture in _RECURRENT or self.architecture in _RECURRENT_AND_ATTENTION:
            return list(layers)
        if self.architecture in _INTERVAL:
            interval = self.optional("full_attention_interval") or 4
            listed = self._per_layer("attention.recurrent_layers", [])
            return [at for at in layers if (listed[at] if listed else (at + 1) % interval)]
        return [layer for layer in layers if self._kv_heads[layer] == 0]

    def _state_numbers(self) -> int:
        """Convolution and state of one recurrent layer. Source: `n_embd_r` and `n_embd_s` in llama-hparams.cpp."""
        if head := self.optional("wkv.head_size"):
            return (self.optional("token_shift_count") or 2) * self.width + self.width * head
        if length := self.optional("shortconv.l_cache"):
            return self.width * (length - 1)
        kernel = max(0, self.optional("ssm.conv_kernel") - 1)
        if head := self.optional("kda.head_dim"):
            return 3 * (kernel or 3) * max(self._heads) * head + head * head * max(self._heads)
        if self.architecture == "minimax-01":
            return self._key * self._key * max(self._heads)
        state, inner = self.optional("ssm.state_size"), self.optional("ssm.inner_size")
        return kernel * (inner + 2 * self.optional("ssm.group_count") * state) + state * inner

    def _window_length(self) -> int:
        if self.architecture in _WINDOW_UNUSED:
            return 0
        return self.optional("attention.sliding_window") or _WINDOW_DEFAULT.get(self.architecture, 0)

    def _window_layers(self) -> frozenset[int]:
        key = "attention.sliding_window_pattern"
        if self._header.array(f"{self.architecture}.{key}") is not None:
            listed = self._per_layer(key, [])
            return frozenset(layer for layer in range(self.layers) if listed[layer])
        every = self._header.integer(f"{self.architecture}.{key}")
        if every is None:
            every = _WINDOW_PATTERN.get(self.architecture, 1)
        return frozenset(layer for layer in range(self.layers) if every == 0 or layer % every < every - 1)


_LAYER = re.compile(r"blk\.(\d{1,4})\.")
_MOVED_EXPERTS = re.compile(r"\.ffn_(up|down|gate|gate_up)_(ch|)exps")
"""The tensors that llama.cpp's `--n-cpu-moe` keeps in main memory (common/common.h, `LLM_FFN_EXPS_REGEX`)."""
_HEAD = re.compile(r"\.nextn\.eh_proj\.")
MTP_ARCHITECTURES = frozenset({
    "bailingmoe3", "cohere2moe", "deepseek2", "deepseek32", "deepseek4", "glm-dsa", "glm4moe", "glm5-next", "hy_v3",
    "mimo2", "nemotron_h_moe", "qwen35", "qwen35moe", "qwen3next", "qwen4exp", "step35",
})  # fmt: skip
"""Architectures whose own heads the pinned engine can run: those with a `graph_mtp` in llama.cpp, src/models. It ends
its process where others are asked to guess."""
_INPUTS = re.compile(r"(token_embd|per_layer_token_embd|position_embd|token_types|token_embd_norm)\.")
_FLASH_HEADS = frozenset({64, 128, 256})
"""Head sizes with vector kernels for quantised caches in each backend (ggml-cuda/fattn.cu; the others take more)."""
_NO_FLASH_ATTENTION = frozenset({"grok"})
_EMBEDDING = "token_embd.weight"
_OUTPUT = "output.weight"
_NOT_LAYERS = frozenset({_EMBEDDING, _OUTPUT})
_EXPERTS = "_exps."


def head_bytes(headers: Sequence[GgufHeader]) -> int:
    """Bytes of the output layer. Without one, a model uses its token embedding."""
    sizes = {tensor.name: tensor.size for tensor in _tensors(headers)}
    return sizes.get(_OUTPUT, sizes.get(_EMBEDDING, 0))


def active_bytes(headers: Sequence[GgufHeader], shape: Shape) -> int:
    """Bytes that one token reads: all weights but the token embedding and the experts that are not used."""
    used, there = shape.optional("expert_used_count"), shape.optional("expert_count")
    part = used / there if 0 < used < there else 1.0
    layers = (tensor for tensor in _tensors(headers) if tensor.name not in _NOT_LAYERS)
    read = sum(tensor.size * (part if _EXPERTS in tensor.name else 1.0) for tensor in layers)
    return int(read) + head_bytes(headers)


def mtp_layers(headers: Sequence[GgufHeader], shape: Shape) -> int:
    """Layers that guess tokens ahead (MTP), if they are in the file, and the pinned engine has code for them.

    Many files name such layers and do not have them: whoever made the file left them out.
    """
    there = any(_HEAD.search(tensor.name) for tensor in _tensors(headers))
    return shape.layers_ahead if there and shape.architecture in MTP_ARCHITECTURES else 0


def weight_bits(headers: Sequence[GgufHeader]) -> float:
    """Mean bits per weight of the layers' matrices. Vectors are few, and of another type."""
    size = elements = 0
    for tensor in _tensors(headers):
        kind = GGML_TYPES.get(tensor.type)
        if kind is not None and len(tensor.shape) > 1 and tensor.name not in _NOT_LAYERS:
            size += tensor.size
            elements += tensor.size // kind.bytes * kind.block
    return round(8.0 * size / elements, 2) if elements else 0.0


def _tensors(headers: Sequence[GgufHeader]) -> Iterator[TensorInfo]:
    return (tensor for header in headers for tensor in header.tensors)


_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})$")
_DRAFT_NAME = re.compile(r"(^|[-_.])draft([-_.]|$)", re.IGNORECASE)
_NOT_MODELS = {
    "adapter": "it is a LoRA adapter, not a model",
    "vocab": "it holds a vocabulary only",
    "imatrix": "it holds an importance matrix, not a model",
}
# Ollama writes these for its own engine, under names that llama.cpp does not know.
_OTHER_ENGINES = frozenset({"gptoss", "mllama"})
_EMBEDDING_ARCHITECTURES = frozenset({
    "bert", "eurobert", "gemma-embedding", "gemma-embedding2", "jina-bert-v2", "jina-bert-v3", "llama-embed",
    "modern-bert", "neo-bert", "nomic-bert", "nomic-bert-moe", "t5encoder",
})  # fmt: skip
_POOLING = ("none", "mean", "cls", "last", "rank")
"""`{arch}.pooling_type` by number (llama.h, `llama_pooling_type`)."""
_DRAFT_ARCHITECTURES = frozenset({"dflash", "eagle3", "gemma4-assistant"})


def split_part_name(stem: str) -> tuple[str, int, int]:
    """Split `name-00002-of-00005` into name, number (from 1) and count; (stem, 1, 1) for a model in one file."""
    match = _PART.match(stem)
    if match is None:
        return stem, 1, 1
    return match["stem"], int(match["number"]), int(match["count"])


def read_facts(headers: Sequence[GgufHeader], name: str, source: str = "") -> ModelFacts:
    """Facts of a model, from the headers of all its parts in order.

    Raises:
        GgufError: it is no complete model that llama.cpp can use.
    """
    first = headers[0]
    _check_parts(headers)
    kind = _kind(first, name)
    if kind is ModelKind.PROJECTOR:
        return _projector(headers, name, source)
    shape = Shape(first)
    vocabulary = _vocabulary(first, shape)
    if not any(header.tensors for header in headers):
        raise GgufError("it holds no tensors")
    window, window_bytes = shape.window()
    ahead = mtp_layers(headers, shape)
    return ModelFacts(
        name=ModelName(name),
        kind=kind,
        size_bytes=sum(tensor.size for tensor in _tensors(headers)),
        layers=shape.layers,
        context_train=shape.number("context_length"),
        embedding_length=shape.width,
        vocabulary=vocabulary,
        kv_bytes_per_token=shape.cache_bytes_per_token(),
        kv_window_bytes_per_token=window_bytes,
        window=window,
        state_bytes=shape.state_bytes(),
        compute_width=shape.compute_width(),
        output_bytes=sum(tensor.size for tensor in _tensors(headers) if tensor.name in _NOT_LAYERS),
        head_bytes=head_bytes(headers),
        active_bytes=active_bytes(headers, shape),
        weight_bits=weight_bits(headers),
        layer_facts=shape.layer_facts(headers),
        input_bytes=sum(tensor.size for tensor in _tensors(headers) if _INPUTS.match(tensor.name)),
        largest_bytes=max((one.size for one in _tensors(headers) if _LAYER.match(one.name)), default=0),
        mtp_layers=ahead,
        mtp_row=shape.row_bytes_ahead() if ahead else 0,
        quantises=shape.quantises,
        architecture=shape.architecture,
        pooling=_pooling(first) if kind in {ModelKind.EMBEDDING, ModelKind.RERANK} else "",
        encoder=shape.architecture in _EMBEDDING_ARCHITECTURES,
        fingerprint=_fingerprint(headers),
        source=source,
    )


def _check_parts(headers: Sequence[GgufHeader]) -> None:
    first = headers[0]
    count = first.integer("split.count") or 1
    if count != len(headers):
        raise GgufError(f"it has {count} parts, of which {len(headers)} are there", incomplete=len(headers) < count)
    if count == 1:
        return
    for number, header in enumerate(headers):
        if header.integer("split.no") != number or header.integer("split.count") != count:
            raise GgufError(f"its part {number + 1} of {count} belongs to another model")
    declared = first.integer("split.tensors.count")
    found = sum(1 for _ in _tensors(headers))
    if declared is not None and declared != found:
        raise GgufError(f"its parts have {found} tensors, but {declared} are declared")


def _kind(header: GgufHeader, name: str) -> ModelKind:
    architecture = header.text("general.architecture")
    if not architecture:
        raise GgufError("it names no architecture")
    file_type = header.text("general.type")
    if file_type in _NOT_MODELS:
        raise GgufError(_NOT_MODELS[file_type])
    if architecture in _OTHER_ENGINES:
        raise GgufError(f"it is made for Ollama's own engine (architecture {architecture})")
    if architecture == "clip" or file_type in {"mmproj", "projector"}:
        return ModelKind.PROJECTOR
    if architecture in _DRAFT_ARCHITECTURES or _DRAFT_NAME.search(name):
        return ModelKind.DRAFT
    pooling = _pooling(header)
    if pooling == "rank" or _has_classifier(header):
        return ModelKind.RERANK
    if architecture in _EMBEDDING_ARCHITECTURES or pooling not in {"", "none"}:
        return ModelKind.EMBEDDING
    return ModelKind.CHAT


def _pooling(header: GgufHeader) -> str:
    number = header.integer(f"{header.text('general.architecture')}.pooling_type")
    return _POOLING[number] if number is not None and 0 <= number < len(_POOLING) else ""


def _has_classifier(header: GgufHeader) -> bool:
    """Whether an encoder has a classification head: so do rerankers without a pooling type."""
    encoder = header.text("general.architecture") in _EMBEDDING_ARCHITECTURES
    return encoder and any(tensor.name in {"cls.weight", "cls.output.weight"} for tensor in header.tensors)


def _projector(headers: Sequence[GgufHeader], name: str, source: str) -> ModelFacts:
    return ModelFacts(
        name=ModelName(name),
        kind=ModelKind.PROJECTOR,
        size_bytes=sum(tensor.size for tensor in _tensors(headers)),
        layers=0,
        context_train=0,
        embedding_length=headers[0].integer("clip.vision.projection_dim") or 0,
        vocabulary=0,
        kv_bytes_per_token=0,
        architecture=_projector_type(headers[0]),
        fingerprint=_fingerprint(headers),
        source=source,
    )


def _projector_type(header: GgufHeader) -> str:
    keys = ("clip.projector_type", "clip.vision.projector_type", "clip.audio.projector_type")
    return next((kind for key in keys if (kind := header.text(key))), header.text("general.architecture"))


def _vocabulary(header: GgufHeader, shape: Shape) -> int:
    tokens = header.array("tokenizer.ggml.tokens")
    count = tokens.count if tokens is not None else shape.optional("vocab_size")
    if count == 0:
        raise GgufError("it has no vocabulary, so it is no language model")
    return count


def _fingerprint(headers: Sequence[GgufHeader]) -> str:
    if len(headers) == 1:
        return headers[0].digest
    return hashlib.blake2b("".join(header.digest for header in headers).encode(), digest_size=16).hexdigest()
