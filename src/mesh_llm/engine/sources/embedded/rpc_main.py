"""The embedded RPC server: `python -m mesh_llm.engine.sources.embedded.rpc_main SPEC PLUGIN [--load PLUGIN]`.

SPEC is a RpcWorkerSpec. The first plugin is RPC's, the other an accelerator's. Serves this machine's devices until it
is killed. The preloaded library (`confinement/rpc_sockets.c`) decides where it listens and what it may do.
"""

import signal
import sys
from pathlib import Path

from mesh_llm.engine.sources.embedded.ggml import Ggml, GgmlError
from mesh_llm.engine.sources.embedded.loading import parse_load
from mesh_llm.engine.spec import RpcWorkerSpec
from mesh_llm.runtime.process import usable_cpus


def main(arguments: list[str]) -> int:
    """Serve. Returns only if that failed."""
    (text, plugin), accelerators = parse_load(arguments)
    spec = RpcWorkerSpec.from_json(text)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        ggml = Ggml()
        ggml.load_accelerators(accelerators)
        registry = ggml.load_plugin(Path(plugin))
        ggml.serve_rpc(registry, spec.endpoint, ggml.choose_devices(spec), spec.threads or usable_cpus())
    except GgmlError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)  # noqa: T201 - goes to the child's log
        return 1
    print(f"error: could not listen on {spec.socket or spec.endpoint}", file=sys.stderr, flush=True)  # noqa: T201
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
