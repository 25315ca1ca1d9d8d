"""A node that lies in the receipts of what it answers, as a file says at each moment.

    liar = await start_node("liar", shell=lying_host.shell(file), env=wiretap.ENV)
    lying_host.tell(file, workers=[other])

This file is also the program that such a node runs. It is the node's own code, and signs with the node's own key, but
for the lies.
"""

import base64
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec


def shell(file: Path) -> str:
    """The shell command of a node that lies as a file says."""
    return f'python=$1; shift 3; exec "$python" -m tests.support.lying_host {file} "$@"'


def tell(
    file: Path,
    *,
    replay: tuple[bytes, bytes] | None = None,
    workers: Sequence[str] = (),
    cut: int = 0,
    ends: Mapping[str, Any] | None = None,
) -> None:
    """Say how the node lies from now on; with nothing given, not at all.

    `replay`: the statement and signature that it gives in place of its own. `workers`: whom it names as workers.
    `cut`: how many bytes it leaves of what it signed. `ends`: what it signs at the end, in place of what it signed
    first.
    """
    given = [base64.b64encode(one).decode() for one in replay or ()]
    part = file.with_suffix(".part")
    part.write_text(json.dumps({"replay": given, "workers": list(workers), "cut": cut, "ends": dict(ends or {})}))
    part.replace(file)


def _lie(file: Path) -> None:
    from mesh_llm.api.receipts import Part, Receipts
    from mesh_llm.core.types.ids import NodeId
    from mesh_llm.daemon.receipts import ReceiptFacts

    honest_part, honest_served, honest_state = Receipts.part, ReceiptFacts.served, Receipts._state_part

    def told() -> dict[str, Any]:
        return json.loads(file.read_text())

    async def part(self: Any, peer: Any, query: str) -> Part:
        made, lies = await honest_part(self, peer, query), told()
        if lies["replay"]:
            made = Part(*map(base64.b64decode, lies["replay"]))
        return Part(made.statement[: lies["cut"]], made.signature) if lies["cut"] else made

    def served(self: Any, model: Any, term: int) -> Any:
        found, workers = honest_served(self, model, term), told()["workers"]
        return msgspec.structs.replace(found, workers=tuple(map(NodeId, workers))) if workers else found

    def state_part(self: Any, recording: Any, record: Any, asker: Any, notary: Any) -> Any:
        made = honest_state(self, recording, record, asker, notary)
        return msgspec.structs.replace(made, **told()["ends"]) if recording.ended else made

    Receipts.part = part
    Receipts._state_part = state_part
    ReceiptFacts.served = served


if __name__ == "__main__":
    from mesh_llm.cli.main import main

    _lie(Path(sys.argv.pop(1)))
    main()
