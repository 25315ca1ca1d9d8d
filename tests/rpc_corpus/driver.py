"""One model in a process of its own: `python -m tests.rpc_corpus.driver CASE`, with a Case as JSON.

A wrong guess at a shape aborts llama.cpp, so nothing else runs in here. The last line of the output is a Result.
"""

import ctypes
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
from tests.rpc_corpus import architectures
from tests.rpc_corpus.llama import Llama, Model, ModelParams, RefusedModelError, tokens

from mesh_llm.engine.embedded.ggml import Ggml


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """What to record.

    Attributes:
        architecture: its name in GGUF.
        plugin: the RPC plugin's library.
        endpoints: where the recorders listen, one for each worker.
        experts: with experts, where the architecture can go without.
        contexts: names of `CONTEXTS`.
        types: type of every matrix whose name matches the pattern, (pattern, type's number).
        output_on_host: the output layer stays with the host, as the product has it.
    """

    architecture: str
    plugin: str
    endpoints: tuple[str, ...]
    experts: bool = True
    least: bool = False
    contexts: tuple[str, ...] = ("plain",)
    weights: int = 0
    output_on_host: bool = False


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """How it went: `done` contexts, and what failed by name of the context (`model`: it did not load)."""

    done: tuple[str, ...] = ()
    failed: dict[str, str] = {}


BATCH = 64
MICRO_BATCH = 16

CONTEXTS: dict[str, dict[str, object]] = {
    "plain": {"flash_attn_type": 0},
    "flash": {"flash_attn_type": 1},
    "flash-q8_0": {"flash_attn_type": 1, "type_k": 8, "type_v": 8},
    "flash-q4_0": {"flash_attn_type": 1, "type_k": 2, "type_v": 2},
    "k-q8_0": {"flash_attn_type": 0, "type_k": 8},
    "unified": {"flash_attn_type": 1, "kv_unified": True},
    "plain-unified": {"flash_attn_type": 0, "kv_unified": True},
    "swa-full": {"flash_attn_type": 0, "swa_full": True},
    "mean": {"flash_attn_type": 0, "embeddings": True, "pooling_type": 1},
    "cls": {"flash_attn_type": 0, "embeddings": True, "pooling_type": 2},
    "last": {"flash_attn_type": 0, "embeddings": True, "pooling_type": 3},
    "rank": {"flash_attn_type": 0, "embeddings": True, "pooling_type": 4},
    "embeddings": {"flash_attn_type": 1, "embeddings": True, "pooling_type": 0},
}


class _Run:
    """One context, and what is done in it."""

    def __init__(self, model: Model, context: int) -> None:
        self._model = model
        self._call = model.llama.call
        self._context = context
        self._memory = self._call["llama_get_memory"](context)

    def everything(self) -> None:
        """Prompts, tokens, several sequences, shifts and copies."""
        if self._model.ask("has_encoder"):
            self._do("llama_encode", {0: (0, 12)}, "all")
            if not self._model.ask("has_decoder"):
                self._do("llama_encode", {0: (0, 5), 1: (0, 7)}, "all")
                return
        if not self._memory:
            self._do("llama_decode", {0: (0, 12)}, "all")
            self._do("llama_decode", {0: (0, 5), 1: (0, 7)}, "all")
            return
        self.prompt_and_tokens()
        self.sequences()
        self.shift_and_state()

    def prompt_and_tokens(self) -> None:
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

    def shift_and_state(self) -> None:
        """A sequence is copied, its beginning is dropped and the rest moved up; a state is saved and put back."""
        self._call["llama_memory_seq_rm"](self._memory, 3, -1, -1)
        self._call["llama_memory_seq_cp"](self._memory, 1, 3, -1, -1)
        self._decode({3: (self._next(3), 1)}, "last")
        if self._call["llama_memory_can_shift"](self._memory) and self._call["llama_memory_seq_rm"](
            self._memory, 0, 4, 12
        ):
            self._call["llama_memory_seq_add"](self._memory, 0, 12, -1, -8)
            self._decode({0: (self._next(0), 1)}, "last")
        size = self._call["llama_state_seq_get_size"](self._context, 1)
        data = ctypes.create_string_buffer(size)
        if self._call["llama_state_seq_get_data"](self._context, data, size, 1):
            self._call["llama_state_seq_set_data"](self._context, data, size, 2)
            self._decode({2: (self._next(2), 1)}, "last")

    def _next(self, sequence: int) -> int:
        return self._call["llama_memory_seq_pos_max"](self._memory, sequence) + 1

    def _decode(self, sequences: dict[int, tuple[int, int]], outputs: str) -> None:
        self._do("llama_decode", sequences, outputs)

    def _do(self, verb: str, sequences: dict[int, tuple[int, int]], outputs: str) -> None:
        batch, held = tokens(sequences, outputs, architectures.VOCABULARY)
        status = self._call[verb](self._context, batch)
        self._call["llama_synchronize"](self._context)
        del held
        if status:
            raise RefusedModelError(f"{verb} of {sequences} gives {status}: {self._model.llama.why()}")


def _type_of(case: Case) -> Callable[[str, int], int]:
    """What type a tensor shall have, by its name and number of dimensions."""

    def choose(name: str, dimensions: int) -> int:
        matrix = dimensions > 1 and name.endswith("weight") and "norm" not in name
        return case.weights if matrix else 0

    return choose


def _contexts(case: Case, model: Model) -> Iterator[tuple[str, str]]:
    for name in case.contexts:
        common = {
            "n_ctx": 4 * 128, "n_batch": BATCH, "n_ubatch": MICRO_BATCH, "n_seq_max": 4, "n_threads": 1,
            "n_threads_batch": 1,
        }  # fmt: skip
        print(f"context {name}", flush=True)
        why = ""
        try:
            with model.context(**(common | CONTEXTS[name])) as context:
                _Run(model, context).everything()
        except RefusedModelError as error:
            why = str(error)
        yield name, why


def main(arguments: list[str]) -> int:
    """Run a case; the exit status is 0 also where something failed in a way that the result tells."""
    case = msgspec.json.decode(arguments[0], type=Case)
    ggml = Ggml()
    registry = ggml.load_plugin(Path(case.plugin))
    before = {device for device, _ in ggml.devices()}
    for endpoint in case.endpoints:
        ggml.add_rpc_server(registry, endpoint)
    devices = [device for device, _ in ggml.devices() if device not in before]
    llama = Llama(ggml)
    params = llama.model_params(devices, [1.0] * len(devices), case.output_on_host)
    values = architectures.values(case.architecture, experts=case.experts)
    try:
        model = _least(llama, values, case, params) if case.least else _most(llama, values, case, params)
    except RefusedModelError as error:
        result = Result(failed={"model": str(error)})
    else:
        went = dict(_contexts(case, model))
        model.free()
        result = Result(
            done=tuple(name for name, why in went.items() if not why),
            failed={name: why for name, why in went.items() if why},
        )
    print(msgspec.json.encode(result).decode(), flush=True)
    return 0


def _most(llama: Llama, values: architectures.Values, case: Case, params: ModelParams) -> Model:
    """With every tensor that the architecture may have. Types are known by names, so it is made twice."""
    return llama.build(values, {}, params)


def _least(llama: Llama, values: architectures.Values, case: Case, params: ModelParams) -> Model:
    """With no tensor that the architecture can do without: the loader says what is missing, and in what shape."""
    with tempfile.TemporaryDirectory() as folder:
        raise NotImplementedError(folder)


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    # The library's own threads and destructors have nothing left to do.
    ctypes.CDLL(None)._exit(status)
