"""The embedded llama-server: `python -m mesh_llm.engine.sources.embedded.server_main SPEC [PLUGIN]`.

SPEC is an EngineSpec as JSON; PLUGIN is RPC's. `--load PLUGIN` names an accelerator's, and `--slots LIBRARY` what
reaches the slots, which is served at the spec's `slot_socket`. Prints `listening on ADDRESS` when the model is loaded,
and serves until it is killed. Uses only public fields of CommonParams, and ggml's C API.
"""

import ctypes
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from mesh_llm.engine.arguments import put, read_arguments
from mesh_llm.engine.slots import SlotError, SlotListener
from mesh_llm.engine.sources.embedded.ggml import Ggml, GgmlError, wheel
from mesh_llm.engine.sources.embedded.guessing import EngineGuesses
from mesh_llm.engine.sources.embedded.loading import parse_load
from mesh_llm.engine.sources.embedded.slot_access import EngineSlots, load
from mesh_llm.engine.spec import (
    LOOPBACK,
    NGRAM,
    NGRAM_KEY,
    NO_PROGRAMS,
    EngineSpec,
    experts_override,
    layers_override,
    output_override,
)

SLOTS = "--slots"
"""Before the library that reaches the slots."""

_ALL_LAYERS = 999
_SET_DUMPABLE = 4
_ATTRIBUTES_BYTES = 256
"""More than any `pthread_attr_t` has."""
_STACK_BYTES = 8 << 20
_STACK_GUARD_BYTES = 1 << 20
"""For each thread; as much as the kernel leaves free below the first thread's stack."""
_TENSOR_SPLIT_LENGTH = 128


def main(arguments: list[str]) -> int:
    """Serve. Returns only if that failed."""
    others, accelerators = parse_load(arguments)
    slots = None
    if SLOTS in others:
        at = others.index(SLOTS)
        slots = Path(others[at + 1])
        del others[at : at + 2]
    spec = EngineSpec.from_json(others[0])
    harden()
    # Nothing needs saving. The default action ends the process at once, even while the library holds Python's lock.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        ggml = Ggml()
        ggml.load_accelerators(accelerators)
        if spec.devices:
            ggml.keep_devices(spec.devices)
        if spec.rpc:
            registry = ggml.load_plugin(Path(others[1]))
            ggml.add_rpc_servers(registry, spec.rpc, before=bool(spec.host_layers), after=bool(spec.mtp_layers))
        library = None if slots is None or spec.slot_socket is None else _load(slots)
        guesses = None if library is None else _guesses(library, spec)
        if guesses is None:
            spec = spec.unswitched
        params = common_params(spec, ggml)
        listener = None if library is None or spec.slot_socket is None else SlotListener(spec.slot_socket)
        server = wheel().Server(params)
    except (GgmlError, OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)  # noqa: T201 - goes to the child's log
        return 1
    if listener is not None:
        _serve_slots(listener, next(iter(params.api_keys), ""), library, server, guesses)
    # On a line of its own, even if the library has left one unfinished.
    print(f"\nlistening on {server.listening_address}", flush=True)  # noqa: T201 - read by the supervisor
    while True:
        signal.pause()


def _load(library: Path) -> Any:
    try:
        return load(library)
    except (GgmlError, OSError) as error:
        _warn(f"prompt caches are not saved, and guesses not switched: {error}")
        return None


def _guesses(library: Any, spec: EngineSpec) -> EngineGuesses | None:
    """What decides how many tokens are guessed ahead; None where nothing is, or the engine cannot be asked."""
    if not spec.speculation_type:
        return None
    try:
        return EngineGuesses(library, spec.draft_max, while_it_pays=spec.while_it_pays)
    except SlotError as error:
        _warn(f"guesses are not switched: {error}")
        return None


def _serve_slots(listener: SlotListener, key: str, library: Any, server: Any, guesses: EngineGuesses | None) -> None:
    """Answer about the slots, in a thread. Without them the model is served all the same."""
    try:
        access = EngineSlots(library, server, guesses)
    except SlotError as error:
        listener.close()
        _warn(f"prompt caches are not saved: {error}")
        return
    threading.Thread(target=listener.serve, args=(key, access), name="slots", daemon=True).start()


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)  # noqa: T201 - for the log


def harden() -> None:
    """No core dumps, which would contain prompts; and stacks that end in a guard.

    llama.cpp parses grammars and JSON schemas by recursion. A stack that overflows must hit unmapped memory, which ends
    the process, and not the stack of another thread. By default the C library gives each thread one page of guard, and
    a frame can be larger than that.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    libc.prctl(_SET_DUMPABLE, 0, 0, 0, 0)
    if not hasattr(libc, "pthread_setattr_default_np"):
        return
    attributes = ctypes.create_string_buffer(_ATTRIBUTES_BYTES)
    if libc.pthread_attr_init(attributes) == 0:
        libc.pthread_attr_setstacksize(attributes, ctypes.c_size_t(_STACK_BYTES + _STACK_GUARD_BYTES))
        libc.pthread_attr_setguardsize(attributes, ctypes.c_size_t(_STACK_GUARD_BYTES))
        libc.pthread_setattr_default_np(attributes)


def common_params(spec: EngineSpec, ggml: Ggml) -> Any:
    """The spec as llama.cpp's parameters (common/common.h)."""
    xllamacpp = wheel()
    params = xllamacpp.CommonParams()
    params.model.path = str(spec.model)
    params.model_alias = {spec.alias}
    params.hostnames = [LOOPBACK if spec.socket is None else str(spec.socket)]
    params.port = spec.port
    if spec.key_file is not None:
        params.api_keys = [spec.key_file.read_text().strip()]
    params.n_ctx = spec.total_context
    params.n_parallel = spec.slots
    params.n_batch = spec.batch
    params.n_ubatch = spec.even_micro_batch
    params.cache_ram_mib = spec.prompt_cache_mib
    # Sizes were decided before the launch.
    params.fit_params = False
    params.endpoint_metrics = True
    params.endpoint_slots = True
    params.use_jinja = True
    params.ui = False
    params.cors_origins = "localhost"
    params.offline = True
    params.n_gpu_layers = _layers(spec)
    if spec.tensor_split:
        before = [float(spec.host_layers)] if spec.host_layers else []
        after = [float(spec.mtp_layers + 1)] if spec.mtp_layers else []
        split = [*before, *spec.tensor_split, *after]
        params.tensor_split = split + [0.0] * (_TENSOR_SPLIT_LENGTH - len(split))
    overrides = [output_override(_buffer_type(spec, ggml))] if spec.output_on_host else []
    if spec.own_layers:
        overrides.append(layers_override(spec.own_layers))
        # What it would choose: it compares the device of the layer, which is the processor's second entry here.
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
    overrides += [experts_override(spec.cpu_moe)] if spec.cpu_moe else []
    if overrides:
        params.tensor_buft_overrides = ",".join(overrides)
    if spec.threads is not None:
        params.cpuparams.n_threads = spec.threads
    kind = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{spec.cache_type.upper()}")
    params.cache_type_k = kind
    params.cache_type_v = kind
    if spec.embeddings:
        params.embedding = True
        if spec.pooling:
            params.pooling_type = getattr(xllamacpp.llama_pooling_type, f"LLAMA_POOLING_TYPE_{spec.pooling.upper()}")
    if spec.mmproj is not None:
        params.mmproj.path = str(spec.mmproj)
        params.video_ffmpeg_bin_dir = NO_PROGRAMS
    if spec.speculation_type:
        _speculate(params, spec)
    _choose(params, spec)
    return params


def _choose(params: Any, spec: EngineSpec) -> None:
    """What the user set for this model."""
    for name, (place, bit) in _DEFAULTS.items():
        value = getattr(spec.sampling, name)
        if value is not None:
            setattr(params.sampling, place, value)
            params.sampling.user_sampling_config |= bit
    if spec.sampling.max_tokens is not None:
        params.n_predict = spec.sampling.max_tokens
    if spec.chat_template:
        params.chat_template = spec.chat_template
    if spec.reasoning_budget is not None:
        params.sampling.reasoning_budget_tokens = spec.reasoning_budget
    for argument, text in read_arguments(spec.more):
        put(params, argument, text, _member)


_DEFAULTS = {
    "temperature": ("temp", 1 << 6),
    "top_p": ("top_p", 1 << 2),
    "top_k": ("top_k", 1 << 1),
    "min_p": ("min_p", 1 << 3),
    "repeat_penalty": ("penalty_repeat", 1 << 8),
    "presence_penalty": ("penalty_present", 0),
    "frequency_penalty": ("penalty_freq", 0),
    "seed": ("seed", 0),
}
"""Of Sampling: the field of llama.cpp, and its bit in `common_params_sampling_config` (common/common.h).

Without the bit, a default that the model's file names comes first.
"""


def _member(name: str) -> object:
    kind, _, member = name.partition(".")
    return getattr(getattr(wheel(), kind), member)


def _layers(spec: EngineSpec) -> int:
    if spec.gpu_layers is not None and not spec.host_layers:
        return spec.gpu_layers
    return 0 if spec.uses_cpu_only and not spec.rpc else _ALL_LAYERS


def _speculate(params: Any, spec: EngineSpec) -> None:
    speculative = params.speculative
    name = f"COMMON_SPECULATIVE_TYPE_{spec.speculation_type.replace('-', '_').upper()}"
    speculative.types = [getattr(wheel().common_speculative_type, name)]
    speculative.draft.n_max = spec.draft_max
    if spec.speculation == NGRAM:
        speculative.ngram_map_k.size_n = NGRAM_KEY
        speculative.ngram_map_k.size_m = spec.draft_max
    if spec.draft is None:
        return
    speculative.draft.mparams.path = str(spec.draft)
    if spec.rpc or spec.uses_cpu_only:
        # The draft runs on the host: guesses must not cross the network.
        speculative.draft.n_gpu_layers = 0
        speculative.draft.devices = "none"


def _buffer_type(spec: EngineSpec, ggml: Ggml) -> str:
    for device, info in ggml.devices():
        if info.id == spec.output_device:
            return ggml.buffer_type(device)
    raise GgmlError(f"there is no device {spec.output_device} for the output layer")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
