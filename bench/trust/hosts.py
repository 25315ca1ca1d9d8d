"""Simulated hosts that give real answers: how soon liars are found, and how many honest hosts are accused."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from bench.trust.pools import Pool

from mesh_llm.core.trust.canaries import HONEST, SUSPECT, Suspicion, judged
from mesh_llm.core.trust.matched_filter import judged_between, noise_beside

Gains = npt.NDArray[np.float64]
"""Evidence of each canary that is compared: a row for each, a column for each test."""

WITHIN = 20


@dataclass(frozen=True)
class Found:
    """What became of simulated hosts.

    Attributes:
        within: part that is suspect after WITHIN canaries.
        mean: canaries until then, of those that became suspect.
        slowest: canaries after which 99 % are suspect; None: fewer are, in all canaries.
        accused: hosts that are suspect in the end.
        hosts: all of them.
        tests: tests that ended well, of all hosts.
    """

    within: float
    mean: float
    slowest: int | None
    accused: int
    hosts: int
    tests: int


def compared(
    reference: Pool, answers: Pool, noise: float, coarser: Pool | None = None, cache: str = ""
) -> tuple[Gains, list[float], list[float]]:
    """Evidence, difference and leaning of each canary; a silent one has no difference.

    With `coarser`, a column for each test, and one for that of distances without the coarser copy. `cache`: of both
    copies.
    """
    gains: list[list[float]] = []
    differences: list[float] = []
    leanings: list[float] = []
    for number in sorted(reference.keys() & answers.keys()):
        if coarser is not None and number not in coarser:
            continue
        after = judged(Suspicion(), reference[number], answers[number], noise)
        differences += after.differences
        row = [after.evidence]
        if coarser is not None:
            limit = noise_beside(reference[number], coarser[number], answers[number], noise, cache)
            row = [judged(Suspicion(), reference[number], answers[number], limit).evidence]
            between = judged_between(Suspicion(), reference[number], coarser[number], answers[number])
            leanings += between.differences
            row += [between.evidence, after.evidence]
        gains.append(row)
    return np.array(gains), differences, leanings


def simulate(
    gains: Gains, hosts: int, canaries: int, seed: int, *, lies: float = 1.0, truth: Gains | None = None
) -> Found:
    """Let hosts be asked, each for other questions in another order. One that any test finds suspect is found.

    Args:
        gains: evidence of canaries that such a host is drawn from.
        hosts: how many.
        canaries: of each.
        seed: of what is drawn.
        lies: part of the canaries that are drawn from `gains`; the others from `truth`.
        truth: evidence of honest answers, with the same tests.
    """
    rng = np.random.default_rng(seed)
    evidence = np.zeros((hosts, gains.shape[1]))
    found_at = np.full(hosts, np.inf)
    tests = 0
    for canary in range(1, canaries + 1):
        drawn = gains[rng.integers(len(gains), size=hosts)]
        if truth is not None and lies < 1.0:
            lied = rng.random(hosts) < lies
            drawn = np.where(lied[:, None], drawn, truth[rng.integers(len(truth), size=hosts)])
        evidence += drawn
        found_at[(evidence >= SUSPECT).any(axis=1) & np.isinf(found_at)] = canary
        if np.isfinite(found_at).all():
            break
        well = (evidence <= HONEST) & np.isinf(found_at)[:, None]
        tests += int(well.sum())
        # A test that ends well is followed by the next one.
        evidence[well] = 0.0
    suspect = np.isfinite(found_at)
    in_order = np.sort(found_at)
    slowest = in_order[int(np.ceil(0.99 * hosts)) - 1]
    return Found(
        within=float((found_at <= WITHIN).mean()),
        mean=float(found_at[suspect].mean()) if suspect.any() else float("nan"),
        slowest=int(slowest) if np.isfinite(slowest) else None,
        accused=int(suspect.sum()),
        hosts=hosts,
        tests=tests,
    )


def ratio(gains: Gains) -> float:
    """The largest mean of a test's likelihood ratios: at 1 or less for honest hosts, the limits' error rates hold."""
    return float(np.exp(gains).mean(axis=0).max())
