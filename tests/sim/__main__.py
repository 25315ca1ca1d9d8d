"""Repeats one scenario: `python -m tests.sim crash --nodes 100 --seed 7`. Ends with 1 when it shows a shortcoming."""

import argparse
import sys

import msgspec
from tests.sim.catalog import CASES, EVERYTHING, LARGE, SMALL, shortcomings

from mesh_llm.simulation import run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("scenario", choices=[*sorted(CASES), "everything"])
    parser.add_argument("--nodes", type=int, default=SMALL)
    parser.add_argument("--seed", type=int, default=1)
    values = parser.parse_args()
    case = CASES.get(values.scenario, EVERYTHING)
    report = run(case.at(values.nodes, values.seed))
    print(msgspec.json.format(msgspec.json.encode(report)).decode())
    wrong = shortcomings(report, case.large if values.nodes >= LARGE else case.small)
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
