"""A frame that has begun is waited for in one call; everything else is read as it comes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh_llm.split.framing import frame_reader
from mesh_llm.wire.ggml_rpc.protocol import Command, ReplyParser, Request, RequestParser, SizeBounds, reply, request


class Wire:
    """A stream that gives what a network would: little at a time. `exact`: whether it can wait for more."""

    def __init__(self, data: bytes, packet: int) -> None:
        self.data = data
        self.packet = packet
        self.calls = 0

    async def read(self, limit: int) -> bytes:
        self.calls += 1
        taken, self.data = self.data[: min(limit, self.packet)], self.data[min(limit, self.packet) :]
        return taken

    async def write(self, data: bytes) -> None:
        raise AssertionError("nothing is written here")

    async def finish(self) -> None: ...

    def abort(self) -> None: ...


class QuicWire(Wire):
    async def read_exact(self, size: int) -> bytes:
        self.calls += 1
        if len(self.data) < size:
            raise ConnectionResetError("the stream ended too early")
        taken, self.data = self.data[:size], self.data[size:]
        return taken


def bounds(_: int) -> SizeBounds:
    return SizeBounds(0, 1 << 20)


async def requests(wire: Wire) -> list[bytes]:
    more, parser, found = frame_reader(wire), RequestParser(bounds), list[bytes]()
    while data := await more(parser.missing):
        found += [bytes(piece.frame) for piece in parser.feed(data) if isinstance(piece, Request)]
    assert parser.idle
    return found


async def test_an_activation_does_not_take_a_call_for_each_packet() -> None:
    frames = [request(Command.SET_TENSOR, bytes(8000)), request(Command.GRAPH_RECOMPUTE, bytes(4))]
    slow, quick = Wire(b"".join(frames), 1200), QuicWire(b"".join(frames), 1200)
    assert await requests(slow) == await requests(quick) == frames
    assert (slow.calls, quick.calls) == (8, 4)


@given(st.lists(st.integers(0, 3000), max_size=8), st.integers(1, 2000))
async def test_the_same_requests_come_out_however_they_come_in(sizes: list[int], packet: int) -> None:
    frames = [request(Command.GET_TENSOR, bytes(size)) for size in sizes]
    assert await requests(QuicWire(b"".join(frames), packet)) == frames


@given(st.lists(st.integers(0, 3000), max_size=8), st.integers(1, 2000))
async def test_the_same_replies_too(sizes: list[int], packet: int) -> None:
    wire = QuicWire(b"".join(reply(bytes(size)) for size in sizes), packet)
    more, parser, found = frame_reader(wire), ReplyParser(1 << 20), list[bytes]()
    while data := await more(parser.missing):
        for part in parser.feed(data):
            if part.first:
                found.append(b"")
            found[-1] += bytes(part.payload)
    assert parser.idle
    assert [len(payload) for payload in found] == sizes


async def test_a_stream_that_ends_within_a_frame_is_broken() -> None:
    with pytest.raises(ConnectionResetError):
        await requests(QuicWire(request(Command.GET_TENSOR, bytes(3000))[:-1], 1200))


async def test_much_is_passed_on_while_it_comes() -> None:
    wire = QuicWire(reply(bytes(100_000)), 1200)
    parser = ReplyParser(1 << 20)
    more = frame_reader(wire)
    list(parser.feed(await more(0)))
    assert len(await more(parser.missing)) == 1200
