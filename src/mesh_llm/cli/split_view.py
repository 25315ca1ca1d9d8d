"""The split model in `mesh-llm status`: who computes which part, and how its speed compares with what was foreseen."""

from collections.abc import Mapping

from mesh_llm.cli.table import table
from mesh_llm.cli.units import size
from mesh_llm.core.status import Status, StatusSplit, StatusSplitWorker


def split_lines(status: Status) -> list[str]:
    """Lines of text; none where nothing is split."""
    split = status.split
    if split is None:
        return []
    names = {peer.node_id: peer.name for peer in status.peers} | {status.node_id: status.name}
    lines = ["", f"{split.model} is split over {len(split.workers) + 1} nodes: {_speed(split)}"]
    rows = [(names.get(split.host) or split.host[:10], "host", str(split.layers), "-", "-", "-")]
    rows += [_row(worker, names) for worker in split.workers]
    return [*lines, *table(("NODE", "PART", "LAYERS", "MEMORY", "RTT", "RESULTS"), rows, "")]


def _speed(split: StatusSplit) -> str:
    measured = "not measured yet" if split.measured_tps is None else f"{split.measured_tps:.1f} tokens/s"
    foreseen = "" if split.predicted_tps is None else f", {split.predicted_tps:.1f} foreseen"
    trips = "" if split.round_trips_per_token is None else f", {split.round_trips_per_token:.1f} round trips a token"
    return f"{measured}{foreseen}{trips}"


def _row(worker: StatusSplitWorker, names: Mapping[str, str]) -> tuple[str, ...]:
    part = "worker" if worker.loaded in {None, 1.0} else f"loading, {100 * (worker.loaded or 0.0):.0f} %"
    rtt = f"{worker.rtt_ms:.1f} ms" if worker.rtt_ms else "-"
    # Without a way of their own, what one worker computes goes through the host to the next: a round trip more.
    results = {True: "direct", False: "through the host", None: "-"}[worker.direct_push]
    name = worker.name or names.get(worker.node_id) or worker.node_id[:10]
    return (name, part, str(worker.layers), size(worker.memory_bytes), rtt, results)
