"""`mesh-llm status`: the running node and its mesh, as text or as JSON."""

import time
from collections.abc import Mapping

import click

from mesh_llm.api.types import StatusRequests
from mesh_llm.cli.client import DaemonClient, neighbours, node_home, node_option
from mesh_llm.cli.invite import invite_lines, waiting_table
from mesh_llm.cli.output import print_json, printable, table
from mesh_llm.console.status import Status, StatusModel, StatusPeer, StatusSplit, StatusSplitWorker, StatusWaitingNode
from mesh_llm.core.listing.content import MESH_KEY_DIGITS
from mesh_llm.core.types.errors import duration, size
from mesh_llm.engine.spec import PartState


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON, as GET /api/status returns it.")
@click.option("--watch", "-w", "go_on", is_flag=True, help="Keep the display up to date; q or Ctrl-C ends it.")
@node_option
def status(*, as_json: bool, go_on: bool) -> None:
    """Show the running node and its mesh."""
    if go_on:
        if as_json:
            raise click.UsageError("--watch is for people. Programs read GET /api/events.")
        from mesh_llm.cli.watch import watch

        watch()
        return
    home = node_home()
    answer = DaemonClient(home).get("/api/status", Status)
    if as_json:
        print_json(answer)
        return
    click.echo("\n".join([render(answer), *(["", *others] if (others := neighbours(home, "status")) else [])]))


def render(status: Status) -> str:
    """The whole status as plain text. Texts from other machines are made harmless."""
    lines = [
        f"{status.name}: {status.role}, {status.health}, up {duration(status.uptime_s)} (pid {status.pid})",
        f"  node     {status.node_id[:16]}  mesh {_mesh(status)}  scope {status.scope or '-'}",
        *([f"  owner    {status.owner}"] if status.owner else []),
        *_listing(status),
        f"  API      {status.api_base}{'   needs an API key' if status.needs_key else ''}",
        *([f"  Ollama   {status.ollama_base}"] if status.ollama_base else []),
        (
            f"  engine   {status.engine} on {', '.join(status.devices) or 'no device'}"
            if status.engine
            else "  engine   none"
        ),
        (
            f"  memory   {size(status.memory_bytes)} offered of {size(status.memory_total_bytes)}"
            f"{f', and {size(status.host_bytes)} of main memory' if status.host_bytes else ''}"
            if status.memory_total_bytes
            else "  memory   none offered"
        ),
        f"  requests {_requests(status.requests)}",
        *_strangers(status),
        *_prompt_caches(status),
        *(f"  problem  {problem.text}" for problem in status.problems),
        *(f"  checked  {one.text} {_when(one.at)}" for one in status.corrections),
        *(
            f"  plugin   {part.state}: {part.text}"
            for part in status.engine_parts
            if part.state in {PartState.MISSING, PartState.BUILDING}
        ),
        *([f"  lending  {status.lending}"] if status.lending else []),
        *([f"  yielding {status.yield_reason}; nothing is served here now"] if status.yield_reason else []),
        "",
        *table(
            MODEL_HEAD,
            [model_row(model, status.node_id) for model in status.models],
            "no models; serve one: mesh-llm load MODEL",
        ),
    ]
    waiting = {one.model for one in status.waiting}
    lines += [line for model in status.models if (line := _division(model))]
    lines += [
        f"  {model.name}: {model.reason}" for model in status.models if model.reason and model.name not in waiting
    ]
    lines += [
        f"  {model.name}: {model.waiting} {'request waits' if model.waiting == 1 else 'requests wait'}: {model.awaited}"
        for model in status.models
        if model.waiting and model.awaited
    ]
    lines += [f"  {text}" for model in status.models for text in model.left_out]
    for one in status.waiting:
        lines += ["", f"{one.model}: {one.reason}", *table(WAITING_HEAD, [waiting_row(node) for node in one.nodes], "")]
        # A long list is cut short in the reason.
        lines += [f"  {node.name} {node.reason}" for node in one.nodes if node.reason and node.reason not in one.reason]
    lines += _split_lines(status)
    if status.peers:
        lines += [
            "",
            *table(
                PEER_HEAD,
                [peer_row(peer, status.owner) for peer in status.peers],
                "",
            ),
        ]
    if status.approvals:
        lines += ["", "Asking to join:", *waiting_table(status.approvals), "  mesh-llm approve KEY [--deny]"]
    if status.token:
        lines += ["", *invite_lines(status.token, status.token_scope, status.scope)]
    return printable("\n".join(lines))


def _when(at: float) -> str:
    """A moment as people here write it, as in `at 14:03`; with the day where it is another one."""
    then, now = time.localtime(at), time.localtime()
    return time.strftime("at %H:%M" if then[:3] == now[:3] else "on %Y-%m-%d at %H:%M", then)


def _requests(found: StatusRequests) -> str:
    text = (
        f"{found.in_flight} in flight, {found.per_minute:.0f} a minute, {found.tokens_per_second:.0f} tokens/s, "
        f"first byte "
    )
    return text + (f"{found.ttfb_ms_p50:.0f} ms" if found.ttfb_ms_p50 else "not measured yet")


def _strangers(status: Status) -> list[str]:
    """What nodes that came by a public listing use of this node, if any do, and who is cut off."""
    used = status.requests.strangers
    lines: list[str] = []
    if used.running or used.nodes or used.refused_today:
        most = f" of {used.all_tokens_per_day}" if used.all_tokens_per_day else ""
        at_once = f" of {used.all_concurrent}" if used.all_concurrent else ""
        lines.append(
            f"  strangers {used.running}{at_once} in flight, {used.tokens_today}{most} tokens today of {used.nodes}"
            f" node{'' if used.nodes == 1 else 's'}, {used.refused_today} refused"
        )
    for one in status.cut_off[:_CUT_OFF_SHOWN]:
        who = f"strangers at {one.who}" if one.address else one.who[:16]
        lines.append(f"  cut off  {who} for {duration(one.seconds)}: {one.reason}")
    if len(status.cut_off) > _CUT_OFF_SHOWN:
        lines.append(f"  cut off  and {len(status.cut_off) - _CUT_OFF_SHOWN} more: mesh-llm status --json")
    return lines


def _prompt_caches(status: Status) -> list[str]:
    saved = status.prompt_caches
    if saved is None or not (saved.count or saved.moved_in or saved.moved_out):
        return []
    text = f"{saved.count} saved, {size(saved.bytes)} of at most {size(saved.limit)}"
    if saved.moved_in or saved.moved_out:
        text += f"; {saved.moved_in} came from other nodes, {saved.moved_out} went to them"
    return [f"  prompts  {text}"]


def _division(model: StatusModel) -> str:
    """What of a model is on the GPU here, and what in memory; its cache and guesses. Empty where all is as usual."""
    cache = f"KV cache {model.cache_type}" if model.cache_type not in {"", "f16"} else ""
    where = f"{model.offload} ({size(model.device_bytes)} there, {size(model.host_bytes)} of main memory)"
    guessing = f"speculation {model.speculation}" if model.speculation else ""
    parts = [where if model.offload else "", cache, guessing]
    return f"  {model.name}: {', '.join(filter(None, parts))}" if any(parts) else ""


def _mesh(status: Status) -> str:
    """The mesh's key, which is what tells it from others of its name, and its name."""
    key = status.mesh_id[:MESH_KEY_DIGITS] or "-"
    return f"{key} ({status.mesh_name})" if status.mesh_name else key


def _split_lines(status: Status) -> list[str]:
    """The split model: which node computes which part, and its measured and predicted speed. Empty if there is none."""
    split = status.split
    if split is None:
        return []
    names = {peer.node_id: peer.name for peer in status.peers} | {status.node_id: status.name}
    lines = ["", f"{split.model} is split over {len(split.workers) + 1} nodes: {_speed(split)}"]
    rows = [(names.get(split.host) or split.host[:10], "host", str(split.layers), "-", "-", "-")]
    rows += [_worker_row(worker, names) for worker in split.workers]
    lines += table(("NODE", "PART", "LAYERS", "MEMORY", "RTT", "RESULTS"), rows, "")
    if split.groups_planned:
        found = f"{split.groups_planned} {'engine shares' if split.groups_planned == 1 else 'engines share'} the slots"
        now = f"; {split.groups} now" if split.groups != split.groups_planned else ""
        lines.append(f"{found} ({split.groups_why}){now}.")
    return [*lines, f"Activations travel as {split.wire}."] if split.wire else lines


def _speed(split: StatusSplit) -> str:
    measured = "not measured yet" if split.measured_tps is None else f"{split.measured_tps:.1f} tokens/s"
    foreseen = "" if split.predicted_tps is None else f", {split.predicted_tps:.1f} predicted"
    measured_read, foreseen_read = split.measured_prompt_tps, split.predicted_prompt_tps
    words = [] if measured_read is None else [f"{measured_read:.0f} tokens/s"]
    words += [] if foreseen_read is None else [f"{foreseen_read:.0f} predicted"]
    read = f", prompts of {split.prompt_tokens:,} tokens {', '.join(words)}" if words else ""
    trips = "" if split.round_trips_per_token is None else f", {split.round_trips_per_token:.1f} round trips a token"
    return f"{measured}{foreseen}{read}{trips}"


def _worker_row(worker: StatusSplitWorker, names: Mapping[str, str]) -> tuple[str, ...]:
    part = "worker" if worker.loaded in {None, 1.0} else f"loading, {100 * (worker.loaded or 0.0):.0f} %"
    rtt = f"{worker.rtt_ms:.1f} ms" if worker.rtt_ms else "-"
    # Results that cannot go from worker to worker directly go through the host: one more round trip.
    results = {True: "direct", False: "through the host", None: "-"}[worker.direct_push]
    name = worker.name or names.get(worker.node_id) or worker.node_id[:10]
    return (name, part, str(worker.layers), size(worker.memory_bytes), rtt, results)


def _listing(status: Status) -> list[str]:
    """How the mesh is listed on Nostr, if this node or another one lists it."""
    listing = status.listing
    if listing.state == "off" and not listing.publisher:
        return []
    said = {
        "off": "by another node",
        "resting": "by another node",
        "full": f"not at present: {listing.clients} of {listing.max_clients} clients",
        "failing": f"failing: {listing.problem}",
    }.get(listing.state, listing.state)
    return [f"  listing  {said}"]


_OWNER_SHOWN = 10
_CUT_OFF_SHOWN = 4

# The rows of both `status` and `status --watch`.

MODEL_HEAD = ("MODEL", "STATE", "CONTEXT", "SLOTS", "SIZE", "ON")
PEER_HEAD = ("NODE", "ROLE", "SCOPE", "STATE", "SERVING", "MEMORY", "RTT", "OWNER", "PATH")
WAITING_HEAD = ("NODE", "OFFERS", "TAKES PART")


def model_row(model: StatusModel, here: str) -> tuple[str, ...]:
    """A model and the names of the nodes that serve it. `here`: this node's id."""
    context = str(model.context) if model.context else "-"
    slots = str(model.slots) if model.slots else "-"
    ids = model.host_ids or ("",) * len(model.hosts)
    where = [f"{name} (here)" if node == here else name for name, node in zip(model.hosts, ids, strict=False)]
    return (model.name, model.status, context, slots, size(model.size_bytes), ", ".join(where) or "-")


def peer_row(peer: StatusPeer, own: str = "") -> tuple[str, ...]:
    """Another node. `own`: the key of this node's owner."""
    owner = "yours" if peer.owner and peer.owner == own else peer.owner[:_OWNER_SHOWN] or "-"
    rtt = f"{peer.rtt_ms:.1f} ms" if peer.rtt_ms else "-"
    name = peer.name or peer.node_id[:10]
    serving = ", ".join(peer.serving) or "-"
    path = f"{peer.path}, {peer.transport}" if peer.transport in {"tcp", "quic"} else peer.path
    if peer.transport == "quic" and peer.transport_reason:
        path += f": {peer.transport_reason}"
    return (name, peer.role, peer.scope or "-", peer.state, serving, size(peer.memory_bytes), rtt, owner, path)


def waiting_row(node: StatusWaitingNode) -> tuple[str, ...]:
    """A node's part in a model that waits for memory."""
    return (node.name, size(node.memory_bytes), "yes" if node.takes_part else "no")
