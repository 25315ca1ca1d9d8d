"""What an engine is to run, and what an engine says of itself. Independent of where the engine comes from."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Self

import msgspec

from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.model_settings import Sampling
from mesh_llm.engine.arguments import check_environment, read_arguments

CPU_DEVICE = "CPU"
"""The device id that stands for the processor in `devices`."""

LOOPBACK = "127.0.0.1"

NO_PROGRAMS = "/dev/null"
"""Not a folder: llama.cpp shall find no ffmpeg or ffprobe here.

It runs them on what it cannot read as a picture, and they open the addresses in a playlist.
"""

NGRAM = "ngram"
"""Guesses from the text so far: llama.cpp's `ngram-map-k`, with sizes of this project.

It looks for the last `NGRAM_KEY` tokens in the text so far and guesses those that followed; it remembers how many of
them were right, and guesses no more the next time.
"""

NGRAM_TYPE = "ngram-map-k"
NGRAM_KEY = 8
"""Tokens that must have been seen before. llama.cpp's own 12 begins later; with fewer, guesses are often wrong."""

CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
"""KV cache element types that llama.cpp takes (`--cache-type-k`)."""


class _Spec:
    def to_json(self) -> str:
        """The spec as one line, for a child's command line."""
        return msgspec.json.encode(self, enc_hook=str).decode()

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`. Raises msgspec.ValidationError."""
        return msgspec.json.decode(text, type=cls, dec_hook=_decode_path)


@dataclass(frozen=True, kw_only=True)
class EngineSpec(_Spec):
    """One llama-server.

    Attributes:
        model: GGUF file, the first part if there are several.
        alias: the name under which it answers.
        context: tokens that each slot can use; the engine's whole context is `context * slots`.
        slots: requests worked on at once.
        port: loopback port, 0 for any free one; used where the engine cannot listen on `socket`.
        socket: path of a Unix socket, ending in `.sock`, in a directory that only this user can enter; None for TCP.
        key_file: file with the key that clients must send; None for none.
        slot_socket: path of the Unix socket for its slots (`engine/slots.py`); None for none. Only the embedded engine
            has such a thing.
        draft: a smaller GGUF of the same vocabulary for speculative decoding.
        draft_max: most tokens drafted at once.
        devices: device ids as the engine names them (`CUDA0`), in the order of `tensor_split`; `CPU` alone for none;
            empty for the engine's choice.
        gpu_layers: layers on devices other than the CPU, counted from the last, the output layer; None for all.
        cpu_moe: of a mixture of experts: layers whose experts are in main memory, counted from the first.
        rpc: `unix:PATH` or `host:port` of RPC servers, in layer order. They come before local devices in
            `tensor_split`.
        tensor_split: proportion of the offloaded layers for each device, RPC servers first.
        host_layers: layers that this machine's processor computes before those of the RPC servers. llama-server takes
            their number from `gpu_layers`.
        output_on_host: keep the output layer on this machine's own device, so that workers return hidden states.
        cache_type: KV cache element type.
        embeddings: answer /v1/embeddings as well.
        pooling: how token embeddings become one vector (`mean`, `cls`, `last`, `rank`); empty for the model's own.
        threads: CPU threads; None for the engine's choice.
        mmproj: GGUF of a multimodal projector.
        batch: tokens of a prompt in one batch.
        micro_batch: tokens computed at once; bounds the compute buffers, and the length of an embedding's input.
        prompt_cache_mib: memory for the prompts of slots that now serve other requests, MiB.
        sampling: defaults of requests.
        speculation: the kind of guesses, as llama.cpp names it: `draft-simple` (also where it is empty and there is a
            draft), `draft-eagle3`, `draft-dflash`, `draft-mtp` (the model's own heads if there is no draft),
            `ngram-...`; or NGRAM. Empty without a draft: none.
        mtp_layers: of a split model: last layers, which guess, that this machine's processor computes after those of
            the RPC servers, with the output layer.
        while_it_pays: nobody named that kind: guess only what gains, as far as the engine can be switched.
        chat_template: in Jinja, or the name of a built-in one; empty for the model's own.
        reasoning_budget: most tokens of reasoning; None for the engine's default.
        environment: variables of the process.
        more: further options, as the user wrote them.
    """

    model: Path
    alias: str
    context: int
    slots: int
    port: int = 0
    socket: Path | None = None
    key_file: Path | None = None
    slot_socket: Path | None = None
    draft: Path | None = None
    draft_max: int = 16
    devices: tuple[str, ...] = ()
    gpu_layers: int | None = None
    cpu_moe: int = 0
    rpc: tuple[str, ...] = ()
    tensor_split: tuple[float, ...] = ()
    host_layers: int = 0
    output_on_host: bool = False
    cache_type: str = "f16"
    embeddings: bool = True
    pooling: str = "mean"
    threads: int | None = None
    mmproj: Path | None = None
    batch: int = 2048
    micro_batch: int = 512
    prompt_cache_mib: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    speculation: str = ""
    while_it_pays: bool = False
    mtp_layers: int = 0
    chat_template: str = ""
    reasoning_budget: int | None = None
    environment: tuple[tuple[str, str], ...] = ()
    more: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what makes llama.cpp crash, and what a user may not give it.

        Raises:
            MeshError: `engine_spec_invalid`, `engine_argument`, `engine_variable`.
        """
        read_arguments(self.more)
        check_environment(name for name, _ in self.environment)
        if self.context < 1 or self.slots < 1:
            raise _invalid(f"A context of {self.context} tokens in {self.slots} slots cannot be served.")
        if self.cache_type not in CACHE_TYPES:
            raise _invalid(f"`{self.cache_type}` is not a KV cache type.", f"Use one of {', '.join(CACHE_TYPES)}.")
        for endpoint in self.rpc:
            if not endpoint.startswith((f"{LOOPBACK}:", "unix:/")):
                raise _invalid(f"RPC endpoint {endpoint} is not on loopback; llama.cpp's RPC has no protection.")

    @property
    def total_context(self) -> int:
        """Tokens over all slots: llama.cpp's `--ctx-size`."""
        return self.context * self.slots

    @property
    def even_micro_batch(self) -> int:
        """The largest size up to `micro_batch` that llama.cpp can compute with embeddings.

        With pooling, llama.cpp aborts while it loads (`ggml_can_mul_mat`) unless the slots divide the micro-batch; seen
        with 3, 5, 6, 7 and 9 slots of 512.
        """
        if not (self.embeddings and self.pooling):
            return self.micro_batch
        return max(1, self.micro_batch // self.slots) * self.slots

    @property
    def uses_cpu_only(self) -> bool:
        """Whether only the processor computes on this machine."""
        return self.devices == (CPU_DEVICE,)

    @property
    def own_layers(self) -> tuple[int, ...]:
        """Of a split model: the layers of this machine's processor, counted from 0, if it is a device for llama.cpp."""
        after = self.host_layers + int(sum(self.tensor_split))
        return (*range(self.host_layers), *range(after, after + self.mtp_layers))

    @property
    def speculation_type(self) -> str:
        """llama.cpp's `--spec-type`; empty for none."""
        if self.draft is not None and not self.speculation.startswith("draft-"):
            return "draft-simple"
        return NGRAM_TYPE if self.speculation == NGRAM else self.speculation

    @property
    def unswitched(self) -> "EngineSpec":
        """The spec for an engine that cannot be switched: of guesses that nobody named, only a draft model's."""
        return self if self.draft is not None or not self.while_it_pays else replace(self, speculation="")

    @property
    def output_device(self) -> str:
        """The local device that keeps the output layer, if `output_on_host` is set."""
        return self.devices[0] if self.devices else CPU_DEVICE


@dataclass(frozen=True, kw_only=True)
class RpcWorkerSpec(_Spec):
    """One ggml RPC server, for one session of one host.

    Attributes:
        socket: path of its Unix socket, in a directory that only this user can enter.
        port: loopback port, if it cannot have a Unix socket. Chosen before the start: an RPC server does not print it.
        devices: device ids to lend; empty for all accelerators, or the CPU if there are none.
        threads: CPU threads; None for as many as this process may use.
    """

    socket: Path | None = None
    port: int = 0
    devices: tuple[str, ...] = ()
    threads: int | None = None

    @property
    def endpoint(self) -> str:
        """`host:port` on its command line. With a Unix socket the port is only a placeholder."""
        return f"{LOOPBACK}:{self.port or 1}"


class DeviceKind(StrEnum):
    """ggml's type of a device."""

    CPU = "cpu"
    GPU = "gpu"
    INTEGRATED_GPU = "igpu"
    ACCELERATOR = "accel"
    SOFTWARE = "software"
    """A processor that a driver shows as a GPU, as Mesa's llvmpipe does: only for `--device`."""


@dataclass(frozen=True, kw_only=True)
class DeviceInfo:
    """A device as the engine lists it.

    Attributes:
        id: the engine's name for it, as in `CUDA0`; for `EngineSpec.devices`.
        name: for people, as in `NVIDIA RTX 4090`.
        kind: what it is.
        memory_total: bytes, 0 if unknown.
        memory_free: bytes, 0 if unknown.
    """

    id: str
    name: str
    kind: DeviceKind
    memory_total: int = 0
    memory_free: int = 0

    @property
    def holds_models(self) -> bool:
        """Whether it is a GPU: layers can be offloaded to it."""
        return self.kind in (DeviceKind.GPU, DeviceKind.INTEGRATED_GPU)

    @property
    def computes_apart(self) -> bool:
        """Whether it is a GPU for llama.cpp: also one that is the processor again."""
        return self.holds_models or self.kind is DeviceKind.SOFTWARE


class PartState(StrEnum):
    """What became of a part of the engine that is built on its machine."""

    READY = "ready"
    MISSING = "missing"
    BUILDING = "building"
    FAILED = "failed"


class EnginePart(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the embedded engine that is built on its machine.

    Attributes:
        name: `rpc`: the plugin that splits models. `slots`: the library that saves prompt caches. `cuda`, `rocm`,
            `vulkan`: the plugin that uses GPUs.
        state: a node builds what is `missing` by itself, and nothing that is `failed`.
        version: of what it offers; the RPC protocol, as in `8.0.0`.
        path: of the library; empty without one.
        text: how it was made, what is being done, or why it is not there.
        hint: what to do about that.
        log: path of the build's log; empty without one.
        percent: of a compilation that is going on.
    """

    name: str
    state: PartState
    version: str = ""
    path: str = ""
    text: str = ""
    hint: str = ""
    log: str = ""
    percent: int | None = None


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """What one engine source offers on this machine.

    Attributes:
        source: `embedded` or `binaries`.
        version: as in `2026.10.11549`, or the build number of a binary.
        build: compiler, commit and target, as far as they are known.
        rpc_version: ggml RPC protocol, as in `8.0.0`; empty without RPC.
        confinement: how its RPC server is confined, as in `seccomp and Landlock`, or `not confined`; empty without RPC.
        not_lent: why no memory is lent for split models although RPC works: it cannot be confined; empty otherwise.
        path: the program or library.
        devices: as the engine lists them; the CPU included.
        problems: what is missing and what to do about it, in sentences. Empty when all is well.
        usable: whether it can serve a model.
        parts: of the embedded engine: what is built on its machine.
    """

    source: str
    version: str = ""
    build: str = ""
    rpc_version: str = ""
    confinement: str = ""
    not_lent: str = ""
    path: str = ""
    devices: tuple[DeviceInfo, ...] = ()
    problems: tuple[str, ...] = ()
    usable: bool = True
    parts: tuple[EnginePart, ...] = ()

    @property
    def label(self) -> str:
        """Source and version in few words, as in `embedded 2026.10.11549`."""
        return f"{self.source} {self.version}".strip()

    @property
    def has_gpu(self) -> bool:
        """Whether it can use a GPU."""
        return any(device.holds_models for device in self.devices)


def experts_override(layers: int) -> str:
    """The value of `--override-tensor` that keeps the experts of the first layers in main memory.

    Source: llama.cpp, common/common.h, LLM_FFN_EXPS_REGEX.
    """
    numbers = "|".join(map(str, range(layers)))
    return rf"blk\.({numbers})\.ffn_(up|down|gate|gate_up)_(ch|)exps={CPU_DEVICE}"


def layers_override(layers: Iterable[int], memory: str = CPU_DEVICE) -> str:
    """The value of `--override-tensor` that keeps these layers, counted from 0, in `memory`.

    In main memory llama.cpp may arrange weights as the processor computes fastest, which it does not do for a device.
    """
    numbers = "|".join(map(str, layers))
    return rf"^blk\.({numbers})\.={memory}"


def output_override(memory: str) -> str:
    """The value of `--override-tensor` that keeps the output layer in `memory`, such as `CPU` or `CUDA0`.

    A model with tied embeddings has no output tensor: llama.cpp loads `token_embd` twice under this name. So it is kept
    too, in main memory, where the first of the two always is. Measured at a worker of such a model: 2,742 bytes per
    token without this, 1,001 with it.
    """
    return f"^output={memory},^token_embd={CPU_DEVICE}"


def _invalid(message: str, hint: str = "") -> MeshError:
    return MeshError(code="engine_spec_invalid", message=message, hint=hint, status=400)


def _decode_path(kind: type, value: object) -> Path:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise TypeError(f"cannot read {kind} from {type(value)}")
