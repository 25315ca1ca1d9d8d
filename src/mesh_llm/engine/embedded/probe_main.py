"""Looks at the embedded engine, in a process that may crash: `python -m mesh_llm.engine.embedded.probe_main [PLUGIN]`.

Prints one line of JSON, an EmbeddedProbe. With a plugin it is loaded, serves on loopback, and has to answer a HELLO.
"""

import asyncio
import os
import sys
import threading
from pathlib import Path

import msgspec

from mesh_llm.engine.embedded.ggml import Ggml, GgmlError, wheel
from mesh_llm.engine.embedded.rpc_main import choose_devices
from mesh_llm.engine.ports import ReservedPort
from mesh_llm.engine.rpc_hello import rpc_version
from mesh_llm.engine.source import DeviceInfo
from mesh_llm.engine.spec import LOOPBACK, RpcWorkerSpec

_HELLO_SECONDS = 10.0


class EmbeddedProbe(msgspec.Struct, frozen=True, kw_only=True):
    """What the probe found. `rpc_version` is empty without a plugin, `rpc_error` says why one does not work."""

    version: str = ""
    build: str = ""
    devices: tuple[DeviceInfo, ...] = ()
    rpc_version: str = ""
    rpc_error: str = ""


async def _hello(endpoint: str, server: threading.Thread) -> str | None:
    # A server tells nobody when it begins to listen; the thread's end means that it could not.
    async with asyncio.timeout(_HELLO_SECONDS):
        while server.is_alive():
            if version := await rpc_version(endpoint):
                return version
            await asyncio.to_thread(server.join, 0.01)
    return None


def _try_plugin(ggml: Ggml, plugin: Path) -> tuple[str, str]:
    try:
        registry = ggml.load_plugin(plugin)
        with ReservedPort() as port:
            endpoint = f"{LOOPBACK}:{port.number}"
            devices = choose_devices(ggml, RpcWorkerSpec())
            server = threading.Thread(target=ggml.serve_rpc, args=(registry, endpoint, devices, 1), daemon=True)
            server.start()
            version = asyncio.run(_hello(endpoint, server))
    except (GgmlError, TimeoutError) as error:
        return "", str(error) or "its server does not answer"
    return (version, "") if version else ("", "its server ended at once")


def main(arguments: list[str]) -> int:
    """Probe, print, and leave without unloading: the serving thread never ends."""
    # ggml prints on stdout; the answer has that for itself.
    answer = os.dup(1)
    os.dup2(2, 1)
    xllamacpp = wheel()
    ggml = Ggml()
    devices = tuple(info for _, info in ggml.devices())
    version, error = _try_plugin(ggml, Path(arguments[0])) if arguments else ("", "")
    build = xllamacpp.BUILD_INFO
    probe = EmbeddedProbe(
        version=xllamacpp.__version__,
        build=f"ggml {ggml.version}, {build['compiler']}, {build['build_target']}",
        devices=devices,
        rpc_version=version,
        rpc_error=error,
    )
    os.write(answer, msgspec.json.encode(probe) + b"\n")
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
