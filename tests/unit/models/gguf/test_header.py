import ctypes
import importlib.util
import io
import struct
from pathlib import Path

import pytest
from tests.support.gguf_writer import Raw, Tensor, header, llama_metadata, llama_tensors, string, write

from mesh_llm.core.types.model import GGML_TYPES, cache_row_bytes
from mesh_llm.models.gguf.header import GgufArray, GgufError, Limits, ValueType, parse_header, read_header


def parse(data: bytes, size: int | None = None, limits: Limits | None = None):
    return parse_header(io.BytesIO(data), len(data) if size is None else size, limits or Limits())


def refused(data: bytes, size: int | None = None, limits: Limits | None = None) -> GgufError:
    with pytest.raises(GgufError) as caught:
        parse(data, size, limits)
    return caught.value


def one(key: str, item: object) -> bytes:
    return header([(key, item)])[0]  # pyright: ignore[reportArgumentType]


def test_a_model_reads_as_the_reference_reader_reads_it(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_name("a model")
    writer.add_context_length(2048)
    writer.add_rope_freq_base(10000.0)
    writer.add_add_bos_token(False)
    writer.add_token_list(["a", "b", "ü"])
    writer.add_token_types([1, 2, 3])
    writer.add_int64("x.minus", -7)
    writer.add_float64("x.double", 0.5)
    import numpy as np

    writer.add_tensor("one", np.ones((3, 5), np.float32))
    writer.add_tensor("two", np.ones((64, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    ours = read_header(tmp_path / "m.gguf")
    assert ours.text("general.name") == "a model"
    assert ours.integer("llama.context_length") == 2048
    assert ours.metadata["llama.rope.freq_base"] == 10000.0
    assert ours.metadata["tokenizer.ggml.add_bos_token"] is False
    assert ours.metadata["x.minus"] == -7
    assert ours.metadata["x.double"] == 0.5
    tokens = ours.array("tokenizer.ggml.tokens")
    assert tokens is not None
    assert tokens.values == ("a", "b", "ü")
    theirs = gguf.GGUFReader(tmp_path / "m.gguf")
    assert [(t.name, list(t.shape), t.size, ours.data_offset + t.offset) for t in ours.tensors] == [
        (t.name, [int(n) for n in t.shape], int(t.n_bytes), int(t.data_offset)) for t in theirs.tensors
    ]


def test_type_sizes_are_the_engines() -> None:
    spec = importlib.util.find_spec("xllamacpp")
    assert spec is not None
    assert spec.origin is not None
    ggml = ctypes.CDLL(str(next(Path(spec.origin).parent.glob("xllamacpp*.so"))))
    ggml.ggml_type_name.restype = ctypes.c_char_p
    ggml.ggml_type_size.restype = ctypes.c_size_t
    ggml.ggml_blck_size.restype = ctypes.c_int64
    for number in range(43):
        block = ggml.ggml_blck_size(number)
        if block == 0:
            assert number not in GGML_TYPES
            continue
        kind = GGML_TYPES[number]
        assert (kind.name, kind.block, kind.bytes) == (
            ggml.ggml_type_name(number).decode(),
            block,
            ggml.ggml_type_size(number),
        )
    assert max(GGML_TYPES) == 42


def test_cache_rows_are_whole_blocks() -> None:
    assert cache_row_bytes("f16", 128) == 256
    assert cache_row_bytes("q8_0", 128) == 136
    assert cache_row_bytes("q4_0", 33) == 36


def test_long_arrays_and_strings_are_hashed_not_kept() -> None:
    limits = Limits(kept_elements=4, kept_string_bytes=10)
    same = [one("k", [f"token {i}" for i in range(9)]), one("k", [f"token {i}" for i in range(9)])]
    other = one("k", [f"token {i}" for i in range(8)] + ["token x"])
    arrays = [parse(data, limits=limits).array("k") for data in (*same, other)]
    assert all(array is not None and array.values is None and array.count == 9 for array in arrays)
    digests = [array.digest for array in arrays if array is not None]
    assert digests[0] == digests[1] != digests[2]

    numbers = parse(one("k", list(range(9))), limits=limits).array("k")
    assert numbers is not None
    assert (numbers.values, numbers.count, numbers.length) == (None, 9, 36)
    long = parse(one("k", "x" * 11), limits=limits).metadata["k"]
    assert isinstance(long, GgufArray)
    assert (long.element, long.count, long.values) == (ValueType.UINT8, 11, None)


def test_array_digest_does_not_depend_on_being_kept_or_on_buffer_bounds() -> None:
    tokens = [f"token number {i}" for i in range(90_000)]
    data = one("k", tokens)
    assert len(data) > 2 << 20
    short, long = (
        parse(data, limits=Limits(kept_elements=1)).array("k"),
        parse(data, limits=Limits(kept_elements=1 << 20)).array("k"),
    )
    assert short is not None
    assert long is not None
    assert short.digest == long.digest
    assert data[short.offset : short.offset + short.length] == b"".join(map(string, tokens))


def test_header_digest_tells_headers_and_sizes_apart() -> None:
    data, size = header(llama_metadata(), llama_tensors())
    first = parse(data, size).digest
    assert parse(data, size).digest == first
    assert parse(data, size + 1).digest != first
    assert parse(header(llama_metadata(name="x"), llama_tensors())[0], size + 64).digest != first


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "ends inside"),
        (b"GGUF", "ends inside"),
        (b"<html><head>", "does not start with the letters GGUF"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack("<IQQ", 4, 0, 0), "version 4"),
        (b"GGUF" + struct.pack("<IQQ", 0, 0, 0), "version 0"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 62, 0), "tensors, more than"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 62), "metadata entries, more than"),
        (header([("a", 1), ("a", 2)])[0], "there twice"),
        (one("", 1), "key is empty"),
        (one("k" * 2000, 1), "2000 bytes long"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"\xff" + struct.pack("<II", 4, 1), "not UTF-8"),
        (one("k", Raw(13, b"")), "unknown type 13"),
        (one("k", Raw(9, struct.pack("<IQ", 9, 1))), "array of arrays"),
        (one("k", Raw(9, struct.pack("<IQ", 4, 1 << 61))), "elements, more than"),
        (one("k", Raw(9, struct.pack("<IQ", 8, 1 << 20))), "ends inside metadata k"),
        (one("k", Raw(8, struct.pack("<Q", 1 << 63))), "ends inside a string"),
        (one("general.alignment", 0), "alignment 0"),
        (one("general.alignment", 48), "alignment 48"),
        (one("general.alignment", 1 << 21), "power of two"),
        (one("general.alignment", "x"), "not a number"),
        (header({}, [Tensor("t", (1, 1, 1, 1, 1))])[0], "5 dimensions"),
        (header({}, [Tensor("t" * 64, (1,))])[0], "64 bytes long"),
        (header({}, [Tensor("t", (32,)), Tensor("t", (32,))])[0], "there twice"),
        (header({}, [Tensor("t", (32,), 4)])[0], "unknown or removed type 4"),
        (header({}, [Tensor("t", (32,), 1 << 31)])[0], "unknown or removed type"),
        (header({}, [Tensor("t", (33,), "q8_0")])[0], "not a multiple of q8_0's 32"),
        (header({}, [Tensor("t", (1 << 62, 1 << 62))])[0], "larger than can be addressed"),
        (header({}, [Tensor("t", (0, 1 << 63))])[0], "larger than can be addressed"),
        (header({}, [Tensor("t", (32,), offset=32)])[0], "is at offset 32, not at 0"),
        (header({}, [Tensor("t", (32,)), Tensor("u", (32,), offset=0)])[0], "is at offset 0, not at 64"),
        (header({}, [Tensor("t", (1 << 20,))])[0], "ends after the end of the file"),
    ],
)  # fmt: skip
def test_bad_headers_are_refused_saying_what_is_wrong(data: bytes, says: str) -> None:
    assert says in refused(data).reason


def test_a_header_cut_anywhere_is_incomplete() -> None:
    data, size = header(llama_metadata(), llama_tensors())
    assert parse(data, size).tensors
    for cut in range(4, len(data), 7):
        assert refused(data[:cut]).incomplete
    assert refused(data, size - 64).incomplete


def test_the_whole_header_is_bounded() -> None:
    data = one("k", [f"token {i}" for i in range(1000)])
    error = refused(data, limits=Limits(header_bytes=1000))
    assert "over 1000 bytes" in error.reason
    assert not error.incomplete
    assert (
        "metadata without large arrays"
        in refused(header([(str(i), "x" * 100) for i in range(50)])[0], limits=Limits(kept_bytes=1000)).reason
    )
    assert (
        "string of 11 bytes"
        in refused(one("k", ["x" * 11] * 5), limits=Limits(kept_elements=1, kept_string_bytes=10)).reason
    )


def test_files_without_a_header_to_read(tmp_path: Path) -> None:
    with pytest.raises(GgufError, match="not a regular file"):
        read_header(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "none.gguf")
    assert read_header(write(tmp_path / "m.gguf", llama_metadata(), llama_tensors())).version == 3
    assert read_header(write(tmp_path / "m2.gguf", llama_metadata(), llama_tensors(), version=2)).version == 2
