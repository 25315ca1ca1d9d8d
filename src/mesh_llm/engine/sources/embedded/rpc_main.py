"""The embedded RPC server: `python -m mesh_llm.engine.sources.embedded.rpc_main SPEC PLUGIN`; SPEC is a RpcWorkerSpec.

Serves this machine's devices until it is killed. Where it listens, and what it may do from then on, is decided by the
library that is preloaded into it (`confinement/rpc_sockets.c`).
"""

import signal
import sys
from pathlib import Path

from mesh_llm.engine.sources.base import DeviceKind
from mesh_llm.engine.sources.embedded.ggml import Device, Ggml, GgmlError
from mesh_llm.engine.spec import RpcWorkerSpec
from mesh_llm.runtime.process import usable_cpus


def main(arguments: list[str]) -> int:
    """Serve; returns only when it could not."""
    spec = RpcWorkerSpec.from_json(arguments[0])
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        ggml = Ggml()
        registry = ggml.load_plugin(Path(arguments[1]))
        ggml.serve_rpc(registry, spec.endpoint, choose_devices(ggml, spec), spec.threads or usable_cpus())
    except GgmlError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)  # noqa: T201 - goes to the child's log
        return 1
    print(f"error: could not listen on {spec.socket or spec.endpoint}", file=sys.stderr, flush=True)  # noqa: T201
    return 1


def choose_devices(ggml: Ggml, spec: RpcWorkerSpec) -> list[Device]:
    """The named devices; or all that hold models; or the CPU. Raises GgmlError for a name that is not there."""
    known = ggml.devices()
    if spec.devices:
        by_id = {info.id: device for device, info in known}
        missing = [name for name in spec.devices if name not in by_id]
        if missing:
            raise GgmlError(f"there is no device {missing[0]}; there are {', '.join(by_id)}")
        return [by_id[name] for name in spec.devices]
    accelerators = [device for device, info in known if info.holds_models]
    return accelerators or [device for device, info in known if info.kind is DeviceKind.CPU][:1]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
