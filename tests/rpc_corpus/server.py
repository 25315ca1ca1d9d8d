"""A real rpc-server of one thread, unconfined: `python -m tests.rpc_corpus.server PLUGIN PORT`."""

import sys
from pathlib import Path

from mesh_llm.engine.sources.embedded.ggml import Ggml


def main(arguments: list[str]) -> None:
    """Serve the processor on loopback until it is ended."""
    ggml = Ggml()
    ggml.serve_rpc(ggml.load_plugin(Path(arguments[0])), f"127.0.0.1:{arguments[1]}", [ggml.devices()[0][0]], threads=1)


if __name__ == "__main__":
    main(sys.argv[1:])
