"""A real llama.cpp with a small model, for what a first token costs: `python -m bench.proxy.real_engine MODEL`."""

import asyncio
import sys
import tempfile
from pathlib import Path

from mesh_llm.engine.sources.embedded.source import EmbeddedSource
from mesh_llm.engine.spec import EngineSpec
from mesh_llm.engine.supervisor import EngineReadyInfo, Supervisor


async def main() -> None:
    """Serve until standard input ends; say the address."""
    source = EmbeddedSource.find(Path(tempfile.gettempdir()))
    if source is None:
        raise SystemExit("there is no embedded engine for this system")
    with tempfile.TemporaryDirectory() as logs:
        supervisor = Supervisor(Path(logs))
        try:
            spec = EngineSpec(model=Path(sys.argv[1]), alias="tiny", context=2048, slots=4, threads=1)
            engine = await supervisor.launch(await source.server(spec), "bench")
            ready = await engine.ready()
            if not isinstance(ready, EngineReadyInfo):
                raise SystemExit(f"the engine did not start: {ready}")
            print(ready.address, flush=True)
            await asyncio.to_thread(sys.stdin.read)
        finally:
            await supervisor.close()


if __name__ == "__main__":
    asyncio.run(main())
