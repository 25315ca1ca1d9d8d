"""`mesh-llm plan MODEL`: where a model would run, whether it fits, and how fast, before anything is loaded."""

import asyncio
import os
import socket
import time
from pathlib import Path
from urllib.parse import urlencode

import click

from mesh_llm.cli.client import DaemonClient, node_home, node_option
from mesh_llm.cli.output import print_json, printable, table
from mesh_llm.core.performance.plan import PlanAnswer, PlanMachine, PlanMemory
from mesh_llm.core.types.errors import MeshError, size
from mesh_llm.runtime.home import Home

_SECONDS = 180.0
"""To measure a new machine takes a second or two, and each link some round trips."""

_NOTICED = 0.9
"""A smaller difference of two speeds is none that a user notices."""

_BASES = {
    "model": "from runs of this model there",
    "machine": "from runs of other models there",
    "probe": "from a measurement of the machine",
    "told": "from what the machines announce",
}


@click.command()
@click.argument("model")
@click.option("--ctx-size", type=click.IntRange(min=1), metavar="N", help="Context for each request, in tokens.")
@click.option(
    "--bin-dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Plan for the llama.cpp binaries in this directory, if no node runs here.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, as GET /api/plan returns it.")
@node_option
def plan(model: str, ctx_size: int | None, bin_dir: Path | None, *, as_json: bool) -> None:
    """Show where MODEL would run, whether it fits, and how fast it would be.

    MODEL need not be on this machine: it may be a name in the catalogue or in the mesh, or hf:OWNER/REPO.

    The running node asks the other nodes of its mesh, and measures machines and the links between them. If no node
    runs, the plan is for this machine alone.
    """
    if os.path.exists(model):  # noqa: PTH110 - as typed, relative to here: the node has another working directory
        model = os.path.abspath(model)  # noqa: PTH100
    try:
        client = DaemonClient(node_home(), timeout=_SECONDS)
    except MeshError as error:
        if error.code != "not_running":
            raise
        answer = asyncio.run(_here(model, ctx_size, bin_dir))
    else:
        query = {"model": model} | ({} if ctx_size is None else {"ctx_size": str(ctx_size)})
        answer = client.get(f"/api/plan?{urlencode(query)}", PlanAnswer)
    if as_json:
        print_json(answer)
        return
    click.echo(render(answer))


async def _here(model: str, context: int | None, bin_dir: Path | None) -> PlanAnswer:
    """The plan for this machine alone, made without a node."""
    from mesh_llm.cli.models import facts_cache, scan_disk
    from mesh_llm.core.performance.plan import PlanInput, PlanRequest, make_plan
    from mesh_llm.core.types.ids import NodeId
    from mesh_llm.core.types.model import AUTO_CACHE, LaunchOptions
    from mesh_llm.daemon.model_fetcher import published_facts
    from mesh_llm.engine.devices import measure
    from mesh_llm.engine.sources.choice import choose, find_sources
    from mesh_llm.engine.speed import known_experience
    from mesh_llm.models.library.library import LocalModel
    from mesh_llm.models.library.resolve import interpret

    cache = facts_cache()
    found = interpret(model, scan_disk(cache), cache, os.environ.get("HF_ENDPOINT", ""))
    here = isinstance(found, LocalModel)
    facts = found.facts if isinstance(found, LocalModel) else await published_facts(found)
    fetch = "" if isinstance(found, LocalModel) else found.entry.name if found.entry is not None else str(found.ref)
    home = Home.default()
    source, info = await choose(find_sources(bin_dir, home.cache))
    measured = measure(info)
    learned = await known_experience(home.cache, source, measured.capacity, measured.devices)
    now = time.time()
    pace = None if learned is None else learned.slowdown(now, facts)
    me = PlanInput(
        node=NodeId("0" * 64),
        name=socket.gethostname(),
        memory_bytes=measured.capacity.memory_bytes,
        rpc_version=measured.capacity.rpc_version,
        has_file=here,
        speed=None if learned is None else learned.current_speed(now),
        alone=None if learned is None or pace is None else learned.paced(pace.factor),
        basis="" if pace is None else pace.basis,
        host_bytes=measured.capacity.host_bytes,
        host_speed=None if learned is None else learned.host,
        cards=max(1, len(measured.capacity.devices)),
    )
    lag = 1.0 if learned is None else learned.split_lag
    options = LaunchOptions(context=context, cache_type=AUTO_CACHE)
    ask = PlanRequest(facts=facts, options=options, split_lag=lag, fetch=fetch)
    return make_plan(ask, [me], {})


def render(answer: PlanAnswer) -> str:
    """A plan as plain text. Texts from other machines are made harmless."""
    lines = [answer.message]
    if answer.hint:
        lines.append(f"  {answer.hint}")
    if answer.runs != "no":
        lines.append(f"  context    {answer.context} tokens for each of {answer.slots} at once")
        lines += _memory(answer)
        lines.append(
            f"  speed      {_speed(answer.predicted_tps)}, one request at a time{_basis(answer.basis)}{_full(answer)}"
        )
        lines += _prompt(answer)
    if answer.split is not None:
        split = answer.split
        title = "It would be divided so" if answer.runs == "split" else "Divided (--split), it would be so"
        ring = f", of which the network takes {split.ring_ms:.1f} ms a token" if split.ring_ms is not None else ""
        length = f"{answer.prompt_tokens:,} tokens"
        prompt = "" if split.prompt_tps is None else f", a prompt of {length} {_speed(split.prompt_tps)}"
        lines += ["", f"{title}: {_speed(split.predicted_tps)}{ring}{prompt}{_basis(split.basis)}."]
        rows = [
            (node.name, "host" if place == 0 else f"worker {place}", str(node.layers), size(node.memory_bytes))
            for place, node in enumerate(split.nodes)
        ]
        lines += table(("NODE", "PART", "LAYERS", "MEMORY"), rows, "")
        together = f": {_speed(split.together_tps)} together" if split.together_tps is not None else ""
        engines = "one engine has" if split.groups == 1 else f"{split.groups} engines share"
        slots = "the one slot" if split.slots == 1 else f"all {split.slots} slots"
        why = f" ({split.groups_why})" if split.groups_why else ""
        lines.append(f"On the host {engines} {slots}{why}{together}.")
        if split.wire != "f32":
            lines.append(f"Activations travel as {split.wire} (--wire): answers may differ from those with f32.")
        if split.micro_batch:
            lines.append(
                f"Prompts are computed {split.micro_batch} tokens at a time, so that all machines work at once."
            )
    lines += [
        "",
        *table(("NODE", "OFFERS", "FITS", "ALONE", "READS", "RTT", "TO IT"), list(map(_row, answer.machines)), ""),
    ]
    lines += [f"  {one.name}: {one.note}" for one in answer.machines if one.note and one.note not in answer.hint]
    lines += [f"  {one.name}: it does not have this model's file" for one in answer.machines if not one.has_file]
    return printable("\n".join(lines))


def _memory(answer: PlanAnswer) -> list[str]:
    """What the model takes: of the GPU and of main memory each, where it needs both."""
    cache = f", KV cache {answer.cache_type}" if answer.cache_type not in {"", "f16"} else ""
    offload = answer.offload
    if offload is None:
        return [f"  memory     {size(answer.need_bytes)} of {size(answer.have_bytes)}{cache}"]

    def sums(memory: PlanMemory) -> str:
        parts = f"weights {size(memory.weights)} + KV {size(memory.cache)} + compute {size(memory.compute)}"
        return f"{size(memory.total_bytes)} of {size(memory.have_bytes)}: {parts}"

    return [
        f"  division   {offload.text}{cache}",
        f"  GPU        {sums(offload.gpu)}",
        f"  memory     {sums(offload.memory)}",
    ]


def _full(answer: PlanAnswer) -> str:
    """How fast tokens are where the context is nearly full, if a user notices the difference."""
    first, last = answer.predicted_tps, answer.full_tps
    if first is None or last is None or last > _NOTICED * first:
        return ""
    return f"; {_speed(last)} at the end of {answer.context:,} tokens"


def _prompt(answer: PlanAnswer) -> list[str]:
    """How fast prompts of different lengths are read, where that is known."""
    return [
        f"  {'prompts' if place == 0 else '':<10} {_speed(one.tokens_per_second)}: the first token"
        f" {one.first_token_s:.1f} s after one of {one.tokens:,} tokens"
        for place, one in enumerate(answer.prompts)
    ]


def _speed(tokens_per_second: float | None) -> str:
    return "speed not known" if tokens_per_second is None else f"about {tokens_per_second:.1f} tokens/s"


def _basis(basis: str) -> str:
    """The basis of a predicted speed, in words."""
    words = _BASES.get(basis, "")
    return f" ({words})" if words else ""


def _row(one: PlanMachine) -> tuple[str, ...]:
    return (
        one.name,
        size(one.memory_bytes),
        "no" if not one.fits else "in part" if one.offload else "yes",
        "-" if one.predicted_tps is None else f"{one.predicted_tps:.1f} tokens/s",
        "-" if one.gigabytes_per_second is None else f"{one.gigabytes_per_second:.1f} GB/s",
        "-" if one.rtt_ms is None else f"{one.rtt_ms:.1f} ms",
        "-" if one.megabytes_per_second is None else f"{one.megabytes_per_second:.0f} MB/s",
    )
