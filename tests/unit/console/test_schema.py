"""What the status promises to programs that were written against it: fields are added, never taken away."""

from typing import Any

import pytest

from mesh_llm.console.openapi import describe

PROMISED = {
    "Status": ("version node_id mesh_id mesh_name role ready api_port token uptime_s models peers split requests"),
    "StatusModel": "name status hosts nodes context size_bytes reason",
    "StatusPeer": "node_id name role state serving memory_bytes rtt_ms path version",
    "StatusSplit": "host workers round_trips_per_token predicted_tps measured_tps",
    "StatusSplitWorker": "node_id ratio rtt_ms direct_push weight_bytes_sent weight_bytes_by_reference",
    "StatusRequests": "in_flight per_minute tokens_per_second ttfb_ms_p50",
}


@pytest.mark.parametrize("name", list(PROMISED))
def test_the_fields_are_there(name: str) -> None:
    schemas: dict[str, Any] = describe()["components"]["schemas"]
    assert set(PROMISED[name].split()) <= set(schemas[name]["properties"])
