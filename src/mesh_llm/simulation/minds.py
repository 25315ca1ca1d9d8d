"""What can run on a simulated machine."""

from hashlib import blake2b
from random import Random

import msgspec

from mesh_llm.core.announcement import Announcement, Serving
from mesh_llm.core.effects import AnyEffect
from mesh_llm.core.events import AnyEvent
from mesh_llm.core.ids import Incarnation, MeshId, ModelName, NodeId
from mesh_llm.core.membership import Membership
from mesh_llm.core.model import ModelStatus
from mesh_llm.core.pace import Pace

MESH = MeshId("5" * 64)
_FIRST_LIFE = 1_700_000_000


def node_id(seed: int, index: int) -> NodeId:
    """Ids spread over the ring like public keys."""
    return NodeId(blake2b(f"{seed}:{index}".encode(), digest_size=32).hexdigest())


def incarnation(local: float) -> Incarnation:
    """The life number that a machine's clock gives."""
    return Incarnation(_FIRST_LIFE + int(local))


class MemberMind:
    """Membership with a made-up announcement."""

    def __init__(self, node: NodeId, index: int, life: Incarnation, pace: Pace, seed: int) -> None:
        self._membership = Membership(node, MESH, life, pace, Random(seed))  # noqa: S311 - not for secrets
        model = ModelName(f"model-{index % 4}")
        self._word = Announcement(
            mesh=MESH,
            node=node,
            incarnation=life,
            sequence=0,
            name=f"node-{index}",
            serving=(Serving(model=model, status=ModelStatus.WARM, context=4096, slots=4),),
            addresses=(f"10.0.{index // 256 % 256}.{index % 256}:7000",),
        )

    @property
    def membership(self) -> Membership:
        """Itself."""
        return self._membership

    def start(self, now: float) -> list[AnyEffect]:
        """Announce."""
        return self._membership.publish(self._word, now)

    def handle(self, event: AnyEvent, now: float) -> list[AnyEffect]:
        """Pass on."""
        return self._membership.handle(event, now)

    def change_load(self, in_flight: int, now: float) -> list[AnyEffect]:
        """Announce other requests in flight."""
        serving = msgspec.structs.replace(self._word.serving[0], in_flight=in_flight)
        self._word = msgspec.structs.replace(self._word, serving=(serving,))
        return self._membership.publish(self._word, now)

    def stop(self, now: float) -> list[AnyEffect]:
        """Leave."""
        return self._membership.leave(now)

    def deadline(self) -> float | None:
        """Pass on."""
        return self._membership.deadline()
