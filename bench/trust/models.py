"""The models of the benchmark, each at several quantisations, made by llama.cpp's own quantiser."""

import ctypes
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from tests.support.gguf_models import PRESETS, write_model
from tests.support.gguf_weights import Recipe

from mesh_llm.engine.sources.embedded.ggml import library_path
from mesh_llm.models.library.library import require_builtin

Floats = npt.NDArray[np.float32]

TYPES = {
    "f16": gguf.GGMLQuantizationType.F16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q6_K": gguf.GGMLQuantizationType.Q6_K,
    "q4_K": gguf.GGMLQuantizationType.Q4_K,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
    "q3_K": gguf.GGMLQuantizationType.Q3_K,
}

SHARP = replace(PRESETS["small"], name="sharp")
"""Sure of every token by some twenty nats: rounding never changes what it writes."""
SOFT = replace(PRESETS["small"], name="soft", noise=1.0, contrast=0.15)
"""Unsure of many tokens, as trained models are in free text."""
OTHERS = {
    "tiny": "tiny-draft",
    "sharp": replace(SHARP, name="sharp-other", seed=SHARP.seed + 100),
    "soft": replace(SOFT, name="soft-other", seed=SOFT.seed + 100),
}
"""What a host may serve instead of a model: a smaller one that was trained to say the same, or one of the same shape
whose random part differs. Both mostly write the same words."""

_RECIPES = {"sharp": SHARP, "soft": SOFT}
_STEPS = 127
"""Of q8_0: values between a block's largest and 0."""


def make(directory: Path, model: str, quantisations: tuple[str, ...]) -> dict[str, Path]:
    """Files of a model by quantisation, and of what may be served instead of it by `other`."""
    whole = directory / f"{model}-f16.gguf"
    if model in _RECIPES:
        write_model(whole, _RECIPES[model])
    else:
        converted(require_builtin(model), whole, "f16", spread=True)
    files = {"f16": whole}
    for kind in quantisations:
        if kind not in files:
            files[kind] = directory / f"{model}-{kind}.gguf"
            converted(whole, files[kind], kind)
    other = OTHERS[model]
    files["other"] = directory / f"{model}-other.gguf"
    if isinstance(other, Recipe):
        write_model(files["other"], other)
    else:
        converted(require_builtin(other), files["other"], "f16")
    return files


def converted(source: Path, target: Path, kind: str, *, spread: bool = False) -> None:
    """Write a model anew with its matrices in another type.

    With `spread`, matrices of q8_0 are what they may have been before they were rounded: each value is drawn evenly
    from those that round to it. Otherwise the f16 file would hold the same values as the q8_0 one.
    """
    reader = gguf.GGUFReader(source)
    rng = np.random.default_rng(24)
    writer = gguf.GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        sub_type = field.types[-1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub_type)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values)
            continue
        if spread and tensor.tensor_type is gguf.GGMLQuantizationType.Q8_0:
            values = _spread(values, rng)
        writer.add_tensor(tensor.name, _encoded(values, kind), raw_dtype=TYPES[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _spread(values: Floats, rng: np.random.Generator) -> Floats:
    blocks = values.reshape(-1, 32)
    most = np.abs(blocks).max(axis=1, keepdims=True)
    moved = blocks + rng.uniform(-0.5, 0.5, blocks.shape).astype(np.float32) * (most / _STEPS)
    # The largest value of a block sets its scale.
    return np.where(np.abs(blocks) >= most * (1 - 1 / _STEPS), blocks, moved).astype(np.float32).reshape(values.shape)


def _encoded(values: Floats, kind: str) -> npt.NDArray[np.generic]:
    if kind == "f16":
        return values.astype(np.float16)
    rows, columns = values.shape
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[TYPES[kind]]
    if columns % block_size:
        raise ValueError(f"rows of {columns} values cannot be {kind}")
    packed = np.empty((rows, columns // block_size * block_bytes), np.uint8)
    _quantise(
        int(TYPES[kind]), np.ascontiguousarray(values).ctypes.data, packed.ctypes.data, 0, rows, columns, None
    )  # fmt: skip
    return packed


def _quantise(*arguments: int | None) -> None:
    """ggml_quantize_chunk (ggml/include/ggml.h): type, source, target, first value, rows, columns, importance."""
    library = ctypes.CDLL(str(library_path()))
    function = library.ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    function(*arguments)
