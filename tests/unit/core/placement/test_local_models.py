import msgspec
import pytest
from tests.support.core_values import GB, MESH, facts, node_id

from mesh_llm.core.config import NodeConfig
from mesh_llm.core.placement.local_models import LoadRefused, LocalModels
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import Capacity, LaunchOptions, LaunchPlan, ModelKind

LARGE = msgspec.structs.replace(facts("large", 8.0), context_train=32_768, kv_bytes_per_token=65_536)
LITTLE = msgspec.structs.replace(facts("little", 1.0, ModelKind.DRAFT), context_train=32_768)


def planned(gigabytes: float, options: LaunchOptions | None = None) -> LaunchPlan:
    models = LocalModels(
        NodeConfig(node=node_id(1), mesh=MESH, wanted=(LARGE.name,), options=options or LaunchOptions())
    )
    models.capacity = Capacity(memory_bytes=int(gigabytes * GB))
    models.know([LARGE, LITTLE], {"large": "little"})
    order = models.check(ModelName("large"), None)
    assert not isinstance(order, LoadRefused)
    return order.plan


def test_a_draft_that_was_found_is_planned_and_its_memory_counts() -> None:
    alone = planned(64, LaunchOptions(use_draft=False))
    both = planned(64)
    assert (alone.draft, both.draft) == (None, "little")
    assert both.memory_bytes >= alone.memory_bytes + LITTLE.size_bytes
    assert (both.slots, both.context) == (alone.slots, alone.context)


@pytest.mark.parametrize("gigabytes", [9.6, 10.0])
def test_a_draft_gives_way_where_memory_is_short(gigabytes: float) -> None:
    assert planned(gigabytes) == planned(gigabytes, LaunchOptions(use_draft=False))


def test_a_draft_of_the_users_choice_comes_instead() -> None:
    assert planned(64, LaunchOptions(draft="/elsewhere/other.gguf")).draft is None
