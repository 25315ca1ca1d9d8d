"""Sets every option in the parameters of the real engine, in a process of its own, and prints what it reads back.

`python -m tests.unit.engine.argument_places`. The wheel stays out of the tests' process, which replaces it in places.
"""

import json
import sys
from typing import Any

from mesh_llm.engine.arguments import ALLOWED, Argument, put
from mesh_llm.engine.sources.embedded.ggml import Ggml, wheel
from mesh_llm.engine.sources.embedded.server_main import common_params
from mesh_llm.engine.spec import EngineSpec


def example(argument: Argument) -> str:
    if argument.choices:
        return next(iter(argument.choices))
    if argument.objects:
        return '{"enable_thinking": false}'
    return f"{argument.most:.0f}" if argument.takes_value else ""


def member(name: str) -> object:
    kind, _, value = name.partition(".")
    return getattr(getattr(wheel(), kind), value)


def differences(argument: Argument) -> list[Any]:
    """[flag, what was set, what is read back] where they differ."""
    params = wheel().CommonParams()
    put(params, argument, example(argument), member)
    *parents, name = argument.place.split(".")
    holder = params
    for parent in parents:
        holder = getattr(holder, parent)
    wanted = argument.read(example(argument)) if argument.takes_value else argument.value
    wanted = member(wanted) if isinstance(wanted, str) else wanted
    found = getattr(holder, name)
    same = abs(found - wanted) <= 1e-6 * abs(wanted) if isinstance(wanted, float) else found == wanted
    marked = not argument.bit or params.sampling.user_sampling_config & argument.bit
    return [] if same and marked else [[argument.flag, str(wanted), str(found)]]


def settings(spec: EngineSpec) -> dict[str, Any]:
    params = common_params(spec, Ggml())
    return {
        "temp": round(params.sampling.temp, 3),
        "top_k": params.sampling.top_k,
        "seed": params.sampling.seed,
        "n_predict": params.n_predict,
        "n_keep": params.n_keep,
        "bits": params.sampling.user_sampling_config,
        "template": params.chat_template,
        "budget": params.sampling.reasoning_budget_tokens,
        "speculations": len(params.speculative.types),
    }


if __name__ == "__main__":
    spec = EngineSpec.from_json(sys.argv[1])
    result = {
        "differences": [one for argument in ALLOWED.values() for one in differences(argument)],
        "settings": settings(spec),
    }
    print("\n" + json.dumps(result))
