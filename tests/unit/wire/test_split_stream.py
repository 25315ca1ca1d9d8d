import pytest

from mesh_llm.wire.codec import Malformed, encode
from mesh_llm.wire.ggml_rpc.tunnel import SplitStream, decode_split_stream
from mesh_llm.wire.mesh.frames import MAX_PARAMETERS


def test_everything_comes_back() -> None:
    stream = SplitStream(model="big", term=7, tunnel=b"x" * 1024)
    assert decode_split_stream(encode(stream)) == stream
    assert len(encode(stream)) < MAX_PARAMETERS


@pytest.mark.parametrize(
    "stream",
    [
        SplitStream(model="", term=1),
        SplitStream(model="m" * 257, term=1),
        SplitStream(model="m", term=-1),
        SplitStream(model="m", term=1, tunnel=b"x" * 1025),
    ],
)
def test_what_is_out_of_bounds_is_malformed(stream: SplitStream) -> None:
    assert isinstance(decode_split_stream(encode(stream)), Malformed)


def test_nothing_is_malformed() -> None:
    assert isinstance(decode_split_stream(b""), Malformed)
