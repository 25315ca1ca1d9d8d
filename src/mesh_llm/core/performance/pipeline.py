"""How many tokens several engines over one split model give together, and how many engines to start.

Each machine computes for one engine at a time. The tokens of an engine's slots pass all machines, one after the other,
as a batch. While they travel, or are on another machine, a machine is free for another engine. More engines keep more
machines busy, but each has fewer slots, so that a machine reads its weights for fewer tokens at once.
"""

from collections.abc import Mapping

import msgspec

from mesh_llm.core.performance.prediction import (
    ENGINE_SECONDS,
    FLOAT_BYTES,
    TUNNEL_SECONDS,
    WORKER_SECONDS,
    Links,
    read_bytes,
    ring_links,
)
from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.model import ModelFacts, Speed, SplitLayout

MOST_GROUPS = 4
_LEAST_GAIN = 1.25
_NEARLY = 0.9
_PASS_TOKENS = 3.0
"""What reading the weights takes on a processor of which nothing was measured, in tokens that are computed meanwhile.
Measured: 1.7 and 4.7 (160 MB model, two machines)."""


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """What a batch of tokens takes somewhere, in seconds: `per_pass`, however many there are, and `per_token`."""

    per_pass: float
    per_token: float

    def seconds(self, tokens: float) -> float:
        """For a batch of `tokens`."""
        return self.per_pass + self.per_token * tokens


class Ring(msgspec.Struct, frozen=True, kw_only=True):
    """A split model as its tokens see it: `stages`, the machines, and `way`, all links together."""

    stages: tuple[Stage, ...]
    way: Stage = Stage(per_pass=0.0, per_token=0.0)

    def tokens_per_second(self, slots: int, groups: int) -> float:
        """Of all answers together, with a request in each of `slots` slots, which are divided over `groups` engines.

        Mean value analysis of a closed queueing network (Reiser and Lavenberg, 1980), in which an engine's batch waits
        for a machine that is busy with another's: for those in the queue, and on average for half of what the one has
        left that is being computed, since batches take the same time. Engines arrive in no order. Measured: 2 machines,
        8 slots, 0 ms, × one engine: 1.20 to 1.37 (this says 1.32); 3 machines 10 ms apart, 2 engines: 1.24 (1.30);
        stand-ins, 16 slots, 1 ms: 2 machines 1.53 (1.45), 4 machines 2.34 to 2.53 (2.10); 8 slots, 3 machines 10 ms
        apart, 4 engines: 1.81 with prompts, which are read at the same time too (1.47).
        """
        batch = slots / groups
        times = [stage.seconds(batch) for stage in self.stages]
        present = [0.0] * len(times)
        busy = [0.0] * len(times)
        rate = 0.0
        for engines in range(1, groups + 1):
            spent = [time * (1.0 + there - used / 2.0) for time, there, used in zip(times, present, busy, strict=True)]
            rate = engines / (sum(spent) + self.way.seconds(batch))
            # No machine computes more than all the time.
            rate = min(rate, 1.0 / max(times))
            present = [rate * one for one in spent]
            busy = [rate * time for time in times]
        return rate * batch

    def gain(self, slots: int, groups: int) -> float:
        """How many times as many tokens as one engine gives."""
        return self.tokens_per_second(slots, groups) / self.tokens_per_second(slots, 1)


def even_ring(machines: int) -> Ring:
    """Of equal processors of which nothing was measured, without delays, in tokens' time instead of seconds."""
    return Ring(stages=(Stage(per_pass=_PASS_TOKENS / machines, per_token=1.0 / machines),) * machines)


def measured_ring(
    facts: ModelFacts,
    layout: SplitLayout,
    speeds: Mapping[NodeId, Speed],
    links: Links,
    *,
    element_bytes: float = FLOAT_BYTES,
    lag: float = 1.0,
) -> Ring | None:
    """The ring of a layout; None where a machine or a link is not known.

    Args:
        facts: the model.
        layout: who computes what.
        speeds: of the machines.
        links: between them.
        element_bytes: of an element of an activation as it travels.
        lag: how many times as long machines were observed to take for a token.
    """
    found = ring_links(layout, links)
    if found is None or not facts.active_bytes or not facts.layers:
        return None
    stages: list[Stage] = []
    for share in layout.shares:
        hosted, speed = share is layout.host, speeds.get(share.node)
        if not share.layers and not hosted:
            continue
        if speed is None or not speed.known:
            return None
        part = read_bytes(facts, share, output=hosted)
        one = speed.seconds(facts.weight_bits, facts.size_bytes, part, share.layers)
        more = speed.prompt_seconds(facts.weight_bits, facts.size_bytes, part, 1)
        if more is None:
            return None
        beside = ENGINE_SECONDS + TUNNEL_SECONDS if hosted else WORKER_SECONDS
        # Where a token of many takes longer than one alone, that was measured at another time: nothing is read.
        more = min(more, one)
        stages.append(Stage(per_pass=(one - more + beside) * lag, per_token=more * lag))
    token = facts.embedding_length * element_bytes
    carried = sum(link.seconds(token) - link.one_way_seconds for link in found)
    return Ring(
        stages=tuple(stages), way=Stage(per_pass=sum(link.one_way_seconds for link in found), per_token=carried)
    )


class Groups(msgspec.Struct, frozen=True, kw_only=True):
    """How many engines, and why that many, as a clause for people."""

    count: int
    why: str


def choose_groups(ring: Ring, slots: int, most: int | None) -> Groups:
    """How many engines to start over a split model: the fewest that give nearly the most.

    Args:
        ring: the machines and their links.
        slots: of all engines together; each gets the same number.
        most: engines at most, as a user says; None: only where they give clearly more, with two slots each.
    """
    # Also more than machines: tokens on long links keep no machine busy.
    unasked = min(MOST_GROUPS, slots // 2)
    limit = unasked if most is None else min(MOST_GROUPS, slots, most)
    possible = [groups for groups in range(1, limit + 1) if slots % groups == 0] or [1]
    if most is not None:
        short = f": {slots} slots cannot be divided by {most}" if possible[-1] < most else ""
        return Groups(count=possible[-1], why=f"as set by --groups {most}{short}")
    if len(possible) == 1:
        return Groups(
            count=1,
            why=f"{slots} {'slot' if slots == 1 else 'slots'}, and each engine needs two or more, the same number",
        )
    gains = {groups: ring.gain(slots, groups) for groups in possible}
    best = max(gains.values())
    count = next(groups for groups, gain in gains.items() if gain >= _NEARLY * best)
    if best < _LEAST_GAIN or count == 1:
        more = max(gain for groups, gain in gains.items() if groups > 1)
        return Groups(count=1, why=f"more would give {more:.2f} times its tokens with {slots} requests at once")
    return Groups(count=count, why=f"{gains[count]:.2f} times the tokens of one with {slots} requests at once")
