"""An EngineSpec in llama-server's own options, as far as a given build knows them (llama.cpp: common/arg.cpp)."""

from collections.abc import Iterable

from mesh_llm.core.errors import MeshError
from mesh_llm.engine.spec import LOOPBACK, NO_PROGRAMS, EngineSpec, output_override

_ALL_LAYERS = "999"


def server_arguments(spec: EngineSpec, known: frozenset[str]) -> list[str]:
    """The arguments after the program's name.

    Args:
        spec: what to run.
        known: options that this build's `--help` names; those that only tune are left out where it does not know them.

    Raises:
        MeshError: `engine_option_unknown`, when the build lacks what the spec cannot do without.
    """
    return [
        *("--model", str(spec.model), "--alias", spec.alias),
        *_door(spec, known),
        *("--ctx-size", str(spec.total_context), "--parallel", str(spec.slots)),
        *("--batch-size", str(spec.batch), "--ubatch-size", str(spec.even_micro_batch)),
        *("--cache-type-k", spec.cache_type, "--cache-type-v", spec.cache_type),
        *("--metrics", "--jinja"),
        *_where(spec, known),
        *(("--embeddings", *(("--pooling", spec.pooling) if spec.pooling else ())) if spec.embeddings else ()),
        *(("--threads", str(spec.threads)) if spec.threads is not None else ()),
        *(("--mmproj", str(spec.mmproj)) if spec.mmproj is not None else ()),
        *_draft(spec, known),
        *_tuning(spec, known),
    ]


def _door(spec: EngineSpec, known: frozenset[str]) -> list[str]:
    """Where it listens, and the key that it demands: from a file, since command lines can be read by everybody."""
    address = ["--host", LOOPBACK, "--port", str(spec.port)] if spec.socket is None else ["--host", str(spec.socket)]
    if spec.key_file is None:
        return address
    _require(known, "--api-key-file", "keeping other users of this machine out")
    return [*address, "--api-key-file", str(spec.key_file)]


def _where(spec: EngineSpec, known: frozenset[str]) -> list[str]:
    cpu_only = spec.uses_cpu_only and not spec.rpc
    layers = "0" if cpu_only else _ALL_LAYERS
    arguments = ["--n-gpu-layers", layers if spec.gpu_layers is None else str(spec.gpu_layers)]
    if spec.rpc:
        _require(known, "--rpc", "splitting a model")
        arguments += ["--rpc", ",".join(spec.rpc)]
    if cpu_only:
        arguments += ["--device", "none"]
    elif spec.devices and not spec.rpc:
        arguments += ["--device", ",".join(spec.devices)]
    if spec.tensor_split:
        arguments += ["--tensor-split", ",".join(f"{share:g}" for share in spec.tensor_split)]
    if spec.output_on_host:
        arguments += ["--override-tensor", output_override(spec.output_device)]
    return arguments


def _draft(spec: EngineSpec, known: frozenset[str]) -> list[str]:
    if spec.draft is None:
        return []
    if "--spec-type" in known:
        arguments = ["--model-draft", str(spec.draft), "--spec-type", "draft-simple"]
        arguments += ["--spec-draft-n-max", str(spec.draft_max)]
    else:
        _require(known, "--model-draft", "speculative decoding")
        arguments = ["--model-draft", str(spec.draft), "--draft-max", str(spec.draft_max)]
    if spec.rpc or spec.uses_cpu_only:
        # The draft runs where the host is: a guess must not cross the network.
        local = spec.devices[0] if spec.devices and not spec.uses_cpu_only else "none"
        arguments += ["--device-draft", local]
    return arguments


def _tuning(spec: EngineSpec, known: frozenset[str]) -> list[str]:
    wanted: Iterable[tuple[str, ...]] = (
        # Sizes were decided before the launch; and each trial of a fit costs round trips to every worker.
        ("--fit", "off"),
        ("--slots",),
        ("--no-webui",),
        ("--offline",),
        ("--log-colors", "off"),
        ("--cors-origins", "localhost"),
        ("--cache-ram", str(spec.prompt_cache_mib)),
        ("--video-ffmpeg-dir", NO_PROGRAMS),
    )
    return [word for words in wanted if words[0] in known for word in words]


def _require(known: frozenset[str], flag: str, purpose: str) -> None:
    if flag not in known:
        raise MeshError(
            code="engine_without_rpc" if flag == "--rpc" else "engine_option_unknown",
            message=f"This llama-server does not know {flag}, which {purpose} needs.",
            hint="Give a newer build, made with GGML_RPC=ON, by --bin-dir; or leave it out to use the embedded engine.",
            status=503,
        )
