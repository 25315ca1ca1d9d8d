"""The split model in a node's status: its form as announced, and on its host what the tunnels did."""

from collections.abc import Callable

from mesh_llm.core.ids import ModelName, NodeId
from mesh_llm.core.model import ModelFacts
from mesh_llm.core.node import Node
from mesh_llm.core.split_layout import SplitLayout, SplitShare
from mesh_llm.core.status import StatusSplit, StatusSplitWorker
from mesh_llm.daemon.split_host import HostSession
from mesh_llm.daemon.split_progress import loaded, part_bytes
from mesh_llm.split.stats import SplitStats, WorkerStats

Foresee = Callable[[ModelFacts, SplitLayout], float | None]


def split_status(
    node: Node,
    session: HostSession | None,
    tokens: Callable[[str], int],
    foresee: Foresee = lambda _facts, _layout: None,
) -> StatusSplit | None:
    """The split model that this node takes part in, or one that it hears of.

    Args:
        node: this node.
        session: the open tunnels, on the host.
        tokens: how many a model generated here since the daemon began.
        foresee: tokens per second as predicted, of a model that this node hosts.
    """
    found = node.sharing.layout(node.members)
    if found is None:
        return None
    model, layout = found
    mine = session if session is not None and session.layout == layout else None
    stats = mine.stats if mine is not None else None
    generated = tokens(model) - (mine.tokens_before if mine is not None else 0)
    facts = node.on_disk.get(model)
    speed = _speed(node, model, layout.host.node)
    return StatusSplit(
        model=model,
        host=layout.host.node,
        term=layout.term,
        ratio=_ratio(layout, layout.host),
        layers=layout.host.layers,
        workers=tuple(_worker(node, layout, share, mine, stats) for share in layout.workers),
        round_trips_per_token=round(stats.total.round_trips / generated, 2)
        if stats is not None and generated
        else None,
        predicted_tps=foresee(facts, layout) if mine is not None and facts is not None else None,
        measured_tps=speed or None,
    )


def _worker(
    node: Node, layout: SplitLayout, share: SplitShare, session: HostSession | None, stats: SplitStats | None
) -> StatusSplitWorker:
    member = next((one for one in node.members if one.announcement.node == share.node), None)
    name = next((name for name, known in session.names.items() if known == share.node), "") if session else ""
    done = stats.workers.get(name, WorkerStats()) if stats is not None else WorkerStats()
    pairs = [pair.reachable for pair in stats.pairs if pair.source == name] if stats is not None else []
    return StatusSplitWorker(
        node_id=share.node,
        name=member.announcement.name if member is not None else node.config.name,
        ratio=_ratio(layout, share),
        layers=share.layers,
        memory_bytes=share.memory_bytes,
        rtt_ms=round(member.rtt_ms, 3) if member is not None else 0.0,
        direct_push=all(pairs) if pairs else None,
        weight_bytes_sent=done.weight_bytes_sent,
        weight_bytes_by_reference=done.weight_bytes_referenced,
        relayed=done.relayed,
        loaded=_loaded(session, share, done),
    )


def _loaded(session: HostSession | None, share: SplitShare, done: WorkerStats) -> float | None:
    if session is None:
        return None
    return 1.0 if session.loading.ended else round(loaded(done, part_bytes(session.facts, share.layers)), 3)


def _ratio(layout: SplitLayout, share: SplitShare) -> float:
    return round(share.layers / max(1, sum(one.layers for one in layout.shares)), 4)


def _speed(node: Node, model: ModelName, host: NodeId) -> float:
    """Tokens per second of one request, as the host measures it; on other nodes, as it announced it."""
    if host == node.config.node:
        return node.speeds.get(model, 0.0)
    words = (member.announcement for member in node.members if member.announcement.node == host)
    return next((one.tokens_per_second for word in words for one in word.serving if one.model == model), 0.0)
