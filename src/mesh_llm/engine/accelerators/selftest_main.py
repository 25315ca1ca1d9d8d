"""Runs operators and a short text on an accelerator's devices, in a process that may crash or hang. Prints JSON lines.

    python -m mesh_llm.engine.accelerators.selftest_main operators PLUGIN             lines of Operator
    python -m mesh_llm.engine.accelerators.selftest_main text MODEL [--load PLUGIN]   one Text

Before each operator its name is printed, so that the parent knows what crashed. The operators are computed on the
processor too, from the same numbers; the parent compares.
"""

import ctypes
import os
import random
import sys
from array import array
from collections.abc import Callable
from ctypes import c_bool, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import msgspec

from mesh_llm.engine.sources.embedded.ggml import Device, Ggml, GgmlError, wheel
from mesh_llm.engine.sources.embedded.loading import LOAD, parse_load, use
from mesh_llm.engine.sources.embedded.server_main import common_params
from mesh_llm.engine.spec import CPU_DEVICE, DeviceInfo, DeviceKind, EngineSpec

WORDS = 24
_PROMPT = "Once upon a time"
_ALTERNATIVES = 5
_CONTEXT_TOKENS = 256

_F32, _F16, _I32 = 0, 1, 26
_WEIGHTS = {"f16": 1, "q8_0": 8, "q4_0": 2, "q4_K": 12, "q6_K": 14}
"""Types of weights by ggml's numbers: the common ones, of each family of kernels."""
_WIDTH = 256
_CONTEXT_BYTES = 1 << 20
_MANY = 40
"""Columns for which kernels of prompts are used, and not those of single tokens."""
_ROPE_NEOX = 2


class Operator(msgspec.Struct, frozen=True, kw_only=True):
    """One operator on one device: as it starts (`started`), and what came of it.

    Attributes:
        name: as in `MUL_MAT q4_0`.
        device: its id.
        started: nothing is known yet.
        error: normalised mean squared error against the processor; -1 if the device does not support the operator.
    """

    name: str
    device: str
    started: bool = False
    error: float = 0.0


class Token(msgspec.Struct, frozen=True, kw_only=True):
    """One token of an answer, and the probabilities (logarithms) of the likeliest, by number of the token."""

    id: int
    likeliest: dict[int, float]


class Text(msgspec.Struct, frozen=True, kw_only=True):
    """A greedy answer of a model."""

    tokens: tuple[Token, ...]


class _Parameters(ctypes.Structure):
    _fields_ = (("size", c_size_t), ("buffer", c_void_p), ("no_alloc", c_bool))


_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "ggml_init": (c_void_p, [_Parameters]),
    "ggml_free": (None, [c_void_p]),
    "ggml_nbytes": (c_size_t, [c_void_p]),
    "ggml_new_tensor_4d": (c_void_p, [c_void_p, c_int, c_int64, c_int64, c_int64, c_int64]),
    "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_rms_norm": (c_void_p, [c_void_p, c_void_p, c_float]),
    "ggml_add": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_mul": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_silu": (c_void_p, [c_void_p, c_void_p]),
    "ggml_get_rows": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_soft_max_ext": (c_void_p, [c_void_p, c_void_p, c_void_p, c_float, c_float]),
    "ggml_rope": (c_void_p, [c_void_p, c_void_p, c_void_p, c_int, c_int]),
    "ggml_flash_attn_ext": (c_void_p, [c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_float, c_float, c_float]),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_backend_dev_init": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_dev_supports_op": (c_bool, [c_void_p, c_void_p]),
    "ggml_backend_alloc_ctx_tensors": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_tensor_get": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
}


class _Case:
    """One operator's graph in one context: tensors with the numbers that they get."""

    def __init__(self, call: dict[str, Any], context: int) -> None:
        self._call = call
        self.context = context
        self.inputs: list[tuple[int, bytes]] = []
        self._random = random.Random(20)  # noqa: S311 - the same numbers at each run

    def numbers(self, kind: int, *shape: int) -> int:
        """A tensor of numbers between -1 and 1."""
        tensor = self._new(kind, shape)
        rows, width = 1, shape[0]
        for size in shape[1:]:
            rows *= size
        values = array("f", (self._random.uniform(-1, 1) for _ in range(width * rows)))
        if kind == _F32:
            data = values.tobytes()
        else:
            source = (c_float * len(values)).from_buffer(values)
            room = ctypes.create_string_buffer(self._call["ggml_nbytes"](tensor))
            self._call["ggml_quantize_chunk"](kind, source, room, 0, rows, width, None)
            data = room.raw
        self.inputs.append((tensor, data))
        return tensor

    def places(self, count: int, limit: int) -> int:
        """A tensor of row numbers below `limit`."""
        return self._with_integers([self._random.randrange(limit) for _ in range(count)])

    def positions(self, count: int) -> int:
        """A tensor of 0, 1, 2 and so on."""
        return self._with_integers(list(range(count)))

    def mask(self, width: int, rows: int) -> int:
        """A causal mask, of f16: minus infinity for what comes later."""
        tensor = self._new(_F16, (width, rows))
        halves = array(
            "H", (0 if column <= row + width - rows else 0xFC00 for row in range(rows) for column in range(width))
        )
        self.inputs.append((tensor, halves.tobytes()))
        return tensor

    def op(self, name: str, *arguments: Any) -> int:
        """The tensor that an operator makes."""
        return self._call[name](self.context, *arguments)

    def _with_integers(self, values: list[int]) -> int:
        tensor = self._new(_I32, (len(values),))
        self.inputs.append((tensor, array("i", values).tobytes()))
        return tensor

    def _new(self, kind: int, shape: tuple[int, ...]) -> int:
        return self._call["ggml_new_tensor_4d"](self.context, kind, *shape, *[1] * (4 - len(shape)))


def _mul_mat(kind: int, columns: int) -> Callable[[_Case], int]:
    def make(case: _Case) -> int:
        return case.op("ggml_mul_mat", case.numbers(kind, _WIDTH, 64), case.numbers(_F32, _WIDTH, columns))

    return make


def _get_rows(kind: int) -> Callable[[_Case], int]:
    return lambda case: case.op("ggml_get_rows", case.numbers(kind, _WIDTH, 32), case.places(7, 32))


def _rope(mode: int) -> Callable[[_Case], int]:
    return lambda case: case.op("ggml_rope", case.numbers(_F32, 64, 4, 5), case.positions(5), 64, mode)


def _soft_max(case: _Case) -> int:
    return case.op("ggml_soft_max_ext", case.numbers(_F32, 64, 8, 2), case.mask(64, 8), 0.125, 0.0)


def _flash_attention(case: _Case) -> int:
    query, key = case.numbers(_F32, 64, 8, 4), case.numbers(_F16, 64, 64, 2)
    value, mask = case.numbers(_F16, 64, 64, 2), case.mask(64, 8)
    return case.op("ggml_flash_attn_ext", query, key, value, mask, 0.125, 0.0, 0.0)


def _pair(name: str) -> Callable[[_Case], int]:
    return lambda case: case.op(name, case.numbers(_F32, _WIDTH, 5), case.numbers(_F32, _WIDTH, 5))


_CASES: dict[str, Callable[[_Case], int]] = {
    **{f"MUL_MAT {name}": _mul_mat(kind, 1) for name, kind in _WEIGHTS.items()},
    **{f"MUL_MAT {name}, many columns": _mul_mat(kind, _MANY) for name, kind in _WEIGHTS.items()},
    "ADD": _pair("ggml_add"),
    "MUL": _pair("ggml_mul"),
    "SILU": lambda case: case.op("ggml_silu", case.numbers(_F32, _WIDTH, 5)),
    "RMS_NORM": lambda case: case.op("ggml_rms_norm", case.numbers(_F32, _WIDTH, 5), 1e-6),
    "SOFT_MAX": _soft_max,
    "ROPE": _rope(0),
    "ROPE neox": _rope(_ROPE_NEOX),
    "GET_ROWS f16": _get_rows(_WEIGHTS["f16"]),
    "GET_ROWS q8_0": _get_rows(_WEIGHTS["q8_0"]),
    "FLASH_ATTN_EXT": _flash_attention,
}


class _Computer:
    """One device."""

    def __init__(self, call: dict[str, Any], device: Device) -> None:
        self._call = call
        self._device = device
        self._backend = call["ggml_backend_dev_init"](device, None)
        if not self._backend:
            raise GgmlError("the device does not start")

    def result(self, make: Callable[[_Case], int]) -> "array[float] | None":
        """Compute a case; None if the device does not support it."""
        call = self._call
        context = call["ggml_init"](_Parameters(_CONTEXT_BYTES, None, True))
        case = _Case(call, context)
        out = make(case)
        if not call["ggml_backend_dev_supports_op"](self._device, out):
            call["ggml_free"](context)
            return None
        graph = call["ggml_new_graph"](context)
        call["ggml_build_forward_expand"](graph, out)
        buffer = call["ggml_backend_alloc_ctx_tensors"](context, self._backend)
        if not buffer:
            raise GgmlError("the device has no memory for the test")
        for tensor, data in case.inputs:
            call["ggml_backend_tensor_set"](tensor, data, 0, len(data))
        if call["ggml_backend_graph_compute"](self._backend, graph) != 0:
            raise GgmlError("the device does not compute")
        found = array("f", bytes(call["ggml_nbytes"](out)))
        got = (c_float * len(found)).from_buffer(found)
        call["ggml_backend_tensor_get"](out, got, 0, call["ggml_nbytes"](out))
        del got
        call["ggml_backend_buffer_free"](buffer)
        call["ggml_free"](context)
        return found


def operators(plugin: Path, say: Callable[[Operator], None]) -> None:
    """Compute all cases on all devices of the plugin, or of the prebuilt engine in that directory. Raises GgmlError."""
    plugins = use(plugin)
    ggml = Ggml()
    for one in plugins:
        ggml.load_plugin(one)
    processor = next(device for device, info in ggml.devices() if info.kind is DeviceKind.CPU)
    call = ggml.functions(_FUNCTIONS)
    expected = {name: _Computer(call, processor).result(make) for name, make in _CASES.items()}
    for device, info in ggml.devices():
        if info.kind not in {DeviceKind.CPU, DeviceKind.ACCELERATOR}:
            _on_device(_Computer(call, device), info, expected, say)


def _on_device(
    computer: _Computer, info: DeviceInfo, expected: "dict[str, array[float] | None]", say: Callable[[Operator], None]
) -> None:
    for name, make in _CASES.items():
        wanted = expected[name]
        say(Operator(name=name, device=info.id, started=True))
        got = computer.result(make)
        if wanted is not None:
            say(Operator(name=name, device=info.id, error=-1.0 if got is None else error_of(wanted, got)))


def error_of(wanted: "array[float]", got: "array[float]") -> float:
    """The normalised mean squared error; a large number where a result is no number."""
    power = sum(one * one for one in wanted) or 1.0
    error = sum((one - other) ** 2 for one, other in zip(wanted, got, strict=True)) / power
    return error if error == error and error != float("inf") else 1e9  # noqa: PLR0124 - true of all but NaN


def text(model: Path, plugins: list[Path], *, accelerated: bool) -> Text:
    """A greedy answer: on the accelerator, or on the processor without one."""
    ggml = Ggml()
    ggml.load_accelerators(plugins)
    devices = () if accelerated else (CPU_DEVICE,)
    spec = EngineSpec(
        model=model, alias="test", context=_CONTEXT_TOKENS, slots=1, embeddings=False, devices=devices, threads=1
    )
    server = wheel().Server(common_params(spec, ggml))
    answer = server.handle_completions(
        {"prompt": _PROMPT, "n_predict": WORDS, "temperature": 0, "n_probs": _ALTERNATIVES, "cache_prompt": False}
    )
    if "choices" not in answer:
        raise GgmlError(f"the model gives no answer: {answer}")
    tokens = [
        Token(id=one["id"], likeliest={other["id"]: other["logprob"] for other in one["top_logprobs"]})
        for one in answer["choices"][0]["logprobs"]["content"]
    ]
    return Text(tokens=tuple(tokens))


def main(arguments: list[str]) -> int:
    """Do one of them, and leave without unloading."""
    # ggml prints on stdout, which is for the answers alone.
    answers = os.dup(1)
    os.dup2(2, 1)

    def say(answer: msgspec.Struct) -> None:
        os.write(answers, msgspec.json.encode(answer) + b"\n")

    (what, path), accelerators = parse_load(arguments)
    try:
        if what == "operators":
            operators(Path(path), say)
        else:
            say(text(Path(path), accelerators, accelerated=LOAD in arguments))
    except GgmlError as error:
        print(error, file=sys.stderr, flush=True)  # noqa: T201 - for the parent
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
