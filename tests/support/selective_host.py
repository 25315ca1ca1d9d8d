"""A node that answers with the announced model where probabilities are asked, and else with another one.

    liar = await start_node("liar", models=[story, other], shell=selective_host.SHELL, env=wiretap.ENV)
    await liar.cli("load", selective_host.OTHER)

This file is also the program that such a node runs. It is the node's own code with two real engines; but for one
question, where a request leaves for an engine: does it ask for probabilities? The other model is one that the node
serves by the name `other`.
"""

import os
from typing import Any

SHELL = 'python=$1; shift 3; exec "$python" -m tests.support.selective_host "$@"'
OTHER = "other"
ALWAYS = {"MESH_LLM_TEST_LIES": "always"}
"""Environment of one that answers with the other model whatever is asked."""

_ANSWERED = ("/v1/chat/completions", "/v1/completions", "/completion")


def _lie() -> None:
    from mesh_llm.api.proxy import wants_logprobs
    from mesh_llm.api.upstream import Upstream
    from mesh_llm.core.types.ids import ModelName

    honest, always = Upstream._send_to_engine, ALWAYS.items() <= os.environ.items()

    async def send(self: Any, place: Any, target: Any, request: Any, model: Any) -> Any:
        if request.target.partition("?")[0] in _ANSWERED and (always or not wants_logprobs(request.body)):
            other = self._watchdog._routes.current.models.get(ModelName(OTHER))
            targets = other.targets if other is not None else ()
            address = next((one.address for one in targets if one.local and one.address), place.address)
            place = place._replace(address=address, slot=None)
        return await honest(self, place, target, request, model)

    Upstream._send_to_engine = send


if __name__ == "__main__":
    from mesh_llm.cli.main import main

    _lie()
    main()
