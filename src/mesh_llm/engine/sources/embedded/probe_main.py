"""Questions about the embedded engine, answered in a process that may crash. Prints one line of JSON.

    python -m mesh_llm.engine.sources.embedded.probe_main                               an EmbeddedProbe
    python -m mesh_llm.engine.sources.embedded.probe_main speed [DEVICE,...]            a core Speed
    python -m mesh_llm.engine.sources.embedded.probe_main speed --rpc ENDPOINT PLUGIN   of an RPC server's first device

`--load PLUGIN` at the end loads an accelerator's plugin first.

The speed is that of ggml at what a token needs: matrices of three kinds are multiplied by one vector, in pieces of
about a millisecond. The median counts. A low percentile would find the pieces without any disturbance, and promised a
fifth more speed than engines reached; the mean would include other programs' turns. For prompts, matrices are
multiplied by many vectors at once. Attention is that of a prompt's part and of a single token to a context whose keys
and values lie as in an engine's cache; it is measured on processors only.

A GPU computes long chains and short ones, and only the difference counts: starting it and hearing of its end takes
longer than a piece, and more so over RPC. The wheel has no CUDA, so such GPUs are measured through an RPC server.
"""

import ctypes
import os
import sys
import time
from ctypes import c_bool, c_float, c_int, c_int64, c_size_t, c_uint8, c_void_p
from pathlib import Path
from typing import Any

import msgspec

from mesh_llm.core.types.model import AttentionRates, Rates, Speed
from mesh_llm.engine.sources.embedded.ggml import Device, Ggml, GgmlError, wheel
from mesh_llm.engine.sources.embedded.loading import parse_load
from mesh_llm.engine.spec import DeviceInfo, DeviceKind, RpcWorkerSpec
from mesh_llm.runtime.process import usable_cpus

_SPEED, _RPC = "speed", "--rpc"
_WIDTH = 4096
_ROWS = {"f16": 512, "q8": 1024, "q4": 2048}
_TYPES = {"f16": 1, "q8": 8, "q4": 2}
_MEMORY_BYTES = 96 << 20
_CACHE_BYTES = 4 << 20
_LARGE_BYTES = 512 << 20
"""On GPUs, whose largest caches hold 100 MB; but at most an eighth of their free memory."""
_LARGE_ROWS = 4096
_BATCH, _BATCH_ROWS = 64, 64
"""Vectors at once, and rows of the matrix: about a millisecond. A processor is as fast with 64 vectors as with 512."""
_LARGE_BATCH, _LARGE_BATCH_ROWS = 512, 1024
"""The same on GPUs."""
_MAX_BATCH_PIECES = 32
_HEAD, _KV_HEADS, _KV_TOKENS, _KV_LAYERS = 64, 8, 2048, 4
"""Elements of a head, heads of a layer's cache, tokens of the context, layers. As in an engine, keys of a head lie a
kilobyte apart, and other heads and layers come next, so that no core's own cache holds them: 16 MB. One head alone,
again and again, is up to twice as fast as attention in engines."""
_SHARING = 2
"""Heads of a token's query with the same keys, for each thread. Many models have more."""
_LONG_ENOUGH = 0.003
"""Seconds: a GPU's chain of products is made longer until it takes so much longer than a short one."""
_STEPS = 200
_FEW_STEPS = 8
_MIN_PIECES = 4
_GRAPH_NODES = _STEPS + 8
_STEP_WIDTH = 256
_F32, _F16 = 0, 1
_CONTEXT_BYTES = 4 << 20
_SECONDS = 0.12
_MAX_PIECES = 400
_PERCENTILE = 0.5
_MAX_STEP_FACTOR = 8


class _Parameters(ctypes.Structure):
    _fields_ = (("size", c_size_t), ("buffer", c_void_p), ("no_alloc", c_bool))


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_init": (c_void_p, [_Parameters]),
    "ggml_free": (None, [c_void_p]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_nbytes": (c_size_t, [c_void_p]),
    "ggml_new_tensor_3d": (c_void_p, [c_void_p, c_int, c_int64, c_int64, c_int64]),
    "ggml_view_3d": (c_void_p, [c_void_p, c_void_p, c_int64, c_int64, c_int64, c_size_t, c_size_t, c_size_t]),
    "ggml_flash_attn_ext": (c_void_p, [c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_float, c_float, c_float]),
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
    """A benchmark on one device."""

    def __init__(self, ggml: Ggml, device: Device) -> None:
        self._call = ggml.functions(_SIGNATURES)
        self._backend = self._call["ggml_backend_dev_init"](device, None)
        if not self._backend:
            raise GgmlError("the device does not start")
        self._batch_bytes = 0

    def threads(self, count: int) -> None:
        """Set the number of threads; processors only."""
        self._call["ggml_backend_cpu_set_n_threads"](self._backend, count)

    def rates(self, total: int, counts: tuple[int, ...]) -> list[Rates]:
        """Bytes per second over `total` bytes of each kind, for each number of threads; processors only."""
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

    def batch_rates(self) -> Rates:
        """Bytes of weights that many vectors at once would read one by one, per second; processors only."""
        return Rates(**{name: self._batch_rate(name) for name in _TYPES})

    def _batch_rate(self, name: str) -> int:
        call = self._call
        context, product = self._batch(name, _BATCH, _BATCH_ROWS, 1)
        graph = self._graph(context, product)
        buffer = self._allocate(context)
        seconds = self._time([graph])
        call["ggml_backend_buffer_free"](buffer)
        call["ggml_free"](context)
        return int(self._batch_bytes * _BATCH / seconds)

    def prompt_attention(self) -> int:
        """Multiplications per second of a prompt's attention, on one thread.

        On several threads ggml divides the rows of so few queries into pieces that are too small for its kernel.
        """
        self.threads(1)
        return self._attention_rate(_BATCH, 1)

    def token_attention(self, threads: int) -> int:
        """Multiplications per second of a token's attention."""
        self.threads(threads)
        return self._attention_rate(1, _SHARING * threads)

    def _attention_rate(self, queries: int, heads: int) -> int:
        call = self._call
        context = call["ggml_init"](_Parameters(_CONTEXT_BYTES, None, True))
        row = 2 * _HEAD * _KV_HEADS
        query = call["ggml_new_tensor_3d"](context, _F32, _HEAD, queries, heads)
        mask = call["ggml_new_tensor_2d"](context, _F16, _KV_TOKENS, queries)
        graphs: list[int] = []
        for _ in range(_KV_LAYERS):
            layer = [call["ggml_new_tensor_2d"](context, _F16, _HEAD * _KV_HEADS, _KV_TOKENS) for _ in range(2)]
            for head in range(_KV_HEADS):
                keys, values = (
                    call["ggml_view_3d"](context, one, _HEAD, _KV_TOKENS, 1, row, row * _KV_TOKENS, 2 * _HEAD * head)
                    for one in layer
                )
                seen = call["ggml_flash_attn_ext"](context, query, keys, values, mask, _HEAD**-0.5, 0.0, 0.0)
                graphs.append(self._graph(context, [seen]))
        buffer = self._allocate(context)
        seconds = self._time(graphs)
        call["ggml_backend_buffer_free"](buffer)
        call["ggml_free"](context)
        return int(2 * heads * _HEAD * queries * _KV_TOKENS / seconds)

    def gpu_batch_rates(self) -> Rates:
        """The same on a GPU, of f16 for all kinds: GPUs make f16 of other weights for a prompt."""
        pieces = _MIN_PIECES
        while True:
            context, products = self._batch("f16", _LARGE_BATCH, _LARGE_BATCH_ROWS, pieces)
            seconds = self._difference(context, products[:1], products)
            if seconds >= _LONG_ENOUGH or pieces >= _MAX_BATCH_PIECES:
                break
            pieces *= 2
        rate = int((pieces - 1) * self._batch_bytes * _LARGE_BATCH / seconds)
        return Rates(f16=rate, q8=rate, q4=rate)

    def _batch(self, name: str, vectors: int, rows: int, count: int) -> tuple[int, list[int]]:
        """A context, and `count` products of matrices of `_batch_bytes` by that many vectors in it."""
        call = self._call
        context = call["ggml_init"](_Parameters(_CONTEXT_BYTES, None, True))
        others = call["ggml_new_tensor_2d"](context, _F32, _WIDTH, vectors)
        matrices = [call["ggml_new_tensor_2d"](context, _TYPES[name], _WIDTH, rows) for _ in range(count)]
        self._batch_bytes = call["ggml_nbytes"](matrices[0])
        return context, [call["ggml_mul_mat"](context, matrix, others) for matrix in matrices]

    def gpu_rates(self, total: int) -> Rates:
        """Bytes per second over `total` bytes of each kind, on a GPU."""
        return Rates(**{name: self._gpu_rate(name, total) for name in _TYPES})

    def _gpu_rate(self, name: str, total: int) -> int:
        call = self._call
        context = call["ggml_init"](_Parameters(_CONTEXT_BYTES, None, True))
        vector = call["ggml_new_tensor_2d"](context, _F32, _WIDTH, 1)
        products: list[int] = []
        size = 0
        while (len(products) + 1) * size <= total or len(products) < _MIN_PIECES:
            matrix = call["ggml_new_tensor_2d"](context, _TYPES[name], _WIDTH, _LARGE_ROWS)
            size = call["ggml_nbytes"](matrix)
            products.append(call["ggml_mul_mat"](context, matrix, vector))
        seconds = self._difference(context, products[:1], products)
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

    def gpu_step(self) -> int:
        """The same on a GPU."""
        context, chain = self._chain()
        seconds = self._difference(context, chain[:_FEW_STEPS], chain)
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

    def _difference(self, context: int, few: list[int], many: list[int]) -> float:
        """By how many seconds `many` takes longer than `few`, its first nodes. Frees the context."""
        call = self._call
        graphs = [(self._graph(context, results), results[-1]) for results in (few, many)]
        buffer = self._allocate(context)
        # Earlier work, such as clearing the buffer, may still be running.
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
        """Median seconds of one graph, of several equal ones in turn; including the read of `result`, if given."""
        times: list[float] = []
        end = time.perf_counter() + _SECONDS
        while len(times) < len(graphs) or (time.perf_counter() < end and len(times) < _MAX_PIECES):
            began = time.perf_counter()
            self._compute(graphs[len(times) % len(graphs)], result)
            times.append(time.perf_counter() - began)
        return sorted(times)[int(_PERCENTILE * len(times))]

    def _compute(self, graph: int, result: int) -> None:
        self._call["ggml_backend_graph_compute"](self._backend, graph)
        if result:
            # A backend may return before it has finished: reading the result waits for it.
            got = c_float()
            self._call["ggml_backend_tensor_get"](result, ctypes.byref(got), 0, ctypes.sizeof(got))


def measure(ggml: Ggml, names: tuple[str, ...]) -> Speed:
    """The speed of the named devices, or of those that models would use; of several GPUs the first."""
    device = ggml.choose_devices(RpcWorkerSpec(devices=names))[0]
    info = dict(ggml.devices())[device]
    if info.kind is not DeviceKind.CPU:
        return _measure_gpu(ggml, device, info.memory_free)
    bench = _Bench(ggml, device)
    cores = usable_cpus()
    (cached,) = bench.rates(_CACHE_BYTES, (1,))
    one, full = bench.rates(_MEMORY_BYTES, (1, cores))
    bench.threads(1)
    step, single = bench.step(), bench.batch_rates()
    alone, attention = bench.prompt_attention(), bench.token_attention(1)
    if cores > 1:
        attention = max(attention, bench.token_attention(cores))
    bench.threads(cores)
    batch = bench.batch_rates()
    # If another program uses a core, the threads wait long for each other. A busy machine is not slow for good.
    return Speed(
        cores=cores,
        cached=cached,
        one=one,
        full=Rates(f16=max(one.f16, full.f16), q8=max(one.q8, full.q8), q4=max(one.q4, full.q4)),
        step_ns=step,
        full_step_ns=min(bench.step(), _MAX_STEP_FACTOR * step),
        batch=Rates(f16=max(single.f16, batch.f16), q8=max(single.q8, batch.q8), q4=max(single.q4, batch.q4)),
        # With more threads it gains what products of matrices gain.
        attention=AttentionRates(prompt=int(alone * max(1.0, batch.f16 / single.f16)), token=attention),
    )


def measure_rpc(ggml: Ggml, endpoint: str, plugin: Path) -> Speed:
    """The speed of the first device of the RPC server at `endpoint`, which must speak the plugin's RPC version."""
    registry = ggml.load_plugin(plugin)
    here = dict(ggml.devices())
    ggml.add_rpc_servers(registry, (endpoint,))
    device, info = next((device, info) for device, info in ggml.devices() if device not in here)
    return _measure_gpu(ggml, device, info.memory_free)


def _measure_gpu(ggml: Ggml, device: Device, free: int) -> Speed:
    bench = _Bench(ggml, device)
    full = bench.gpu_rates(min(_LARGE_BYTES, max(_MEMORY_BYTES, free // 8)))
    return Speed(full=full, full_step_ns=bench.gpu_step(), batch=bench.gpu_batch_rates())


class EmbeddedProbe(msgspec.Struct, frozen=True, kw_only=True):
    """Version, build and devices of the wheel."""

    version: str = ""
    build: str = ""
    devices: tuple[DeviceInfo, ...] = ()


def probe(ggml: Ggml) -> EmbeddedProbe:
    """Examine the wheel."""
    xllamacpp = wheel()
    build = xllamacpp.BUILD_INFO
    return EmbeddedProbe(
        version=xllamacpp.__version__,
        build=f"ggml {ggml.version}, {build['compiler']}, {build['build_target']}",
        devices=tuple(info for _, info in ggml.devices()),
    )


def main(arguments: list[str]) -> int:
    """Answer, and leave without unloading."""
    # ggml prints on stdout, which is for the answer alone.
    answer = os.dup(1)
    os.dup2(2, 1)
    others, accelerators = parse_load(arguments)
    try:
        ggml = Ggml()
        ggml.load_accelerators(accelerators)
        match others:
            case [name, option, endpoint, plugin] if (name, option) == (_SPEED, _RPC):
                found = measure_rpc(ggml, endpoint, Path(plugin))
            case [name, *devices] if name == _SPEED:
                found = measure(ggml, tuple(devices[0].split(",")) if devices else ())
            case _:
                found = probe(ggml)
    except GgmlError as error:
        print(error, file=sys.stderr)  # noqa: T201 - for the parent
        return 1
    os.write(answer, msgspec.json.encode(found) + b"\n")
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
