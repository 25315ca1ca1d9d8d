from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import msgspec
from tests.support.core_values import node_id, order

from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import Capacity, SplitLayout, SplitShare
from mesh_llm.core.types.model_settings import ModelSettings
from mesh_llm.daemon.receipts import ReceiptFacts

M = ModelName("m")
LAYOUT = SplitLayout(term=1, shares=(SplitShare(node=node_id(1), layers=2), SplitShare(node=node_id(2), layers=2)))


def facts(layout: SplitLayout | None) -> ReceiptFacts:
    launched = order("m")
    plan = msgspec.structs.replace(launched.plan, split=layout)
    launch = SimpleNamespace(model=M, term=3, context=512, order=replace(launched, plan=plan))
    node = SimpleNamespace(launches=[launch], capacity=Capacity(), settings_of={M: ModelSettings()}.__getitem__)
    unused = cast("Any", None)
    return ReceiptFacts(cast("Any", node), unused, unused, lambda model: f"f16 of {model}")


async def test_a_receipt_of_a_split_model_says_how_activations_travel() -> None:
    served = facts(LAYOUT).served(M, 3)
    assert (served.wire_type, served.workers) == ("f16 of m", (node_id(2),))
    assert facts(None).served(M, 3).wire_type == ""
