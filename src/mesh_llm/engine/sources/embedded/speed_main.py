"""Takes the time of ggml at what a token is: `python -m mesh_llm.engine.sources.embedded.speed_main [DEVICE,...]`.

With `--rpc ENDPOINT PLUGIN` it is the time of an RPC server's first device: the wheel has no CUDA, and what was built
with it lends its devices this way.

Prints a core.speed.Speed as one line of JSON. Matrices of three kinds are multiplied by one vector, in pieces of a
millisecond or so; of their times the median counts. A low percentile finds pieces that an engine never meets all of,
and promised a fifth more than came; the mean counts other programs' turns, which are gone the next moment.

An accelerator is asked for long chains instead, and for short ones, and only the difference counts: to start one and
to hear of its end takes longer than a piece does, and once more so by RPC.
"""

import ctypes
import os
import sys
import time
from ctypes import c_bool, c_float, c_int, c_int64, c_size_t, c_uint8, c_void_p
from pathlib import Path
from typing import Any

import msgspec

from mesh_llm.core.types.model import Rates, Speed
from mesh_llm.engine.sources.base import DeviceKind
from mesh_llm.engine.sources.embedded.ggml import Device, Ggml, GgmlError
from mesh_llm.engine.sources.embedded.rpc_main import choose_devices
from mesh_llm.engine.spec import RpcWorkerSpec
from mesh_llm.runtime.process import usable_cpus

_RPC = "--rpc"
_WIDTH = 4096
_ROWS = {"f16": 512, "q8": 1024, "q4": 2048}
_TYPES = {"f16": 1, "q8": 8, "q4": 2}
_MEMORY_BYTES = 96 << 20
_CACHE_BYTES = 4 << 20
_LARGE_BYTES = 512 << 20
"""On accelerators, of which the largest keep 100 MB close by; but no more of their free memory than an eighth."""
_LARGE_ROWS = 4096
_STEPS = 200
_FEW_STEPS = 8
_LEAST_PIECES = 4
_GRAPH_NODES = _STEPS + 8
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
    "ggml_backend_tensor_get": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
}


class _Bench:
    """One backend of one device."""

    def __init__(self, ggml: Ggml, device: Device) -> None:
        self._call = ggml.functions(_SIGNATURES)
        self._backend = self._call["ggml_backend_dev_init"](device, None)
        if not self._backend:
            raise GgmlError("the device does not start")

    def threads(self, count: int) -> None:
        """Compute with so many from here on; of processors only."""
        self._call["ggml_backend_cpu_set_n_threads"](self._backend, count)

    def rates(self, total: int, counts: tuple[int, ...]) -> list[Rates]:
        """Bytes per second over `total` bytes of each kind, for each number of threads; of processors only."""
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
        graphs = [self._graph(context, [call["ggml_mul_mat"](context, matrix, vector)]) for matrix in matrices]
        buffer = self._allocate(context)
        rates: list[int] = []
        for count in counts:
            self.threads(count)
            rates.append(int(size / self._time(graphs)))
        call["ggml_backend_buffer_free"](buffer)
        call["ggml_free"](context)
        return rates

    def far_rates(self, total: int) -> Rates:
        """Bytes per second over `total` bytes of each kind, on an accelerator."""
        return Rates(**{name: self._far_rate(name, total) for name in _TYPES})

    def _far_rate(self, name: str, total: int) -> int:
        call = self._call
        context = call["ggml_init"](_Parameters(_CONTEXT_BYTES, None, True))
        vector = call["ggml_new_tensor_2d"](context, _F32, _WIDTH, 1)
        products: list[int] = []
        size = 0
        while (len(products) + 1) * size <= total or len(products) < _LEAST_PIECES:
            matrix = call["ggml_new_tensor_2d"](context, _TYPES[name], _WIDTH, _LARGE_ROWS)
            size = call["ggml_nbytes"](matrix)
            products.append(call["ggml_mul_mat"](context, matrix, vector))
        seconds = self._between(context, products[:1], products)
        return int((len(products) - 1) * size / seconds)

    def step(self) -> int:
        """Nanoseconds of one small operation in a chain of them."""
        context, chain = self._chain()
        graph = self._graph(context, chain[-1:])
        buffer = self._allocate(context)
        seconds = self._time([graph])
        self._call["ggml_backend_buffer_free"](buffer)
        self._call["ggml_free"](context)
        return int(seconds / _STEPS * 1e9)

    def far_step(self) -> int:
        """The same on an accelerator."""
        context, chain = self._chain()
        seconds = self._between(context, chain[:_FEW_STEPS], chain)
        return int(seconds / (_STEPS - _FEW_STEPS) * 1e9)

    def _chain(self) -> tuple[int, list[int]]:
        call = self._call
        context = call["ggml_init"](_Parameters(_CONTEXT_BYTES, None, True))
        last = call["ggml_new_tensor_2d"](context, _F32, _STEP_WIDTH, 1)
        chain: list[int] = []
        for _ in range(_STEPS):
            last = call["ggml_rms_norm"](context, last, 1e-6)
            chain.append(last)
        return context, chain

    def _between(self, context: int, few: list[int], many: list[int]) -> float:
        """Seconds that computing `many` takes longer than `few`, which it begins with. Frees the context."""
        call = self._call
        graphs = [(self._graph(context, results), results[-1]) for results in (few, many)]
        buffer = self._allocate(context)
        # What was asked of it before, as to clear the buffer, may be under way still.
        self._compute(*graphs[-1])
        short, long = (self._time([graph], result) for graph, result in graphs)
        call["ggml_backend_buffer_free"](buffer)
        call["ggml_free"](context)
        if long <= short:
            raise GgmlError("the device's times make no sense")
        return long - short

    def _graph(self, context: int, results: list[int]) -> int:
        graph: int = self._call["ggml_new_graph_custom"](context, _GRAPH_NODES, False)
        for result in results:
            self._call["ggml_build_forward_expand"](graph, result)
        return graph

    def _allocate(self, context: int) -> int:
        buffer: int = self._call["ggml_backend_alloc_ctx_tensors"](context, self._backend)
        if not buffer:
            raise GgmlError("the device has no memory for the measurement")
        self._call["ggml_backend_buffer_clear"](buffer, 0)
        return buffer

    def _time(self, graphs: list[int], result: int = 0) -> float:
        """Seconds of one graph, of several alike that are computed in turn; until the `result` is here, if given."""
        times: list[float] = []
        end = time.perf_counter() + _SECONDS
        while len(times) < len(graphs) or (time.perf_counter() < end and len(times) < _MOST_PIECES):
            began = time.perf_counter()
            self._compute(graphs[len(times) % len(graphs)], result)
            times.append(time.perf_counter() - began)
        return sorted(times)[int(_PERCENTILE * len(times))]

    def _compute(self, graph: int, result: int) -> None:
        self._call["ggml_backend_graph_compute"](self._backend, graph)
        if result:
            # A backend may be at work still when it has said that it is done: this waits for it.
            got = c_float()
            self._call["ggml_backend_tensor_get"](result, ctypes.byref(got), 0, ctypes.sizeof(got))


def measure(ggml: Ggml, names: tuple[str, ...]) -> Speed:
    """The speed of the named devices, or of those that models would use; of several accelerators the first."""
    device = choose_devices(ggml, RpcWorkerSpec(devices=names))[0]
    info = dict(ggml.devices())[device]
    if info.kind is not DeviceKind.CPU:
        return _measure_accelerator(ggml, device, info.memory_free)
    bench = _Bench(ggml, device)
    cores = usable_cpus()
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


def measure_rpc(ggml: Ggml, endpoint: str, plugin: Path) -> Speed:
    """The speed of the first device that the RPC server at `endpoint` lends, which must speak the plugin's version."""
    registry = ggml.load_plugin(plugin)
    here = dict(ggml.devices())
    ggml.add_rpc_server(registry, endpoint)
    device, info = next((device, info) for device, info in ggml.devices() if device not in here)
    return _measure_accelerator(ggml, device, info.memory_free)


def _measure_accelerator(ggml: Ggml, device: Device, free: int) -> Speed:
    bench = _Bench(ggml, device)
    full = bench.far_rates(min(_LARGE_BYTES, max(_MEMORY_BYTES, free // 8)))
    return Speed(full=full, full_step_ns=bench.far_step())


def main(arguments: list[str]) -> int:
    """Measure, print, and leave without unloading."""
    # ggml prints on stdout; the answer has that for itself.
    answer = os.dup(1)
    os.dup2(2, 1)
    try:
        if arguments[:1] == [_RPC]:
            speed = measure_rpc(Ggml(), arguments[1], Path(arguments[2]))
        else:
            speed = measure(Ggml(), tuple(arguments[0].split(",")) if arguments else ())
    except GgmlError as error:
        print(error, file=sys.stderr)  # noqa: T201 - told to the parent
        return 1
    os.write(answer, msgspec.json.encode(speed) + b"\n")
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
