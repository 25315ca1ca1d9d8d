"""Looks at the embedded engine, in a process that may crash: `python -m mesh_llm.engine.sources.embedded.probe_main`.

Prints one line of JSON, an EmbeddedProbe.
"""

import os

import msgspec

from mesh_llm.engine.sources.base import DeviceInfo
from mesh_llm.engine.sources.embedded.ggml import Ggml, wheel


class EmbeddedProbe(msgspec.Struct, frozen=True, kw_only=True):
    """What the probe found."""

    version: str = ""
    build: str = ""
    devices: tuple[DeviceInfo, ...] = ()


def main() -> int:
    """Probe, print, and leave without unloading."""
    # ggml prints on stdout; the answer has that for itself.
    answer = os.dup(1)
    os.dup2(2, 1)
    xllamacpp = wheel()
    ggml = Ggml()
    build = xllamacpp.BUILD_INFO
    probe = EmbeddedProbe(
        version=xllamacpp.__version__,
        build=f"ggml {ggml.version}, {build['compiler']}, {build['build_target']}",
        devices=tuple(info for _, info in ggml.devices()),
    )
    os.write(answer, msgspec.json.encode(probe) + b"\n")
    os._exit(0)


if __name__ == "__main__":
    main()
