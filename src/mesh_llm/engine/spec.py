"""What an engine is asked to run. Says nothing of where the engine comes from."""

from dataclasses import dataclass
from pathlib import Path

import msgspec

from mesh_llm.core.types.errors import MeshError

CPU_DEVICE = "CPU"
"""The device id that stands for the processor in `devices`."""

LOOPBACK = "127.0.0.1"

NO_PROGRAMS = "/dev/null"
"""A folder that is none: where llama.cpp is told to look for ffmpeg and ffprobe.

It hands them what it cannot read as a picture, and they follow the addresses that a playlist holds.
"""

CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
"""KV cache element types that llama.cpp takes (`--cache-type-k`)."""


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """One llama.cpp server.

    Attributes:
        model: GGUF file, the first part where there are several.
        alias: the name under which it answers.
        context: tokens that each slot can use; the engine's whole context is `context * slots`.
        slots: requests worked on at once.
        port: loopback port, 0 for any free one; where `socket` can be had, that is taken instead.
        socket: path of a Unix socket, ending in `.sock`, in a directory that nobody else can enter; None for TCP.
        key_file: file with the key that is demanded of clients; None for none.
        draft: a smaller GGUF of the same vocabulary for speculative decoding.
        draft_max: most tokens drafted at once.
        devices: device ids as the engine names them (`CUDA0`); `CPU` alone for none; empty for the engine's choice.
            In a split, `tensor_split` rules: a share of 0 leaves a device out.
        gpu_layers: layers on devices other than the CPU, counted from the last; None for all.
        rpc: `unix:PATH` or `host:port` of RPC servers, in layer order. They come before local devices in
            `tensor_split`.
        tensor_split: share of the offloaded layers per device, RPC servers first.
        output_on_host: keep the output layer on this machine's own device, so that workers return hidden states.
        cache_type: KV cache element type.
        embeddings: answer /v1/embeddings as well.
        pooling: how token embeddings become one vector (`mean`, `cls`, `last`, `rank`); empty for the model's own.
        threads: CPU threads; None for the engine's choice.
        mmproj: GGUF of a multimodal projector.
        batch: tokens of a prompt handed to the model at once.
        micro_batch: tokens computed at once; bounds the compute buffers, and the length of an embedding's input.
        prompt_cache_mib: host memory for prompts of slots that were given to others, MiB.
    """

    model: Path
    alias: str
    context: int
    slots: int
    port: int = 0
    socket: Path | None = None
    key_file: Path | None = None
    draft: Path | None = None
    draft_max: int = 16
    devices: tuple[str, ...] = ()
    gpu_layers: int | None = None
    rpc: tuple[str, ...] = ()
    tensor_split: tuple[float, ...] = ()
    output_on_host: bool = False
    cache_type: str = "f16"
    embeddings: bool = True
    pooling: str = "mean"
    threads: int | None = None
    mmproj: Path | None = None
    batch: int = 2048
    micro_batch: int = 512
    prompt_cache_mib: int = 256

    def __post_init__(self) -> None:
        """Refuse what llama.cpp would crash on. Raises MeshError `engine_spec_invalid`."""
        if self.context < 1 or self.slots < 1:
            raise _invalid(f"A context of {self.context} tokens in {self.slots} slots cannot be served.")
        if self.cache_type not in CACHE_TYPES:
            raise _invalid(f"`{self.cache_type}` is not a KV cache type.", f"Take one of {', '.join(CACHE_TYPES)}.")
        for endpoint in self.rpc:
            if not endpoint.startswith((f"{LOOPBACK}:", "unix:/")):
                raise _invalid(f"RPC endpoint {endpoint} is not on loopback; llama.cpp's RPC protects nothing.")

    @property
    def total_context(self) -> int:
        """Tokens over all slots: llama.cpp's `--ctx-size`."""
        return self.context * self.slots

    @property
    def even_micro_batch(self) -> int:
        """`micro_batch`, as near to it from below as llama.cpp can compute with embeddings on.

        With pooling it aborts while it loads (`ggml_can_mul_mat`) unless the slots divide the micro batch; seen with
        3, 5, 6, 7 and 9 slots of 512.
        """
        if not (self.embeddings and self.pooling):
            return self.micro_batch
        return max(1, self.micro_batch // self.slots) * self.slots

    @property
    def uses_cpu_only(self) -> bool:
        """True when local devices other than the processor were ruled out."""
        return self.devices == (CPU_DEVICE,)

    @property
    def output_device(self) -> str:
        """The local device that keeps the output layer where `output_on_host` says so."""
        return self.devices[0] if self.devices else CPU_DEVICE

    def to_json(self) -> str:
        """The spec as one line, for a child's command line."""
        return _encode(self)

    @staticmethod
    def from_json(text: str) -> "EngineSpec":
        """The inverse of `to_json`. Raises msgspec.ValidationError."""
        return msgspec.json.decode(text, type=EngineSpec, dec_hook=_decode_path)


@dataclass(frozen=True, kw_only=True)
class RpcWorkerSpec:
    """One ggml RPC server, for one session of one host.

    Attributes:
        socket: path of its Unix socket, in a directory that nobody else can enter.
        port: loopback port, where it cannot have a Unix socket; must be chosen before the start, since an RPC server
            does not tell its port.
        devices: device ids to lend; empty for all accelerators, or the CPU where there are none.
        threads: CPU threads; None for as many as this process may use.
    """

    socket: Path | None = None
    port: int = 0
    devices: tuple[str, ...] = ()
    threads: int | None = None

    @property
    def endpoint(self) -> str:
        """`host:port` that it is told to listen on. With a Unix socket the port only stands for that."""
        return f"{LOOPBACK}:{self.port or 1}"

    def to_json(self) -> str:
        """The spec as one line, for a child's command line."""
        return _encode(self)

    @staticmethod
    def from_json(text: str) -> "RpcWorkerSpec":
        """The inverse of `to_json`. Raises msgspec.ValidationError."""
        return msgspec.json.decode(text, type=RpcWorkerSpec, dec_hook=_decode_path)


def output_override(memory: str) -> str:
    """What `--override-tensor` is told to keep the output layer in `memory`, as in `CPU` or `CUDA0`.

    A model with tied embeddings has no output tensor: llama.cpp loads `token_embd` twice, by its own name both times,
    so that is kept here too, in main memory, where the first of the two always is. Without it a worker of such a model
    was seen to return 2,742 bytes per token, with it 1,001.
    """
    return f"^output={memory},^token_embd={CPU_DEVICE}"


def _invalid(message: str, hint: str = "") -> MeshError:
    return MeshError(code="engine_spec_invalid", message=message, hint=hint, status=400)


def _encode(spec: EngineSpec | RpcWorkerSpec) -> str:
    return msgspec.json.encode(spec, enc_hook=str).decode()


def _decode_path(kind: type, value: object) -> Path:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise TypeError(f"cannot read {kind} from {type(value)}")
