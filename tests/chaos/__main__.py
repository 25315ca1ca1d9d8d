"""`python -m tests.chaos [--minutes 30] [--seed 1] [--groups 2] [--write PAGE]`; status 1: something was wrong."""

import argparse
import asyncio
import datetime
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from tests.chaos.faults import FAULTS
from tests.chaos.mesh import own_mounts
from tests.chaos.report import table, write
from tests.chaos.run import Plan, run

_SHORT, _SHORT_FAULTS = 60.0, 4


def main() -> int:
    """Run by command."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--short", action="store_true", help="a few faults only, as in `make test`")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--groups", type=int, default=2, help="engines over the split model; --short has one")
    parser.add_argument("--texts", type=int, default=2, help="for each model and API; 1 shortens the beginning")
    parser.add_argument("--faults", default="", help="only faults whose names hold one of these words, comma-separated")
    parser.add_argument("--write", type=Path, help="put the table into this file, between its markers")
    parser.add_argument(
        "--keep", type=Path, help="keep logs here, and what came of requests that were refused, or late"
    )
    chosen = parser.parse_args()
    words = [word for word in chosen.faults.split(",") if word]
    groups = 1 if chosen.short else chosen.groups
    faults = [fault for fault in FAULTS if not words or any(word in fault.name for word in words)]
    plan = Plan(
        seconds=chosen.minutes * 60,
        seed=chosen.seed,
        clients=chosen.clients,
        texts=chosen.texts,
        faults=[fault for fault in faults if groups > 1 or not fault.groups],
        keep=chosen.keep,
        groups=groups,
    )
    if chosen.short:
        plan = replace(
            plan,
            seconds=_SHORT,
            texts=1,
            tokens=160,
            hold=(1.0, 2.0),
            calm=(0.2, 0.4),
            most=_SHORT_FAULTS,
        )
    own_mounts()
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:7.1f} s  {text}", flush=True)

    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch:
        outcome = asyncio.run(run(plan, Path(scratch), say))
    text = table(outcome, datetime.datetime.now(datetime.UTC).date().isoformat())
    print(text)
    for problem in outcome.problems:
        print(f"\n{problem}", file=sys.stderr)
    if chosen.write is not None:
        write(chosen.write, text)
    return 1 if outcome.problems else 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)
