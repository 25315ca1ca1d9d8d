"""What is simulated, and what is expected of it. Each scenario comes in two sizes."""

from collections.abc import Mapping

import msgspec

from mesh_llm.simulation import Report, Scenario

SMALL = 100
LARGE = 1000


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """A scenario, and the most virtual seconds that each measured thing may take, by size."""

    scenario: Scenario
    small: Mapping[str, float]
    large: Mapping[str, float] = {}

    def at(self, nodes: int, seed: int) -> Scenario:
        return msgspec.structs.replace(self.scenario, nodes=nodes, seed=seed)


_BAD = Scenario(loss=0.05, duplicate=0.05, delay_ms=100.0, load_every=10.0)
_LAN = Scenario(delay_ms=2.0)

CASES: dict[str, Case] = {
    "join-storm": Case(
        scenario=msgspec.structs.replace(_BAD, delay_ms=200.0, join_over=0.0, duration=45.0, load_every=0.0),
        small={"joined": 15.0},
        large={"joined": 60.0},
    ),
    "crash": Case(
        scenario=msgspec.structs.replace(_BAD, duration=60.0, crash_at=20.0, crash=0.1, settle=10.0),
        small={"joined": 12.0, "crash_noticed": 10.0, "crash_noticed_half": 6.0, "crash_settled": 25.0},
        large={"crash_noticed": 15.0, "crash_noticed_half": 8.0, "crash_settled": 40.0},
    ),
    "restart": Case(
        scenario=msgspec.structs.replace(_LAN, loss=0.05, duration=45.0, crash_at=15.0, crash=0.1, restart_after=15.0),
        small={"joined": 8.0, "crash_noticed_half": 5.0, "restart_used": 5.0},
        large={"restart_used": 20.0},
    ),
    "cut": Case(
        scenario=msgspec.structs.replace(_BAD, duration=75.0, cut_at=15.0, cut=0.4, heal_after=30.0),
        small={"heal_settled": 20.0},
        large={"heal_settled": 45.0},
    ),
    "freeze": Case(
        scenario=msgspec.structs.replace(_LAN, loss=0.05, duration=50.0, freeze_at=12.0, freeze=3.0, thaw_after=20.0),
        small={"freeze_noticed": 8.0, "thaw_used": 5.0},
        large={"freeze_noticed": 10.0, "thaw_used": 15.0},
    ),
    "leave": Case(
        scenario=msgspec.structs.replace(_LAN, duration=25.0, leave_at=12.0, leave=0.1, settle=10.0),
        small={"leave_settled": 4.0},
        large={"leave_settled": 10.0},
    ),
    "clocks": Case(
        scenario=msgspec.structs.replace(_BAD, duration=50.0, skew_seconds=86400.0, drift=0.02, crash_at=20.0),
        small={"joined": 15.0, "crash_noticed": 10.0},
        large={"crash_noticed": 15.0},
    ),
}

EVERYTHING = Case(
    scenario=Scenario(
        clients=10 * LARGE,
        duration=270.0,
        join_over=0.0,
        loss=0.05,
        duplicate=0.05,
        delay_ms=200.0,
        skew_seconds=86400.0,
        drift=0.001,
        load_every=20.0,
        crash_at=80.0,
        crash=0.1,
        restart_after=50.0,
        cut_at=160.0,
        cut=0.4,
        heal_after=25.0,
        settle=20.0,
    ),
    small={"joined": 20.0, "crash_noticed": 15.0, "restart_used": 15.0, "heal_settled": 30.0},
    large={
        "joined": 75.0,
        "crash_noticed": 25.0,
        "crash_noticed_half": 12.0,
        "clients_settled": 50.0,
        "restart_used": 25.0,
        "heal_settled": 60.0,
    },
)
"""A join storm, then a tenth killed at once, then back, then cut in two and healed, on a bad network, with clients."""


def shortcomings(report: Report, limits: Mapping[str, float]) -> list[str]:
    """What the report shows that should not be, in words."""
    wrong = list(report.problems)
    for name, limit in limits.items():
        taken = getattr(report, name)
        if taken is None:
            wrong.append(f"{name}: not reached")
        elif taken > limit:
            wrong.append(f"{name}: {taken} s, at most {limit} s")
    if report.false_deaths:
        wrong.append(f"{report.false_deaths} living nodes were held for dead")
    return wrong


def command(name: str, scenario: Scenario) -> str:
    """How to see it again."""
    return f"python -m tests.sim {name} --nodes {scenario.nodes} --seed {scenario.seed}"
