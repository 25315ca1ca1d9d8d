"""Which further options of llama-server, and which variables, a user may give an engine (`engine_args`, `environment`).

What is not listed here is refused. An engine's options can open ports, read and write files, load programs, and undo
what the node relies on; so an option of a new llama.cpp is refused until somebody has read what it does.

Source: llama.cpp, common/arg.cpp of the pinned engine build.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from mesh_llm.core.types.errors import UNREADABLE, MeshError


@dataclass(frozen=True, kw_only=True)
class Argument:
    """One option.

    Attributes:
        flag: as llama-server names it.
        place: of its value in llama.cpp's `common_params`, with dots; what the embedded engine sets.
        value: of an option without a value: what is set.
        choices: words that it takes, with what is set: a value, or `ENUM.MEMBER` of the wheel.
        least, most: of a number. `whole`: without a fraction.
        bit: of `sampling.user_sampling_config`, which says that a model's own default does not count.
        objects: it takes a JSON object.
    """

    flag: str
    place: str
    value: object = None
    choices: Mapping[str, object] = field(default_factory=dict[str, object])
    least: float = 0.0
    most: float = 0.0
    whole: bool = True
    bit: int = 0
    objects: bool = False

    @property
    def takes_value(self) -> bool:
        """Whether a value follows it."""
        return self.value is None

    def read(self, text: str) -> object:
        """The value for the embedded engine. Raises ValueError with the reason, as the end of a sentence."""
        if self.choices:
            if text not in self.choices:
                raise ValueError(f"takes {_listed(self.choices)}, not {text[:40]!r}")
            return self.choices[text]
        if self.objects:
            return _kwargs(text)
        number = _number(text)
        if number is None or not self.least <= number <= self.most or (self.whole and number != int(number)):
            kind = "a whole number" if self.whole else "a number"
            raise ValueError(f"takes {kind} from {_shown(self.least)} to {_shown(self.most)}, not {text[:40]!r}")
        return int(number) if self.whole else number


def _shown(number: float) -> str:
    return str(int(number)) if number == int(number) else str(number)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _kwargs(text: str) -> dict[str, str]:
    try:
        values = msgspec.json.decode(text, type=dict[str, Any])
    except UNREADABLE:
        raise ValueError('takes a JSON object, as in {"enable_thinking": false}') from None
    return {name: msgspec.json.encode(value).decode() for name, value in values.items()}


def _flag(flag: str, place: str, value: object) -> Argument:
    return Argument(flag=flag, place=place, value=value)


def _whole(flag: str, place: str, least: int, most: int, bit: int = 0) -> Argument:
    return Argument(flag=flag, place=place, least=least, most=most, bit=bit)


def _real(flag: str, place: str, least: float, most: float, bit: int = 0) -> Argument:
    return Argument(flag=flag, place=place, least=least, most=most, whole=False, bit=bit)


def _word(flag: str, place: str, **choices: object) -> Argument:
    return Argument(flag=flag, place=place, choices={name.replace("_", "-"): value for name, value in choices.items()})


_FLASH, _ROPE = "llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_", "llama_rope_scaling_type.LLAMA_ROPE_SCALING_TYPE_"
_NUMA, _REASONING = "ggml_numa_strategy.GGML_NUMA_STRATEGY_", "common_reasoning_format.COMMON_REASONING_FORMAT_"

_ALLOWED = (
    # Memory and speed
    _word("--flash-attn", "flash_attn_type", on=f"{_FLASH}ENABLED", off=f"{_FLASH}DISABLED", auto=f"{_FLASH}AUTO"),
    _flag("--no-kv-offload", "no_kv_offload", True),
    _flag("--no-op-offload", "no_op_offload", True),
    _flag("--no-repack", "no_extra_bufts", True),
    _flag("--no-host", "no_host", True),
    _flag("--no-warmup", "warmup", False),
    _flag("--check-tensors", "check_tensors", True),
    _flag("--swa-full", "swa_full", True),
    _flag("--kv-unified", "kv_unified", True),
    _word("--numa", "numa", distribute=f"{_NUMA}DISTRIBUTE", isolate=f"{_NUMA}ISOLATE", numactl=f"{_NUMA}NUMACTL"),
    _whole("--poll", "cpuparams.poll", 0, 100),
    # Prompts and their caches
    _flag("--context-shift", "ctx_shift", True),
    _flag("--no-cache-prompt", "cache_prompt", False),
    _whole("--cache-reuse", "n_cache_reuse", 0, 1 << 20),
    _whole("--keep", "n_keep", -1, 1 << 20),
    _whole("--ctx-checkpoints", "n_ctx_checkpoints", 0, 4096),
    _whole("--checkpoint-min-step", "checkpoint_min_step", 0, 1 << 24),
    _real("--slot-prompt-similarity", "slot_prompt_similarity", 0.0, 1.0),
    _whole("--image-min-tokens", "image_min_tokens", 1, 1 << 16),
    _whole("--image-max-tokens", "image_max_tokens", 1, 1 << 16),
    # Chat
    _word(
        "--reasoning-format",
        "reasoning_format",
        none=f"{_REASONING}NONE",
        auto=f"{_REASONING}AUTO",
        deepseek=f"{_REASONING}DEEPSEEK",
        deepseek_legacy=f"{_REASONING}DEEPSEEK_LEGACY",
    ),
    Argument(flag="--chat-template-kwargs", place="default_template_kwargs", objects=True),
    _flag("--special", "special", True),
    # Positions
    _word("--rope-scaling", "rope_scaling_type", none=f"{_ROPE}NONE", linear=f"{_ROPE}LINEAR", yarn=f"{_ROPE}YARN"),
    _real("--rope-freq-base", "rope_freq_base", 0.0, 1e9),
    _real("--rope-freq-scale", "rope_freq_scale", 0.0, 1e3),
    _whole("--yarn-orig-ctx", "yarn_orig_ctx", 0, 1 << 30),
    _real("--yarn-ext-factor", "yarn_ext_factor", -1.0, 1e3),
    _real("--yarn-attn-factor", "yarn_attn_factor", -1.0, 1e3),
    _real("--yarn-beta-slow", "yarn_beta_slow", -1.0, 1e3),
    _real("--yarn-beta-fast", "yarn_beta_fast", -1.0, 1e3),
    # Sampling
    _whole("--repeat-last-n", "sampling.penalty_last_n", 0, 1 << 20, 1 << 7),
    _real("--typical", "sampling.typ_p", 0.0, 1.0),
    _real("--xtc-probability", "sampling.xtc_probability", 0.0, 1.0, 1 << 4),
    _real("--xtc-threshold", "sampling.xtc_threshold", 0.0, 1.0, 1 << 5),
    _real("--dry-multiplier", "sampling.dry_multiplier", 0.0, 100.0),
    _real("--dry-base", "sampling.dry_base", 1.0, 100.0),
    _whole("--dry-allowed-length", "sampling.dry_allowed_length", 0, 1 << 20),
    _whole("--dry-penalty-last-n", "sampling.dry_penalty_last_n", 0, 1 << 20),
    _whole("--mirostat", "sampling.mirostat", 0, 2, 1 << 9),
    _real("--mirostat-ent", "sampling.mirostat_tau", 0.0, 100.0, 1 << 10),
    _real("--mirostat-lr", "sampling.mirostat_eta", 0.0, 10.0, 1 << 11),
    _real("--dynatemp-range", "sampling.dynatemp_range", 0.0, 10.0),
    _real("--dynatemp-exp", "sampling.dynatemp_exponent", 0.0, 10.0),
    # Speculation
    _whole("--spec-draft-n-min", "speculative.draft.n_min", 0, 64),
    _real("--spec-draft-p-min", "speculative.draft.p_min", 0.0, 1.0),
    _real("--spec-draft-p-split", "speculative.draft.p_split", 0.0, 1.0),
    _whole("--spec-ngram-simple-size-n", "speculative.ngram_simple.size_n", 1, 1024),
    _whole("--spec-ngram-simple-size-m", "speculative.ngram_simple.size_m", 1, 1024),
    _whole("--spec-ngram-simple-min-hits", "speculative.ngram_simple.min_hits", 1, 1024),
    _whole("--spec-ngram-map-k-size-n", "speculative.ngram_map_k.size_n", 1, 1024),
    _whole("--spec-ngram-map-k-size-m", "speculative.ngram_map_k.size_m", 1, 1024),
    _whole("--spec-ngram-map-k-min-hits", "speculative.ngram_map_k.min_hits", 1, 1024),
    _whole("--spec-ngram-mod-n-min", "speculative.ngram_mod.n_min", 0, 1024),
    _whole("--spec-ngram-mod-n-max", "speculative.ngram_mod.n_max", 0, 1024),
    _whole("--spec-ngram-mod-n-match", "speculative.ngram_mod.n_match", 1, 1024),
)

ALLOWED: dict[str, Argument] = {argument.flag: argument for argument in _ALLOWED}
"""The options that may be given, by flag."""

_SHORT = {
    "-fa": "--flash-attn", "-nkvo": "--no-kv-offload", "-nr": "--no-repack", "-kvu": "--kv-unified",
    "-ctxcp": "--ctx-checkpoints", "-cms": "--checkpoint-min-step", "-sps": "--slot-prompt-similarity",
    "-sp": "--special", "--typical-p": "--typical", "--draft-p-min": "--spec-draft-p-min",
    "--draft-p-split": "--spec-draft-p-split",
}  # fmt: skip
"""Further names of allowed options."""

_INSTEAD = {
    **dict.fromkeys(("-c", "--ctx-size"), "ctx-size"),
    **dict.fromkeys(("-np", "--parallel"), "parallel"),
    **dict.fromkeys(("-ctk", "-ctv", "--cache-type-k", "--cache-type-v"), "cache-type"),
    **dict.fromkeys(("-ngl", "--gpu-layers", "--n-gpu-layers"), "gpu-layers"),
    **dict.fromkeys(("-cmoe", "-ncmoe", "--cpu-moe", "--n-cpu-moe", "-ot", "--override-tensor"), "cpu-moe"),
    **dict.fromkeys(("-md", "--model-draft", "--spec-draft-model"), "draft"),
    **dict.fromkeys(("--draft", "--draft-n", "--draft-max", "--spec-draft-n-max"), "draft-max"),
    "--spec-type": "speculation",
    **dict.fromkeys(("-mm", "--mmproj", "--no-mmproj"), "mmproj"),
    **dict.fromkeys(("--temp", "--temperature"), "temperature"),
    "--top-p": "top-p", "--top-k": "top-k", "--min-p": "min-p", "--repeat-penalty": "repeat-penalty",
    "--presence-penalty": "presence-penalty", "--frequency-penalty": "frequency-penalty",
    **dict.fromkeys(("-s", "--seed"), "seed"),
    **dict.fromkeys(("-n", "--predict", "--n-predict"), "max-tokens"),
    **dict.fromkeys(("--chat-template", "--chat-template-file"), "chat-template"),
    **dict.fromkeys(("-sys", "--system-prompt"), "system-prompt"),
    "--reasoning-budget": "reasoning-budget",
    **dict.fromkeys(("-a", "--alias"), "aliases"),
}  # fmt: skip
"""Options that are settings of a model by another name."""

_NODES = frozenset((
    "-m", "--model", "-hf", "-hfr", "--hf-repo", "-hff", "--hf-file", "-mu", "--model-url", "-b", "--batch-size", "-ub",
    "--ubatch-size", "--embedding", "--embeddings", "--pooling", "--metrics", "--slots", "--no-slots", "--props",
    "--jinja", "--no-jinja", "--offline", "-fit", "--fit", "--cache-ram", "-cram", "--ui", "--webui", "--no-ui",
    "--no-webui", "-t", "--threads", "-tb", "--threads-batch", "-dev", "--device", "-ts", "--tensor-split", "-sm",
    "--split-mode", "-mg", "--main-gpu", "--log-colors", "--cors-origins", "--reranking", "--rerank",
    "--no-kv-unified", "--prefill-assistant", "--no-prefill-assistant", "-to", "--timeout", "--threads-http",
))  # fmt: skip
_PORTS = frozenset((
    "--host", "--port", "--api-key", "--api-key-file", "--ssl-key-file", "--ssl-cert-file", "--api-prefix", "--rpc",
    "--reuse-port", "--tools", "--webui-mcp-proxy", "--ui-mcp-proxy",
))  # fmt: skip
_FILES = re.compile(
    r"--(?:.*-(?:file|dir|path|url|static|dynamic)|path|lora.*|control-vector.*|file|slot-save-path|media-path"
    r"|prompt-cache.*|models-.*|mcp-.*|sleep-idle-seconds|grammar.*|json-schema.*|in-file|log-.*|override-kv)"
)

VARIABLES: frozenset[str] = frozenset((
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_LAUNCH_BLOCKING", "CUDA_SCALE_LAUNCH_QUEUES",
    "GGML_CUDA_ENABLE_UNIFIED_MEMORY", "GGML_CUDA_DISABLE_GRAPHS", "GGML_CUDA_DISABLE_FUSION", "GGML_CUDA_NO_PINNED",
    "GGML_CUDA_FORCE_MMQ", "GGML_CUDA_FORCE_CUBLAS", "GGML_CUDA_P2P", "GGML_CPU_DISABLE_FUSION",
    "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HSA_OVERRIDE_GFX_VERSION", "HSA_ENABLE_SDMA",
    "GGML_VK_VISIBLE_DEVICES", "GGML_VK_DISABLE_F16", "GGML_VK_DISABLE_COOPMAT", "GGML_VK_DISABLE_COOPMAT2",
    "GGML_VK_DISABLE_INTEGER_DOT_PRODUCT", "GGML_VK_DISABLE_BFLOAT16", "GGML_VK_DISABLE_FUSION",
    "GGML_VK_DISABLE_HOST_VISIBLE_VIDMEM", "GGML_VK_ALLOW_SYSMEM_FALLBACK", "GGML_VK_PREFER_HOST_MEMORY",
    "GGML_VK_FORCE_MAX_ALLOCATION_SIZE", "GGML_VK_SUBALLOCATION_BLOCK_SIZE", "GGML_METAL_CONCURRENCY_DISABLE",
    "GGML_METAL_FUSION_DISABLE", "GGML_SCHED_DEBUG", "OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES",
    "OMP_WAIT_POLICY", "GOMP_CPU_AFFINITY", "GOMP_SPINCOUNT", "KMP_AFFINITY", "KMP_BLOCKTIME", "MALLOC_ARENA_MAX",
))  # fmt: skip
"""The variables that may be given. None names a file, a library or a program."""

_LOADERS = re.compile(r"(?:LD_|DYLD_|PYTHON|GCONV|PATH$|VK_|GGML_BACKEND|CUDA_INJECTION|NVIDIA_|OCL_)")


def read_arguments(words: Iterable[str]) -> tuple[tuple[Argument, str], ...]:
    """Check `engine_args`: each option with its value; the value is empty for an option without one.

    `--flag=value` is one word or two. Raises MeshError(engine_argument).
    """
    found: list[tuple[Argument, str]] = []
    rest = list(words)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        argument = ALLOWED.get(_SHORT.get(flag, flag))
        if argument is None:
            raise _refused(*_why_not(flag))
        if not argument.takes_value:
            if equals:
                raise _refused(f"{flag} takes no value.", f"Write only {flag}.")
            found.append((argument, ""))
            continue
        if not equals:
            if not rest:
                raise _refused(f"{flag} needs a value.", f'Write it as a further element: ["{flag}", "..."].')
            value = rest.pop(0)
        try:
            read = argument.read(value)
        except ValueError as error:
            raise _refused(f"{flag} {error}.", "Correct the value.") from None
        found.append((argument, _shown(read) if isinstance(read, int | float) else value))
    return tuple(found)


def check_environment(variables: Iterable[str]) -> None:
    """Check the names of `environment`. Raises MeshError(engine_variable)."""
    for name in variables:
        if name in VARIABLES:
            continue
        near = difflib.get_close_matches(name, VARIABLES, 1, 0.8)
        if _LOADERS.match(name):
            why = "it can make the engine load other programs or libraries"
        elif name.startswith(("LLAMA_", "MESH_LLM_")):
            why = "it is an option in disguise; use engine-args, or the setting of that name"
        else:
            why = "it is not among those that are known to be safe"
        hint = f"Did you mean {near[0]}?" if near else f"Possible are {_listed(sorted(VARIABLES))}."
        raise MeshError(
            code="engine_variable",
            message=f"An engine may not be given the variable {name[:60]!r}: {why}.",
            hint=hint,
            status=400,
        )


def _why_not(flag: str) -> tuple[str, str]:
    """Why an option is refused, and what to do."""
    shown = flag[:60]
    if not flag.startswith("-"):
        return f"{shown!r} is no option.", 'Each word is an element, as in ["--flash-attn", "on"].'
    if flag in _INSTEAD:
        return f"{shown} has a setting of its own.", f"Use the setting {_INSTEAD[flag]} of the model."
    if flag in _NODES:
        return f"{shown} is set by the node itself.", "Leave it out. mesh-llm --help lists what can be chosen."
    if flag in _PORTS:
        return f"{shown} is refused: it opens the engine to other programs.", "Leave it out."
    near = difflib.get_close_matches(flag, ALLOWED, 1, 0.75)
    hint = f"Did you mean {near[0]}?" if near else f"Possible are {_listed(ALLOWED)}."
    if _FILES.fullmatch(flag):
        return f"{shown} is refused: it reads or writes files, or keeps what clients send.", "Leave it out."
    return f"{shown} is not among the options that an engine may be given.", hint


def _listed(words: Iterable[str]) -> str:
    return ", ".join(words)


def _refused(message: str, hint: str) -> MeshError:
    return MeshError(code="engine_argument", message=f"engine-args: {message}", hint=hint, status=400)


def put(params: Any, argument: Argument, text: str, enum: Callable[[str], object]) -> None:
    """Set an option in the embedded engine's parameters. `enum`: finds `TYPE.MEMBER` in the wheel."""
    value = argument.read(text) if argument.takes_value else argument.value
    if isinstance(value, str):
        value = enum(value)
    *parents, name = argument.place.split(".")
    holder = params
    for parent in parents:
        holder = getattr(holder, parent)
    setattr(holder, name, value)
    if argument.bit:
        params.sampling.user_sampling_config |= argument.bit
