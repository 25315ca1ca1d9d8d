"""Runs the cases of one client, in that client's own environment: prints a line of JSON for each.

A case is a function for one documented feature. It fails by an exception, whose text is the reason.

    CONFORM_URL        address of the server, without /v1
    CONFORM_MODEL      a model that writes words without end
    CONFORM_TOOL_URL   address for the next one
    CONFORM_TOOL_MODEL a model that calls the tool `weather`
    CONFORM_KEY        what to show as API key
"""

import json
import os
from collections.abc import Callable

URL = os.environ.get("CONFORM_URL", "http://localhost:9337")
MODEL = os.environ.get("CONFORM_MODEL", "small")
TOOL_URL = os.environ.get("CONFORM_TOOL_URL", URL)
TOOL_MODEL = os.environ.get("CONFORM_TOOL_MODEL", "caller")
KEY = os.environ.get("CONFORM_KEY", "none")

Run = Callable[[], None]
_cases: list[tuple[str, Run]] = []


def case(what: str) -> Callable[[Run], Run]:
    """Name a case by the feature that it tries."""

    def add(run: Run) -> Run:
        _cases.append((what, run))
        return run

    return add


def run_all() -> None:
    """Run all cases, in order."""
    for what, run in _cases:
        reason = ""
        try:
            run()
        except Exception as error:  # noqa: BLE001 - whatever a library raises is the reason
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        print(json.dumps({"case": what, "passed": not reason, "reason": reason}), flush=True)
