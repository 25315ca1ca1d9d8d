"""The sums of core.placement.offload against what the pinned engine allocates on a device and in main memory.

The device is Mesa's, which computes on the processor; for the engine it is a GPU with memory of its own. The models are
headers with holes for weights, as in test_models_memory. Each is loaded by the spec that a launch makes of a plan.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.integration.accelerator_fixtures import llvmpipe
from tests.integration.test_models_memory import Shape, llama, mixture, windowed
from tests.support.engine_log import loading_log

from mesh_llm.core.placement.fit import PROCESS_BYTES
from mesh_llm.core.placement.offload import Pools, offload_memory, plan_launch
from mesh_llm.core.types.model import LaunchOptions, LaunchPlan, ModelFacts
from mesh_llm.engine.spec import EngineSpec
from mesh_llm.models.gguf.facts import read_facts
from mesh_llm.models.gguf.header import read_header

__all__ = ["llvmpipe"]

MIB = 1 << 20

# Loads a model as the embedded server does, and serves nobody.
LOADER = """
import sys
from pathlib import Path
from mesh_llm.engine.sources.embedded.ggml import Ggml, wheel
from mesh_llm.engine.sources.embedded.server_main import common_params
from mesh_llm.engine.spec import EngineSpec
ggml = Ggml()
ggml.load_accelerators([Path(sys.argv[2])])
params = common_params(EngineSpec.from_json(sys.argv[1]), ggml)
params.verbosity, params.warmup = 4, False
server = wheel().Server(params)
sys.stdin.read()
"""


class Allocated(NamedTuple):
    """Bytes of model, caches and computation, on the device and in main memory."""

    device: tuple[float, float, float]
    host: tuple[float, float, float]


def load(spec: EngineSpec, plugin: Path) -> Allocated:
    log = loading_log(LOADER, [spec.to_json(), str(plugin)], 300)

    def sizes(memory: str) -> tuple[float, float, float]:
        found = [
            MIB * sum(float(size) for size in re.findall(rf"{memory} {what} buffer size = +([\d.]+) MiB", log))
            for what in ("model", "(?:KV|RS)", "compute")
        ]
        return (found[0], found[1], found[2])

    return Allocated(sizes("Vulkan0"), sizes("(?:CPU|CPU_Mapped|Vulkan_Host)"))


def spec_of(plan: LaunchPlan, path: Path) -> EngineSpec:
    offload = plan.offload
    assert offload is not None
    return EngineSpec(
        model=path,
        alias="model",
        context=plan.context,
        slots=plan.slots,
        cache_type=plan.cache_type,
        gpu_layers=offload.gpu_layers + 1,
        cpu_moe=offload.cpu_moe,
    )


@pytest.mark.parametrize(
    ("make", "shape", "options"),
    [
        (llama, Shape(layers=6), LaunchOptions(context=4096, slots=1, gpu_layers=3)),
        (llama, Shape(layers=6), LaunchOptions(context=4096, slots=2, gpu_layers=6, cache_type="q8_0")),
        (llama, Shape(layers=6, vocabulary=32_000), LaunchOptions(context=8192, slots=1, gpu_layers=1)),
        (mixture, Shape(layers=4, forward=256), LaunchOptions(context=4096, slots=1, cpu_moe=2)),
        (mixture, Shape(layers=4, forward=1024), LaunchOptions(context=4096, slots=1, gpu_layers=2, cpu_moe=4)),
        (windowed, Shape(layers=8), LaunchOptions(context=8192, slots=1, gpu_layers=3)),
    ],
)
def test_what_is_counted_is_what_is_allocated_in_each_memory(
    make: Callable[[Path, Shape], Path], shape: Shape, options: LaunchOptions, tmp_path: Path, llvmpipe: Path
) -> None:
    path = make(tmp_path / "model.gguf", shape)
    facts = read_facts([read_header(path)], "model")
    plan = plan_launch(facts, Pools(device=10**10, host=10**10), options)
    assert isinstance(plan, LaunchPlan), plan
    device, host = offload_memory(facts, plan)
    allocated = load(spec_of(plan, path), llvmpipe)
    print(f"{make.__name__} {shape} {options}: counted {device} {host}, allocated {allocated}")
    assert abs(device.weights - allocated.device[0]) <= 0.02 * MIB
    assert abs(device.cache - allocated.device[1]) <= 0.01 * MIB
    assert abs(host.cache - allocated.host[1]) <= 0.01 * MIB
    assert allocated.device[2] <= device.compute + PROCESS_BYTES / 8
    assert device.compute <= allocated.device[2] * 1.6 + 16 * MIB
    # What is mapped reaches from the first tensor to the last one, also where those between are on the device.
    assert host.weights <= allocated.host[0] + 0.01 * MIB <= facts.size_bytes + 0.02 * MIB
    assert allocated.host[2] <= host.compute + PROCESS_BYTES / 8


def test_a_plan_for_little_memory_is_loaded_within_it(tmp_path: Path, llvmpipe: Path) -> None:
    """All that the planner chooses, from experts in main memory to half of the layers, is what the engine takes."""
    path = mixture(tmp_path / "model.gguf", Shape(layers=6, forward=1024))
    facts = read_facts([read_header(path)], "model")
    whole = sum_of(facts)
    seen: set[tuple[int, int]] = set()
    for part in (0.8, 0.55, 0.45):
        plan = plan_launch(facts, Pools(device=int(part * whole), host=10**10), LaunchOptions(context=4096, slots=1))
        assert isinstance(plan, LaunchPlan)
        assert plan.offload is not None
        seen.add((plan.offload.gpu_layers, plan.offload.cpu_moe))
        allocated = load(spec_of(plan, path), llvmpipe)
        assert sum(allocated.device) <= part * whole
    assert len(seen) == 3


def sum_of(facts: ModelFacts) -> int:
    plan = plan_launch(facts, Pools(device=10**10, host=10**10), LaunchOptions(context=4096, slots=1, gpu_layers=99))
    assert isinstance(plan, LaunchPlan)
    return plan.memory_bytes
