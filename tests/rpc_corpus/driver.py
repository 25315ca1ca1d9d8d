"""One model in a process of its own: `python -m tests.rpc_corpus.driver CASE`, with a Case as JSON.

A wrong guess at a shape aborts llama.cpp, so nothing else runs in here. The last line of the output is a Result.
"""

import ctypes
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec
from tests.rpc_corpus import architectures
from tests.rpc_corpus.llama import BF16, F16, F32, Llama, Model, ModelParams, RefusedModelError, Row, tokens

from mesh_llm.core.types.model import GGML_TYPES
from mesh_llm.engine.sources.embedded.ggml import Ggml


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """What to record.

    Attributes:
        architecture: its name in GGUF.
        plugin: the RPC plugin's library.
        endpoints: where the recorders listen, one for each worker.
        experts: with experts, where the architecture can go without.
        contexts: names of `CONTEXTS`.
        least: with no tensor that the architecture can do without; otherwise with all that it may have.
        fused: with one matrix for queries, keys and values; together with `least`.
        weights: type of the matrices.
        output_on_host: the output layer stays with the host, as the product has it.
        target: the architecture that this one guesses for; none in most cases.
        more: values of the metadata in place of the usual ones.
    """

    architecture: str
    plugin: str
    endpoints: tuple[str, ...]
    experts: bool = True
    least: bool = False
    contexts: tuple[str, ...] = ("plain",)
    fused: bool = False
    weights: int = 0
    output_on_host: bool = False
    target: str = ""
    more: dict[str, int] = {}


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """How it went: `done` contexts, and what failed by name of the context (`model`: it did not load)."""

    done: tuple[str, ...] = ()
    failed: dict[str, str] = {}


BATCH = 64
MICRO_BATCH = 16
_SEQUENCES = 4
_SHARES = (1.0, 2.5)
"""Of two workers: the output counts as a layer, so that of two layers each has one."""

_RANK = 4
"""Of a LoRA adapter."""

EVERYTHING = ("prompt", "sequences", "shift", "state")
Fields = dict[str, object]
_OFF: Fields = {"flash_attn_type": 0}
_ON: Fields = {"flash_attn_type": 1}
_POOLED: Fields = {"embeddings": True, **_OFF}


def _cache(kind: int) -> Fields:
    return {"type_k": kind, "type_v": kind, **_ON}


CONTEXTS: dict[str, tuple[Fields, tuple[str, ...]]] = {
    "plain": (_OFF, EVERYTHING),
    "flash": (_ON, EVERYTHING),
    "flash-q8_0": (_cache(8), EVERYTHING),
    "flash-q4_0": (_cache(2), EVERYTHING),
    "flash-f32": (_cache(0), EVERYTHING),
    "flash-bf16": (_cache(30), EVERYTHING),
    "flash-q4_1": (_cache(3), EVERYTHING),
    "flash-q5_0": (_cache(6), EVERYTHING),
    "flash-q5_1": (_cache(7), EVERYTHING),
    "flash-iq4_nl": (_cache(20), EVERYTHING),
    "k-q8_0": ({"type_k": 8, **_OFF}, EVERYTHING),
    "unified": ({"kv_unified": True, **_ON}, EVERYTHING),
    "plain-unified": ({"kv_unified": True, **_OFF}, EVERYTHING),
    "swa-full": ({"swa_full": True, **_ON}, EVERYTHING),
    "one": ({"n_seq_max": 1, **_OFF}, ("prompt", "shift")),
    "large": ({"n_ctx": 4096, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, **_ON}, ("long", "prompt")),
    "short": (_OFF, ("short",)),
    "short-flash": (_ON, ("short",)),
    "rows": (_ON, ("rows",)),
    "mixed": (_ON, ("mixed",)),
    "lora": (_ON, ("lora",)),
    "control": (_ON, ("control",)),
    "draft": (_ON, ("draft",)),
    "mtp": ({"ctx_type": 1, **_ON}, ("draft",)),
    "mean": ({"pooling_type": 1, **_POOLED}, ("pooled",)),
    "cls": ({"pooling_type": 2, **_POOLED}, ("pooled",)),
    "last": ({"pooling_type": 3, **_POOLED}, ("pooled",)),
    "rank": ({"pooling_type": 4, **_POOLED}, ("pooled",)),
    "embeddings": ({"pooling_type": 0, "embeddings": True, **_ON}, EVERYTHING),
}
"""Fields of llama_context_params, and what is done: names of methods of `_Run`."""


class _Run:
    """One context, and what is done in it."""

    def __init__(self, architecture: str, fields: Mapping[str, object], model: Model, context: int) -> None:
        self._architecture = architecture
        self._fields = fields
        self._model = model
        self._call = model.llama.call
        self._context = context
        self._memory = self._call["llama_get_memory"](context)

    def run(self, phases: Sequence[str]) -> None:
        """Do these, as far as the model has a memory for them."""
        if set(phases) <= {"pooled", "rows", "mixed", "draft"}:
            phases = list(phases)
        elif not self._memory or (self._model.ask("has_encoder") and not self._model.ask("has_decoder")):
            phases = ["pooled"]
        elif self._model.ask("has_encoder"):
            self._do("llama_encode", {0: (0, 12)}, "all")
        for phase in phases:
            getattr(self, phase)()

    def pooled(self) -> None:
        """Texts of one and of several clients, whole."""
        self._call["llama_set_embeddings"](self._context, True)
        verb = "llama_decode" if self._memory or not self._model.ask("has_encoder") else "llama_encode"
        self._do(verb, {0: (0, 12)}, "all")
        if self._memory:
            self._call["llama_memory_clear"](self._memory, True)
        if self._architecture not in architectures.ONE_TEXT:
            self._do(verb, {0: (0, 5), 1: (0, 7)}, "all")

    def short(self) -> None:
        """A prompt, and a token."""
        self._decode({0: (0, 5)}, "last")
        self._decode({0: (5, 1)}, "last")

    def long(self) -> None:
        """A prompt of several micro-batches of the size that the product has; then it is taken back."""
        self._decode({0: (0, 1300)}, "last")
        self._decode({0: (1300, 1)}, "last")
        self._call["llama_memory_clear"](self._memory, True)

    def rows(self) -> None:
        """An image's rows between tokens, as a projector gives them; causal, then not."""
        width = self._model.ask("n_embd_inp")
        self._process("DECODE", [Row(position) for position in range(3)])
        self._process("DECODE", [Row(position, width=width) for position in range(3, 9)])
        self._call["llama_set_causal_attn"](self._context, False)
        self._process("DECODE", [Row(position, width=width) for position in range(9, 15)])
        self._call["llama_set_causal_attn"](self._context, True)
        self._process("DECODE", [Row(position) for position in range(15, 18)])

    def mixed(self) -> None:
        """Tokens and an image's rows in one micro-batch."""
        width = self._model.ask("n_embd_inp")
        self._process("DECODE", [Row(position, width=width if 3 <= position < 8 else 0) for position in range(12)])

    def draft(self) -> None:
        """What a model that guesses for another one gets: the other's hidden state with each token."""
        features = architectures.FEATURES.get(self._architecture, 0)
        state = architectures.WIDTH if self._architecture not in architectures.TAKES_NO_STATE else 0
        if features:
            self._process("ENCODE", [Row(position, width=features) for position in range(6)])
        self._process("DECODE", [Row(position, token=True, state=state) for position in range(6)])
        self._process("DECODE", [Row(6, token=True, state=state)])

    def lora(self) -> None:
        """With an adapter on the matrices, and without it again."""
        tensors: dict[str, tuple[int, list[int]]] = {}
        for name, shape in self._model.tensors.items():
            if re.search(r"blk\.\d+\.(attn_[qkv]|attn_output|ffn_\w+)\.weight", name) and len(shape) > 1:
                if "norm" in name or "gate_inp" in name:
                    continue
                tensors[f"{name}.lora_a"] = (F32, [shape[0], _RANK, *shape[2:]])
                tensors[f"{name}.lora_b"] = (F32, [_RANK, shape[1], *shape[2:]])
        values: architectures.Values = {
            "general.type": "adapter", "general.architecture": self._architecture, "adapter.type": "lora",
            "adapter.lora.alpha": 8.0,
        }  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "lora.gguf"
            self._model.llama.write(path, values, tensors)
            adapter = self._call["llama_adapter_lora_init"](self._model.handle, str(path).encode())
        if not adapter:
            raise RefusedModelError(self._model.llama.why())
        self._call["llama_set_adapters_lora"](
            self._context, (ctypes.c_void_p * 1)(adapter), 1, (ctypes.c_float * 1)(0.5)
        )
        self.short()
        self._call["llama_set_adapters_lora"](self._context, None, 0, None)
        self._decode({0: (6, 1)}, "last")

    def control(self) -> None:
        """With a control vector."""
        size = architectures.WIDTH * (architectures.LAYERS - 1)
        vector = (ctypes.c_float * size)(*([0.01] * size))
        self._call["llama_set_adapter_cvec"](self._context, vector, size, architectures.WIDTH, 1, architectures.LAYERS)
        self.short()

    def prompt(self) -> None:
        """A prompt of several micro-batches, tokens, guesses that are checked and taken back."""
        self._decode({0: (0, 2 * MICRO_BATCH + 5)}, "last")
        first = 2 * MICRO_BATCH + 5
        for position in range(first, first + 3):
            self._decode({0: (position, 1)}, "last")
        self._decode({0: (first + 3, 4)}, "all")
        if self._call["llama_memory_seq_rm"](self._memory, 0, first + 5, -1):
            self._decode({0: (first + 5, 1)}, "last")

    def sequences(self) -> None:
        """Other clients come, one with a long prompt that has no outputs yet; then a token of each."""
        self._decode({1: (0, 6), 2: (0, 3)}, "last")
        self._decode({3: (0, MICRO_BATCH)}, "none")
        following = {sequence: (self._next(sequence), 1) for sequence in (0, 1, 2, 3)}
        self._decode(following, "last")

    def shift(self) -> None:
        """A sequence's beginning is dropped and the rest moved up."""
        kind = self._fields.get("type_k", F16)
        if kind == BF16 or (self._architecture in architectures.SHIFT_FALLS and kind not in {F32, F16}):
            # The kernel of ROPE takes no BF16: the rpc-server ends.
            return
        if self._call["llama_memory_can_shift"](self._memory) and self._call["llama_memory_seq_rm"](
            self._memory, 0, 4, 12
        ):
            self._call["llama_memory_seq_add"](self._memory, 0, 12, -1, -8)
            self._decode({0: (self._next(0), 1)}, "last")

    def state(self) -> None:
        """A sequence is copied; its state is saved, and put back as another one's."""
        self._call["llama_memory_seq_rm"](self._memory, 3, -1, -1)
        self._call["llama_memory_seq_cp"](self._memory, 1, 3, -1, -1)
        self._decode({3: (self._next(3), 1)}, "last")
        size = self._call["llama_state_seq_get_size"](self._context, 1)
        data = ctypes.create_string_buffer(size)
        if self._call["llama_state_seq_get_data"](self._context, data, size, 1):
            self._call["llama_state_seq_set_data"](self._context, data, size, 2)
            self._decode({2: (self._next(2), 1)}, "last")

    def _next(self, sequence: int) -> int:
        return self._call["llama_memory_seq_pos_max"](self._memory, sequence) + 1

    def _decode(self, sequences: dict[int, tuple[int, int]], outputs: str) -> None:
        self._do("llama_decode", sequences, outputs)

    def _process(self, kind: str, rows: Sequence[Row]) -> None:
        status = self._model.llama.process(self._context, kind == "ENCODE", rows)
        self._call["llama_synchronize"](self._context)
        if status:
            raise RefusedModelError(f"{kind} of {len(rows)} rows gives {status}: {self._model.llama.why()}")

    def _do(self, verb: str, sequences: dict[int, tuple[int, int]], outputs: str) -> None:
        outputs = "all" if self._architecture in architectures.WANTS_ALL_OUTPUTS else outputs
        batch, held = tokens(sequences, outputs, architectures.VOCABULARY)
        status = self._call[verb](self._context, batch)
        self._call["llama_synchronize"](self._context)
        del held
        if status:
            raise RefusedModelError(f"{verb} of {sequences} gives {status}: {self._model.llama.why()}")


_KEPT_F32 = re.compile(
    r"norm|ffn_gate_inp|altup|laurel|per_layer_model_proj|position_embd|token_types|conv|time_mix_(first|[wavg]\d|decay_w)"
    r"|lerp|attn_rel_b|hc_|indexer|ssm_[fg]_[ab]|ssm_beta|attn_kv_a_mqa|attn_[kv]_b"
)
"""Tensors that the engine's quantiser leaves alone (src/llama-quant.cpp, tensor_allows_quantization)."""

_KEPT_F32_BESIDE_F16 = re.compile(
    r"norm|ffn_gate_inp|altup|laurel|position_embd|token_types|ssm_conv1d|shortconv|time_mix|lerp|hc_|ape|attn_rel_b"
)
"""Tensors that the engine's converter leaves alone, and kernels take for F32."""


def _type_of(case: Case, name: str, shape: Sequence[int]) -> int:
    """The type of a tensor in a file whose weights have the case's type."""
    if case.weights == F32 or len(shape) < 2 or not name.endswith("weight"):
        return F32
    if case.weights != F16 and _KEPT_F32.search(name):
        return F32
    if case.weights == F16 and _KEPT_F32_BESIDE_F16.search(name):
        return F32
    if shape[0] % GGML_TYPES[case.weights].block:
        return F16
    return case.weights


def _contexts(case: Case, model: Model, other: Model | None) -> Iterator[tuple[str, str]]:
    common = {
        "n_ctx": 128 * _SEQUENCES, "n_batch": BATCH, "n_ubatch": MICRO_BATCH, "n_seq_max": _SEQUENCES, "n_threads": 1,
        "n_threads_batch": 1,
    }  # fmt: skip
    for name in case.contexts:
        fields, phases = CONTEXTS[name]
        print(f"context {name}", flush=True)
        why = ""
        try:
            with ExitStack() as stack:
                if other is not None:
                    target = stack.enter_context(other.context(**(common | {**_ON})))
                    _Run(case.target, {}, other, target).short()
                    fields = {**fields, "ctx_other": target}
                context = stack.enter_context(model.context(**(common | fields)))
                _Run(case.architecture, fields, model, context).run(phases)
        except RefusedModelError as error:
            why = str(error)
        yield name, why


def main(arguments: list[str]) -> int:
    """Run a case; the exit status is 0 also where something failed in a way that the result tells."""
    case = msgspec.json.decode(arguments[0], type=Case)
    ggml = Ggml()
    registry = ggml.load_plugin(Path(case.plugin))
    before = {device for device, _ in ggml.devices()}
    ggml.add_rpc_servers(registry, case.endpoints)
    devices = [device for device, _ in ggml.devices() if device not in before]
    llama = Llama(ggml)
    params = llama.model_params(devices, _SHARES[: len(devices)], case.output_on_host)
    params.load_mtp = bool(case.target)
    more = {f"{case.architecture}.{key}": value for key, value in case.more.items()}
    values = architectures.values(case.architecture, experts=case.experts, more=more)
    try:
        model = _least(llama, values, case, params) if case.least else _most(llama, values, params)
    except RefusedModelError as error:
        # An architecture that does not know such a matrix leaves it over.
        without = case.fused and "wrong number of tensors" in str(error)
        result = Result() if without else Result(failed={"model": str(error)})
    else:
        other = None
        if case.target:
            own = architectures.values(case.target, experts=True)
            other = model if case.target == case.architecture else llama.build(own, {}, params)
        if case.fused and not any("attn_qkv" in name for name in model.tensors):
            case = msgspec.structs.replace(case, contexts=())
        went = dict(_contexts(case, model, other))
        model.free()
        result = Result(
            done=tuple(name for name, why in went.items() if not why),
            failed={name: why for name, why in went.items() if why},
        )
    print(msgspec.json.encode(result).decode(), flush=True)
    return 0


def _most(llama: Llama, values: architectures.Values, params: ModelParams) -> Model:
    """With every tensor that the architecture may have."""
    return llama.build(values, {}, params)


_MISSING = re.compile(r"missing tensor '([^']+)'|tensor '([^']+)' not found")
_SHAPE = re.compile(r"tensor '([^']+)' has wrong shape; expected ([\d, ]+), got")
_MOST_ATTEMPTS = 2000


def _least(llama: Llama, values: architectures.Values, case: Case, params: ModelParams) -> Model:
    """With no tensor that the architecture can do without: the loader says what is missing, and in what shape."""
    shapes = dict(architectures.SEEDS.get(case.architecture, {}))
    alone = llama.model_params([], [], output_on_host=False)
    alone.load_mtp = params.load_mtp
    used = architectures.USED.get(case.architecture)
    fused = case.fused or case.architecture in architectures.FUSED
    if used or fused:
        like = architectures.LIKE.get(case.architecture)
        most = llama.build(architectures.values(like, experts=True) if like else values, {}, alone)
        shapes |= {name: shape for name, shape in most.tensors.items() if used and re.search(used, name)}
        if fused:
            shapes |= dict(_fused(most.tensors))
        most.free()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        for _ in range(_MOST_ATTEMPTS):
            llama.write(path, values, {name: (_type_of(case, name, shape), shape) for name, shape in shapes.items()})
            try:
                llama.load(path, alone).free()
            except RefusedModelError as error:
                if not _learned(shapes, str(error)):
                    raise
            else:
                break
        model = llama.load(path, params)
        model.tensors.update(shapes)
        return model


def _fused(separate: Mapping[str, list[int]]) -> Iterator[tuple[str, list[int]]]:
    """One matrix for queries, keys and values, as many files have it; and one bias."""
    for name, shape in separate.items():
        if found := re.fullmatch(r"(blk\.\d+\.attn_)q\.(weight|bias)", name):
            others = [separate.get(f"{found[1]}{letter}.{found[2]}") for letter in "kv"]
            if None not in others:
                yield f"{found[1]}qkv.{found[2]}", [*shape[:-1], sum(one[-1] for one in (shape, *others) if one)]


def _learned(shapes: dict[str, list[int]], complaint: str) -> bool:
    """Take a tensor, or its shape, from what the loader complains of; whether there was one."""
    if wrong := _SHAPE.search(complaint):
        shapes[wrong[1]] = [int(count) for count in wrong[2].split(",")]
        return True
    if missing := _MISSING.search(complaint):
        name = missing[1] or missing[2]
        like = re.sub(r"\.\d+\.", r".0.", name)
        shapes[name] = list(shapes.get(like, [1]))
        return True
    return False


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    # The library's own threads and destructors have nothing left to do.
    ctypes.CDLL(None)._exit(status)
