"""Stand-ins: machines that take a set time for a graph instead of computing it, so that few cores can show many.

A stand-in is the real program with another processor. `stand_in.cpp`, a plugin of ggml, lets the processor's device
wait for as long as a graph would take; llama-server and rpc-server stay what they are. So every message, its size and
its order are llama.cpp's own, in whatever version is pinned, and firewall, tunnel and pushes are the product's.

Two figures describe a machine: the tokens of a prompt that it reads in a second with the whole model, and the tokens
that it answers with to one request. Results are numbers that mean nothing, so greedy output is one token over and over;
requests have to ignore an end.
"""

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from bench.common import ROOT

from mesh_llm.core.types.model import ModelFacts, Rates, Speed
from mesh_llm.engine.compiler import find_compiler
from mesh_llm.engine.confinement.policy import RpcPolicy
from mesh_llm.engine.process import Command
from mesh_llm.engine.sources.embedded.archive import SDIST_NAME, unpack
from mesh_llm.engine.sources.embedded.ggml import library_path
from mesh_llm.engine.sources.embedded.loading import LOAD
from mesh_llm.engine.sources.embedded.source import EmbeddedSource
from mesh_llm.engine.spec import EngineSpec, RpcWorkerSpec

_SOURCE = ROOT / "bench" / "split" / "stand_in.cpp"
_ARCHIVE = Path(sys.prefix) / "share" / "mesh-llm" / "source" / SDIST_NAME
_DEFINITIONS = ("GGML_BACKEND_DL", "GGML_BACKEND_SHARED", "GGML_BACKEND_BUILD")


@dataclass(frozen=True)
class Pace:
    """How fast one machine is.

    Attributes:
        prompt: tokens of a prompt that it reads in a second, in micro-batches of `micro_batch`, with the whole model.
        answer: tokens that it answers with in a second, to one request, with the whole model.
        slow_motion: times that all of this is slower, as are the links; results are given as without it. The programs
            of all machines share a few cores. In slow motion they have more time for what is not set.
    """

    prompt: float
    answer: float
    slow_motion: float = 1.0

    def speed(self, facts: ModelFacts) -> Speed:
        """The machine as `plan` would know it, as without slow motion."""
        blocks, rate = facts.active_bytes - facts.head_bytes, facts.active_bytes * self.answer
        prompt = int(blocks * self.prompt)
        return Speed(
            full=Rates(f16=int(rate), q8=int(rate), q4=int(rate)), batch=Rates(f16=prompt, q8=prompt, q4=prompt)
        )

    def settings(self, facts: ModelFacts, micro_batch: int, machine: Path) -> dict[str, str]:
        """The plugin's variables; `machine`: the file that all engines of one machine share.

        A token costs one read of the blocks and their products: 1 / answer = read + products. A prompt's token costs
        its share in one read for each micro-batch: 1 / prompt = read / micro_batch + products.

        Raises:
            ValueError: answers are faster than prompts.
        """
        token, prompt = self.slow_motion / self.answer, self.slow_motion / self.prompt
        read = (token - prompt) / (1.0 - 1.0 / micro_batch)
        products = token - read
        if read <= 0.0 or products <= 0.0:
            raise ValueError(f"no machine reads {self.prompt:g} tokens a second and answers with {self.answer:g}")
        size = facts.active_bytes - facts.head_bytes
        return {
            "STAND_IN_BYTES": f"{size / read:.1f}",
            "STAND_IN_PRODUCTS": f"{size * 8 / facts.weight_bits / products:.1f}",
            "STAND_IN_MACHINE": str(machine),
        }


class StandInSource(EmbeddedSource):
    """The embedded engine whose processor is a stand-in."""

    def __init__(self, cache: Path, library: Path, settings: dict[str, str]) -> None:
        """`cache`: of the home with the RPC plugin; `library`: the stand-in's; `settings`: of `Pace.settings`."""
        wheel = library_path()
        if wheel is None:
            raise SystemExit("the embedded engine is not installed: mesh-llm engine install")
        super().__init__(wheel, RpcPolicy(cache=cache))
        self._library = library
        self._settings = settings

    async def server(self, spec: EngineSpec) -> Command:
        """As of EngineSource."""
        return self.loading(await super().server(spec))

    async def rpc_worker(self, spec: RpcWorkerSpec) -> Command:
        """As of EngineSource."""
        return self.loading(await super().rpc_worker(spec))

    def loading(self, command: Command) -> Command:
        """A command of the embedded engine, which loads the plugin too."""
        return replace(command, argv=(*command.argv, LOAD, str(self._library)), env=command.env | self._settings)


def build(directory: Path) -> Path:
    """Compile the plugin into `directory`; some five seconds. Raises CalledProcessError, OSError, MeshError."""
    library = directory / "libggml-stand-in.so"
    if not library.exists():
        source = directory / "source"
        source.mkdir(parents=True, exist_ok=True)
        ggml = unpack(_ARCHIVE, source)
        command = (
            *find_compiler(),
            *("-std=c++17", "-O2", "-fPIC", "-w", "-shared"),
            *(f"-D{name}" for name in _DEFINITIONS),
            *(f"-I{folder}" for folder in (ggml / "include", ggml / "src")),
            *(str(_SOURCE), "-o", str(library)),
        )
        subprocess.run(command, check=True)
    return library
