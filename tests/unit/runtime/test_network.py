"""A connection that wakes its reader only for a whole answer."""

import asyncio
import os
import socket
import sys
from pathlib import Path

import pytest

from mesh_llm.runtime.network import TcpStream, connect_tcp, is_other_users


async def pair() -> tuple[TcpStream, TcpStream, asyncio.Server]:
    accepted: asyncio.Future[TcpStream] = asyncio.get_running_loop().create_future()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.set_result(TcpStream(reader, writer))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    near = await connect_tcp("127.0.0.1", server.sockets[0].getsockname()[1], 5.0)
    return near, await accepted, server


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it is a hint that may not be taken")
async def test_what_comes_in_pieces_is_read_whole() -> None:
    near, far, server = await pair()
    async with server, asyncio.timeout(30):
        near.wake_at(4104)
        async with asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(near.read(1 << 20))
            await far.write(bytes(8))
            await far.write(b"x" * 4096)
        assert len(reading.result()) == 4104
        near.abort()
        far.abort()


async def test_an_end_wakes_all_the_same() -> None:
    near, far, server = await pair()
    async with server, asyncio.timeout(30):
        near.wake_at(4104)
        await far.write(b"short")
        await far.finish()
        assert await near.read(1 << 20) == b"short"
        assert await near.read(1 << 20) == b""
        near.abort()
        far.abort()


async def test_it_may_be_taken_back_while_something_waits() -> None:
    near, far, server = await pair()
    async with server, asyncio.timeout(30):
        near.wake_at(4104)
        async with asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(near.read(1 << 20))
            await far.write(b"short")
            near.wake_at(1)
        assert reading.result() == b"short"
        near.abort()
        far.abort()


def test_another_users_connection_is_told_by_the_systems_table(tmp_path: Path) -> None:
    table = tmp_path / "tcp"
    line = "   0: {address} 0100007F:1F90 01 00000000:00000000 00:00000000 00000000 {uid:>5} 0 {inode} 1 0 20 4 30"
    here = f"{int.from_bytes(socket.inet_aton('127.0.0.1'), sys.byteorder):08X}"
    sockets = ((1000, os.getuid(), 77), (1001, 4242, 78), (1003, os.getuid(), 0))
    rows = [line.format(address=f"{here}:{port:04X}", uid=uid, inode=inode) for port, uid, inode in sockets]
    table.write_text("\n".join(["  sl  local_address rem_address", *rows]))
    assert not is_other_users(("127.0.0.1", 1000), table)
    assert is_other_users(("127.0.0.1", 1001), table)
    # One that is not there, and one that was closed and is nobody's any more.
    assert is_other_users(("127.0.0.1", 1002), table)
    assert is_other_users(("127.0.0.1", 1003), table)
    # Where the system does not say, nobody is turned away.
    assert not is_other_users(("127.0.0.1", 1001), tmp_path / "none")


@pytest.mark.skipif(sys.platform != "linux", reason="the table is Linux's")
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_ones_own_connection_is_not_anothers(host: str) -> None:
    seen: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.set_result(is_other_users(writer.get_extra_info("peername")))
        writer.close()

    server = await asyncio.start_server(accept, host, 0)
    stream = await connect_tcp(host, server.sockets[0].getsockname()[1], 5.0)
    assert not await seen
    assert is_other_users((host, 1))
    stream.abort()
    server.close()
    await server.wait_closed()
