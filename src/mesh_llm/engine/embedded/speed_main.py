"""Takes the time of ggml at what a token is: `python -m mesh_llm.engine.embedded.speed_main [DEVICE,...]`.

Prints a core.speed.Speed as one line of JSON. Matrices of three kinds are multiplied by one vector, in pieces of a
millisecond or so; of their times the median counts. A low percentile finds pieces that an engine never meets all of,
and promised a fifth more than came; the mean counts other programs' turns, which are gone the next moment.
"""

import ctypes
import os
import sys
import time
from ctypes import c_bool, c_float, c_int, c_int64, c_size_t, c_uint8, c_void_p
from typing import Any

import msgspec

from mesh_llm.core.speed import Rates, Speed
from mesh_llm.engine.embedded.ggml import Device, Ggml, GgmlError
from mesh_llm.engine.embedded.rpc_main import choose_devices
from mesh_llm.engine.source import DeviceKind
from mesh_llm.engine.spec import RpcWorkerSpec

_WIDTH = 4096
_ROWS = {"f16": 512, "q8": 1024, "q4": 2048}
_TYPES = {"f16": 1, "q8": 8, "q4": 2}
_MEMORY_BYTES = 96 << 20
_CACHE_BYTES = 4 << 20
_STEPS = 200
_STEP_WIDTH = 256
_F32 = 0
_CONTEXT_BYTES = 4 << 20
_SECONDS = 0.12
_MOST_PIECES = 400
_PERCENTILE = 0.5
_MOST_STEP_FACTOR = 8


class _Parameters(ctypes.Structure):
    _fields_ = (("size", c_size_t), ("buffer", c_void_p), ("no_alloc", c_bool))


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_init": (c_void_p, [_Parameters]),
    "ggml_free": (None, [c_void_p]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_nbytes": (c_size_t, [c_void_p]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_rms_norm": (c_void_p, [c_void_p, c_void_p, c_float]),
    "ggml_new_graph_custom": (c_void_p, [c_void_p, c_size_t, c_bool]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_backend_dev_init": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_alloc_ctx_tensors": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_buffer_clear": (None, [c_void_p, c_uint8]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
}


class _Bench:
    """One backend of one device."""

    def __init__(self, ggml: Ggml, device: Device, *, cpu: bool) -> None:
        self._call = ggml.functions(_SIGNATURES)
        self._cpu = cpu
        self._backend = self._call["ggml_backend_dev_init"](device, None)
        if not self._backend:
            raise GgmlError("the device does not start")

    def threads(self, count: int) -> None:
        """Compute with so many from here on."""
        if self._cpu:
            self._call["ggml_backend_cpu_set_n_threads"](self._backend, count)

    def rates(self, total: int, counts: tuple[int, ...]) -> list[Rates]:
        """Bytes per second over `total` bytes of each kind, for each number of threads."""
        found: dict[str, list[int]] = {name: self._rate(name, total, counts) for name in _TYPES}
        return [Rates(**{name: rates[place] for name, rates in found.items()}) for place in range(len(counts))]

    def _rate(self, name: str, total: int, counts: tuple[int, ...]) -> list[int]:
        call = self._call
        context = call["ggml_init"](_Parameters(_CONTEXT_BYTES, None, True))
        rows = _ROWS[name] if total > _CACHE_BYTES else _ROWS[name] // 8
        matrices = [call["ggml_new_tensor_2d"](context, _TYPES[name], _WIDTH, rows)]
        size: int = call["ggml_nbytes"](matrices[0])
        while len(matrices) * size < total:
            matrices.append(call["ggml_new_tensor_2d"](context, _TYPES[name], _WIDTH, rows))
        vector = call["ggml_new_tensor_2d"](context, _F32, _WIDTH, 1)
        graphs = [self._graph(context, call["ggml_mul_mat"](context, matrix, vector)) for matrix in matrices]
        buffer = self._allocate(context)
        rates: list[int] = []
        for count in counts:
            self.threads(count)
            rates.append(int(size / self._time(graphs)))
        call["ggml_backend_buffer_free"](buffer)
        call["ggml_free"](context)
        return rates

    def step(self) -> int:
        """Nanoseconds of one small operation in a chain of them."""
        call = self._call
        context = call["ggml_init"](_Parameters(_CONTEXT_BYTES, None, True))
        last = call["ggml_new_tensor_2d"](context, _F32, _STEP_WIDTH, 1)
        for _ in range(_STEPS):
            last = call["ggml_rms_norm"](context, last, 1e-6)
        graph = self._graph(context, last)
        buffer = self._allocate(context)
        seconds = self._time([graph])
        call["ggml_backend_buffer_free"](buffer)
        call["ggml_free"](context)
        return int(seconds / _STEPS * 1e9)

    def _graph(self, context: int, result: int) -> int:
        graph: int = self._call["ggml_new_graph_custom"](context, _STEPS + 8, False)
        self._call["ggml_build_forward_expand"](graph, result)
        return graph

    def _allocate(self, context: int) -> int:
        buffer: int = self._call["ggml_backend_alloc_ctx_tensors"](context, self._backend)
        if not buffer:
            raise GgmlError("the device has no memory for the measurement")
        self._call["ggml_backend_buffer_clear"](buffer, 0)
        return buffer

    def _time(self, graphs: list[int]) -> float:
        """Seconds of one graph, of several alike that are computed in turn."""
        compute = self._call["ggml_backend_graph_compute"]
        times: list[float] = []
        end = time.perf_counter() + _SECONDS
        while len(times) < len(graphs) or (time.perf_counter() < end and len(times) < _MOST_PIECES):
            began = time.perf_counter()
            compute(self._backend, graphs[len(times) % len(graphs)])
            times.append(time.perf_counter() - began)
        return sorted(times)[int(_PERCENTILE * len(times))]


def measure(ggml: Ggml, names: tuple[str, ...]) -> Speed:
    """The speed of the named devices, or of those that models would use; of several accelerators the first."""
    device = choose_devices(ggml, RpcWorkerSpec(devices=names))[0]
    cpu = any(known == device and info.kind is DeviceKind.CPU for known, info in ggml.devices())
    bench = _Bench(ggml, device, cpu=cpu)
    if not cpu:
        (full,) = bench.rates(_MEMORY_BYTES, (1,))
        return Speed(full=full, full_step_ns=bench.step())
    cores = os.cpu_count() or 1
    (cached,) = bench.rates(_CACHE_BYTES, (1,))
    one, full = bench.rates(_MEMORY_BYTES, (1, cores))
    bench.threads(1)
    step = bench.step()
    bench.threads(cores)
    # Threads that wait for one that has no core take forever: a machine that is busy now is not slow for good.
    return Speed(
        cores=cores,
        cached=cached,
        one=one,
        full=Rates(f16=max(one.f16, full.f16), q8=max(one.q8, full.q8), q4=max(one.q4, full.q4)),
        step_ns=step,
        full_step_ns=min(bench.step(), _MOST_STEP_FACTOR * step),
    )


def main(arguments: list[str]) -> int:
    """Measure, print, and leave without unloading."""
    # ggml prints on stdout; the answer has that for itself.
    answer = os.dup(1)
    os.dup2(2, 1)
    names = tuple(arguments[0].split(",")) if arguments else ()
    try:
        speed = measure(Ggml(), names)
    except GgmlError as error:
        print(error, file=sys.stderr)  # noqa: T201 - told to the parent
        return 1
    os.write(answer, msgspec.json.encode(speed) + b"\n")
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
