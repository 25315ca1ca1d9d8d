"""llama.cpp's C API as the wheel exports it, as far as models and contexts need it (include/llama.h)."""

import ctypes
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int, c_int8, c_int32, c_int64, c_size_t, c_uint32
from ctypes import c_void_p as pointer
from pathlib import Path
from typing import Any, NamedTuple

from mesh_llm.core.types.model import GGML_TYPES
from mesh_llm.engine.sources.embedded.ggml import Ggml

Value = bool | int | float | str | Sequence[int] | Sequence[float] | Sequence[str]
"""What metadata holds: int is u32, float is f32."""

F32, F16, BF16 = 0, 1, 30
_U32, _I32, _F32 = 4, 5, 6
"""enum gguf_type."""

_U64 = 10
_ERROR = 4
"""enum ggml_log_level."""


class ModelParams(Structure):
    """struct llama_model_params."""

    _fields_ = (
        ("devices", pointer), ("tensor_buft_overrides", pointer), ("n_gpu_layers", c_int32), ("split_mode", c_int),
        ("load_mode", c_int), ("lazy_mode", c_int), ("main_gpu", c_int32), ("tensor_split", POINTER(c_float)),
        ("progress_callback", pointer), ("progress_callback_user_data", pointer), ("kv_overrides", pointer),
        ("vocab_only", c_bool), ("check_tensors", c_bool), ("use_extra_bufts", c_bool), ("no_host", c_bool),
        ("no_alloc", c_bool), ("load_mtp", c_bool),
    )  # fmt: skip


class ContextParams(Structure):
    """struct llama_context_params."""

    _fields_ = (
        ("n_ctx", c_uint32), ("n_batch", c_uint32), ("n_ubatch", c_uint32), ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32), ("n_outputs_max", c_uint32), ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32), ("n_threads_batch", c_int32), ("ctx_type", c_int), ("rope_scaling_type", c_int),
        ("pooling_type", c_int), ("attention_type", c_int), ("flash_attn_type", c_int), ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float), ("yarn_ext_factor", c_float), ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float), ("yarn_beta_slow", c_float), ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float), ("cb_eval", pointer), ("cb_eval_user_data", pointer), ("type_k", c_int),
        ("type_v", c_int), ("moe_cache_size", c_size_t), ("abort_callback", pointer),
        ("abort_callback_data", pointer), ("embeddings", c_bool), ("offload_kqv", c_bool), ("no_perf", c_bool),
        ("op_offload", c_bool), ("swa_full", c_bool), ("kv_unified", c_bool), ("samplers", pointer),
        ("n_samplers", c_size_t), ("ctx_other", pointer),
    )  # fmt: skip


class Batch(Structure):
    """struct llama_batch."""

    _fields_ = (
        ("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", POINTER(c_float)), ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)), ("seq_id", POINTER(POINTER(c_int32))), ("logits", POINTER(c_int8)),
    )  # fmt: skip


class _Override(Structure):
    _fields_ = (("pattern", c_char_p), ("buft", pointer))


class _InitParams(Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", pointer), ("no_alloc", c_bool))


class _Rows(Structure):
    """struct llama_embd."""

    _fields_ = (("data", pointer), ("n_rows", c_size_t), ("n_embd", c_size_t))


class Row(NamedTuple):
    """One entry of a batch of sequence 0: a token, or a row of `width` numbers in place of one.

    Attributes:
        position: in the sequence.
        width: numbers of the row; 0: a token.
        token: a token as well as a state.
        state: numbers of another model's hidden state that goes with it; 0: none.
    """

    position: int
    width: int = 0
    token: bool = False
    state: int = 0


_SetData = ctypes.CFUNCTYPE(None, pointer, pointer)
_Log = ctypes.CFUNCTYPE(None, c_int, c_char_p, pointer)

_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_init": (pointer, [_InitParams]),
    "ggml_free": (None, [pointer]),
    "ggml_new_tensor": (pointer, [pointer, c_int, c_int, POINTER(c_int64)]),
    "ggml_set_name": (pointer, [pointer, c_char_p]),
    "ggml_get_name": (c_char_p, [pointer]),
    "ggml_nbytes": (c_size_t, [pointer]),
    "ggml_backend_tensor_set": (None, [pointer, c_char_p, c_size_t, c_size_t]),
    "ggml_backend_cpu_buffer_type": (pointer, []),
    "gguf_init_empty": (pointer, []),
    "gguf_free": (None, [pointer]),
    "gguf_set_val_u32": (None, [pointer, c_char_p, c_uint32]),
    "gguf_set_val_f32": (None, [pointer, c_char_p, c_float]),
    "gguf_set_val_bool": (None, [pointer, c_char_p, c_bool]),
    "gguf_set_val_str": (None, [pointer, c_char_p, c_char_p]),
    "gguf_set_arr_data": (None, [pointer, c_char_p, c_int, pointer, c_size_t]),
    "gguf_set_arr_str": (None, [pointer, c_char_p, POINTER(c_char_p), c_size_t]),
    "gguf_add_tensor": (None, [pointer, pointer]),
    "gguf_write_to_file": (c_bool, [pointer, c_char_p, c_bool]),
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [_Log, pointer]),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_init_from_user": (pointer, [pointer, _SetData, pointer, ModelParams]),
    "llama_model_load_from_file": (pointer, [c_char_p, ModelParams]),
    "llama_model_free": (None, [pointer]),
    "llama_model_has_encoder": (c_bool, [pointer]),
    "llama_model_has_decoder": (c_bool, [pointer]),
    "llama_model_n_embd_inp": (c_int32, [pointer]),
    "llama_model_n_embd_out": (c_int32, [pointer]),
    "llama_init_from_model": (pointer, [pointer, ContextParams]),
    "llama_free": (None, [pointer]),
    "llama_decode": (c_int32, [pointer, Batch]),
    "llama_encode": (c_int32, [pointer, Batch]),
    "llama_batch_ext_init": (pointer, [pointer]),
    "llama_batch_ext_free": (None, [pointer]),
    "llama_batch_ext_add_token": (c_int32, [pointer, c_int32, c_int32]),
    "llama_batch_ext_add_embd": (c_int32, [pointer, c_int32, _Rows]),
    "llama_batch_ext_set_embd_state": (c_bool, [pointer, c_int32, _Rows]),
    "llama_batch_ext_set_pos": (c_bool, [pointer, c_int32, POINTER(c_int32)]),
    "llama_batch_ext_set_output_logits": (c_bool, [pointer, c_int32, c_bool]),
    "llama_process": (c_int32, [pointer, c_int, pointer]),
    "llama_synchronize": (None, [pointer]),
    "llama_set_embeddings": (None, [pointer, c_bool]),
    "llama_set_causal_attn": (None, [pointer, c_bool]),
    "llama_set_warmup": (None, [pointer, c_bool]),
    "llama_get_memory": (pointer, [pointer]),
    "llama_memory_clear": (None, [pointer, c_bool]),
    "llama_memory_seq_rm": (c_bool, [pointer, c_int32, c_int32, c_int32]),
    "llama_memory_seq_cp": (None, [pointer, c_int32, c_int32, c_int32, c_int32]),
    "llama_memory_seq_add": (None, [pointer, c_int32, c_int32, c_int32, c_int32]),
    "llama_memory_seq_pos_max": (c_int32, [pointer, c_int32]),
    "llama_memory_can_shift": (c_bool, [pointer]),
    "llama_state_seq_get_size": (c_size_t, [pointer, c_int32]),
    "llama_state_seq_get_data": (c_size_t, [pointer, pointer, c_size_t, c_int32]),
    "llama_state_seq_set_data": (c_size_t, [pointer, pointer, c_size_t, c_int32]),
    "llama_adapter_lora_init": (pointer, [pointer, c_char_p]),
    "llama_set_adapters_lora": (c_int32, [pointer, POINTER(pointer), c_size_t, POINTER(c_float)]),
    "llama_set_adapter_cvec": (c_int32, [pointer, POINTER(c_float), c_size_t, c_int32, c_int32, c_int32]),
}


class RefusedModelError(Exception):
    """llama.cpp does not load a model or make a context; the text holds its own words."""


class Llama:
    """The loaded library. Keeps its complaints."""

    def __init__(self, ggml: Ggml) -> None:
        self.call: Mapping[str, Any] = ggml.functions(_SIGNATURES)
        self.complaints: list[str] = []
        self._log = _Log(self._hear)
        self._kept: list[object] = []
        self.call["llama_log_set"](self._log, None)
        self.call["llama_backend_init"]()

    def _hear(self, level: int, text: bytes, _: object) -> None:
        if level == _ERROR:
            self.complaints.append(text.decode(errors="replace").strip())

    def why(self) -> str:
        """What was complained of since the last call."""
        said, self.complaints[:] = "; ".join(self.complaints), []
        return said

    # Model files

    @contextmanager
    def metadata(self, values: Mapping[str, Value]) -> Generator[int]:
        """A gguf_context with these values."""
        gguf = self.call["gguf_init_empty"]()
        try:
            for key, value in values.items():
                self._put(gguf, key.encode(), value)
            yield gguf
        finally:
            self.call["gguf_free"](gguf)

    def _put(self, gguf: int, key: bytes, value: Value) -> None:
        if isinstance(value, bool):
            self.call["gguf_set_val_bool"](gguf, key, value)
        elif isinstance(value, int):
            self.call["gguf_set_val_u32"](gguf, key, value)
        elif isinstance(value, float):
            self.call["gguf_set_val_f32"](gguf, key, value)
        elif isinstance(value, str):
            self.call["gguf_set_val_str"](gguf, key, value.encode())
        elif value and isinstance(value[0], str):
            texts = (c_char_p * len(value))(*(str(text).encode() for text in value))
            self.call["gguf_set_arr_str"](gguf, key, texts, len(value))
        else:
            kind, element = _element(key, value)
            array = (element * len(value))(*value)
            self.call["gguf_set_arr_data"](gguf, key, kind, array, len(value))

    def write(self, path: Path, values: Mapping[str, Value], tensors: Mapping[str, tuple[int, Sequence[int]]]) -> None:
        """A model file whose tensors, given as (type, shape), are filled with `content`."""
        sizes = {name: row_bytes(kind, shape) for name, (kind, shape) in tensors.items()}
        room = sum(sizes.values()) + 1024 * (len(sizes) + 1)
        ggml = self.call["ggml_init"](_InitParams(room, None, False))
        with self.metadata(values) as gguf:
            for name, (kind, shape) in tensors.items():
                tensor = self.call["ggml_new_tensor"](ggml, kind, len(shape), (c_int64 * len(shape))(*shape))
                self.call["ggml_set_name"](tensor, name.encode())
                data = content(name, kind, sizes[name])
                ctypes.memmove(self._data(tensor), data, len(data))
                self.call["gguf_add_tensor"](gguf, tensor)
            self.call["gguf_write_to_file"](gguf, str(path).encode(), False)
        self.call["ggml_free"](ggml)

    @staticmethod
    def _data(tensor: int) -> int:
        # ggml_tensor: type, buffer, ne, nb, op, op_params, flags, src, view_src, view_offs, data
        return ctypes.cast(tensor + 248, POINTER(pointer))[0] or 0

    @staticmethod
    def _shape(tensor: int) -> list[int]:
        shape = list(ctypes.cast(tensor + 16, POINTER(c_int64))[:4])
        while len(shape) > 1 and shape[-1] == 1:
            del shape[-1]
        return shape

    # Models

    def model_params(self, devices: Sequence[int], split: Sequence[float], output_on_host: bool) -> ModelParams:
        """All layers on the devices."""
        params = self.call["llama_model_default_params"]()
        listed = (pointer * (len(devices) + 1))(*devices, None)
        shares = (c_float * 128)(*split)
        params.devices = ctypes.cast(listed, pointer)
        params.tensor_split = shares
        params.n_gpu_layers = 999
        params.use_extra_bufts = False
        params.load_mode = 0
        self._kept += [listed, shares]
        if output_on_host:
            overrides = (_Override * 2)(_Override(b"^output", self.call["ggml_backend_cpu_buffer_type"]()), _Override())
            params.tensor_buft_overrides = ctypes.cast(overrides, pointer)
            self._kept.append(overrides)
        return params

    def build(self, values: Mapping[str, Value], types: Mapping[str, int], params: ModelParams) -> "Model":
        """A model with every tensor that its architecture may have, optional ones too. `types`: other than F32."""
        seen: dict[str, list[int]] = {}

        def fill(tensor: int, _: object) -> None:
            name, size = self.call["ggml_get_name"](tensor).decode(), self.call["ggml_nbytes"](tensor)
            kind = ctypes.cast(tensor, POINTER(c_int))[0]
            seen[name] = self._shape(tensor)
            self.call["ggml_backend_tensor_set"](tensor, content(name, kind, size), 0, size)

        callback = _SetData(fill)
        small = self.call["ggml_init"](_InitParams(1 << 20, None, True))
        with self.metadata(values) as gguf:
            for name, kind in types.items():
                block = GGML_TYPES[kind].block
                tensor = self.call["ggml_new_tensor"](small, kind, 1, (c_int64 * 1)(block))
                self.call["ggml_set_name"](tensor, name.encode())
                self.call["gguf_add_tensor"](gguf, tensor)
            made = self.call["llama_model_init_from_user"](gguf, callback, None, params)
        self.call["ggml_free"](small)
        if not made:
            raise RefusedModelError(self.why())
        return Model(self, made, seen)

    def load(self, path: Path, params: ModelParams) -> "Model":
        """A model from a file."""
        made = self.call["llama_model_load_from_file"](str(path).encode(), params)
        if not made:
            raise RefusedModelError(self.why())
        return Model(self, made, {})

    def process(self, context: int, encode: bool, rows: Sequence[Row]) -> int:
        """Compute a batch that holds more than tokens; llama_process's answer."""
        call = self.call
        batch = call["llama_batch_ext_init"](context)
        held: list[object] = []

        def numbers(count: int) -> _Rows:
            data = (c_float * count)(*([0.125] * count))
            held.append(data)
            return _Rows(ctypes.cast(data, pointer), 1, count)

        for row in rows:
            if row.width:
                at = call["llama_batch_ext_add_embd"](batch, 0, numbers(row.width))
            else:
                at = call["llama_batch_ext_add_token"](batch, 0, row.position)
            if at < 0:
                raise RefusedModelError(f"the batch does not take {row}: {at}")
            if row.state and not call["llama_batch_ext_set_embd_state"](batch, at, numbers(row.state)):
                raise RefusedModelError(f"the batch does not take the state of {row}")
            call["llama_batch_ext_set_pos"](batch, at, (c_int32 * 4)(*([row.position] * 3), 0))
            call["llama_batch_ext_set_output_logits"](batch, at, True)
        status = call["llama_process"](context, 0 if encode else 1, batch)
        call["llama_synchronize"](context)
        call["llama_batch_ext_free"](batch)
        return status


class Model:
    """A loaded model. `tensors`: shapes by name."""

    def __init__(self, llama: Llama, handle: int, tensors: dict[str, list[int]]) -> None:
        self.llama = llama
        self.handle = handle
        self.tensors = tensors

    def ask(self, name: str) -> Any:
        """A property of the model: `llama_model_NAME`."""
        return self.llama.call[f"llama_model_{name}"](self.handle)

    @contextmanager
    def context(self, **fields: object) -> Generator[int]:
        """A context; the fields are those of llama_context_params."""
        params = self.llama.call["llama_context_default_params"]()
        for name, value in fields.items():
            setattr(params, name, value)
        handle = self.llama.call["llama_init_from_model"](self.handle, params)
        if not handle:
            raise RefusedModelError(self.llama.why() or "no context")
        try:
            yield handle
        finally:
            self.llama.call["llama_free"](handle)

    def free(self) -> None:
        """Of no more use."""
        self.llama.call["llama_model_free"](self.handle)


def _element(key: bytes, value: Sequence[Any]) -> tuple[int, Any]:
    if any(isinstance(one, float) for one in value):
        return _F32, c_float
    if key.startswith(b"tokenizer"):
        return _I32, c_int32
    if re.search(rb"ple\.(layer_multipliers|head_)", key):
        return _U64, ctypes.c_uint64
    return _U32, c_uint32


def row_bytes(kind: int, shape: Sequence[int]) -> int:
    """Bytes of a tensor without gaps."""
    size = GGML_TYPES[kind].bytes * (shape[0] // GGML_TYPES[kind].block)
    for count in shape[1:]:
        size *= count
    return size


_PATTERN = b"".join(bytes(c_float(((number * 2654435761) % 1009 - 504) / 5040.0)) for number in range(1024))


def content(name: str, kind: int, size: int) -> bytes:
    """Bytes of a weight: small numbers where they are floats, zeros otherwise; the same at every run."""
    if kind != F32:
        return bytes(size)
    data = (_PATTERN * (size // len(_PATTERN) + 1))[:size]
    if "norm" in name and name.endswith("weight"):
        return bytes(c_float(1.0)) * (size // 4)
    return data


def tokens(sequences: Mapping[int, tuple[int, int]], outputs: str, vocabulary: int) -> tuple[Batch, list[object]]:
    """A batch: for each sequence its first position and how many tokens. `outputs`: `all`, `last` of each, or `none`.

    The second part must be held as long as the batch.
    """
    rows = [
        (position, sequence, outputs == "all" or (outputs == "last" and position == first + count - 1))
        for sequence, (first, count) in sequences.items()
        for position in range(first, first + count)
    ]
    total = len(rows)
    identities = (c_int32 * total)(*((7 * position + sequence) % vocabulary for position, sequence, _ in rows))
    positions = (c_int32 * total)(*(position for position, _, _ in rows))
    ones = (c_int32 * total)(*([1] * total))
    each = [(c_int32 * 1)(sequence) for _, sequence, _ in rows]
    lists = (POINTER(c_int32) * (total + 1))(*each)
    wanted = (c_int8 * total)(*(int(output) for _, _, output in rows))
    batch = Batch(total, identities, None, positions, ones, lists, wanted)
    return batch, [identities, positions, ones, each, lists, wanted]
