"""Values of the core with sensible defaults, for tests that care about one field."""

from typing import TypeVar

from mesh_llm.core.config import NodeConfig, Timings
from mesh_llm.core.placement.launches import LaunchOrder, Origin
from mesh_llm.core.types.announcement import Announcement, Member, Serving
from mesh_llm.core.types.effects import AnyEffect
from mesh_llm.core.types.ids import Incarnation, MeshId, ModelName, NodeId
from mesh_llm.core.types.model import Capacity, LaunchOptions, LaunchPlan, ModelFacts, ModelKind, ModelStatus, Role

MESH = MeshId("e" * 64)
GB = 10**9


def node_id(number: int) -> NodeId:
    return NodeId(f"{number:064x}")


def facts(name: str, gigabytes: float = 1.0, kind: ModelKind = ModelKind.CHAT) -> ModelFacts:
    return ModelFacts(
        name=ModelName(name),
        kind=kind,
        size_bytes=int(gigabytes * GB),
        layers=16,
        context_train=4096,
        embedding_length=1024,
        vocabulary=32_000,
        kv_bytes_per_token=16_384,
        fingerprint=f"print-{name}",
    )


def plan(name: str, memory_bytes: int = GB) -> LaunchPlan:
    return LaunchPlan(model=ModelName(name), context=2048, slots=4, memory_bytes=memory_bytes)


def order(name: str, *, origin: Origin = Origin.USER, options: LaunchOptions | None = None) -> LaunchOrder:
    return LaunchOrder(facts=facts(name), plan=plan(name), options=options or LaunchOptions(), origin=origin)


def serving(name: str, status: ModelStatus = ModelStatus.WARM, **fields: object) -> Serving:
    return Serving(model=ModelName(name), status=status, **({"term": 1, "slots": 4} | fields))  # pyright: ignore[reportArgumentType]


def member(number: int, *servings: Serving, suspect: bool = False, rtt_ms: float = 1.0, **fields: object) -> Member:
    values: dict[str, object] = {
        "mesh": MESH,
        "node": node_id(number),
        "incarnation": Incarnation(1),
        "sequence": 1,
        "name": f"node{number}",
        "role": Role.SERVE if servings else Role.STANDBY,
        "serving": servings,
        "capacity": Capacity(memory_bytes=16 * GB),
    }
    return Member(
        announcement=Announcement(**(values | fields)),  # pyright: ignore[reportArgumentType]
        suspect=suspect,
        rtt_ms=rtt_ms,
        path="direct",
    )


def config(*wanted: str, number: int = 1, **fields: object) -> NodeConfig:
    values: dict[str, object] = {
        "node": node_id(number),
        "mesh": MESH,
        "name": f"node{number}",
        "version": "1",
        "wanted": tuple(ModelName(name) for name in wanted),
        "timings": Timings(),
    }
    return NodeConfig(**(values | fields))  # pyright: ignore[reportArgumentType]


_Kind = TypeVar("_Kind")


def of_kind(effects: list[AnyEffect], kind: type[_Kind]) -> list[_Kind]:
    return [effect for effect in effects if isinstance(effect, kind)]
