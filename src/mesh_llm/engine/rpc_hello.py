"""The HELLO handshake of ggml's RPC: the version that a server speaks (llama.cpp: ggml/src/ggml-rpc/ggml-rpc.cpp)."""

import asyncio
import struct

from mesh_llm.runtime.tcp import open_address

_HELLO = 14
_CAPABILITIES = 24
_LONGEST_REPLY = 256

# Since protocol 4 the request carries capability bytes (all zero: no RDMA); before, it was empty.
_REQUESTS = (
    struct.pack("<BQ", _HELLO, _CAPABILITIES) + bytes(_CAPABILITIES),
    struct.pack("<BQ", _HELLO, 0),
)


async def rpc_version(endpoint: str, timeout: float = 5.0) -> str | None:
    """The protocol version of the RPC server at `unix:PATH` or `host:port`, as in `8.0.0`; None where none answers.

    The server serves one client at a time, so this waits, up to `timeout` seconds, while another is connected.
    """
    for request in _REQUESTS:
        try:
            async with asyncio.timeout(timeout):
                reader, writer = await open_address(endpoint)
                try:
                    writer.write(request)
                    (size,) = struct.unpack("<Q", await reader.readexactly(8))
                    if not 3 <= size <= _LONGEST_REPLY:
                        return None
                    reply = await reader.readexactly(size)
                finally:
                    writer.close()
        except asyncio.IncompleteReadError:
            continue
        except (OSError, TimeoutError):
            return None
        return f"{reply[0]}.{reply[1]}.{reply[2]}"
    return None
