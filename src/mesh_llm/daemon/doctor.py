"""`mesh-llm doctor`: checks everything that a node needs, and says what to do about each problem."""

import errno
import os
import platform
import shutil
import socket
import tempfile
from collections.abc import Callable, Sequence
from enum import StrEnum

import msgspec
import psutil

from mesh_llm.console.status import StatusPeer
from mesh_llm.core.types.errors import MeshError
from mesh_llm.daemon.settings import API_PORT, CONSOLE_PORT
from mesh_llm.engine.confinement.policy import described
from mesh_llm.engine.devices import UNUSED_HINT, Machine, examine_machine, fullness, hidden_cards, unused_gpus
from mesh_llm.engine.sources.embedded.loading import KINDS
from mesh_llm.engine.spec import EngineInfo, EnginePart, PartState
from mesh_llm.models.hub.cache import models_directory
from mesh_llm.runtime.asgi import bind
from mesh_llm.runtime.home import Home, explain_os_error
from mesh_llm.runtime.nodes import RunningNode, explain_taken, running_nodes
from mesh_llm.service_manager.control import ServiceStatus
from mesh_llm.service_manager.installation import examine as examine_service
from mesh_llm.service_manager.installation import managers

_LOW_DISK = 5 * 10**9
_LOW_MEMORY = 2 * 10**9
_TRIED = 64 << 10
"""As much as a node writes at its first start."""
_OPEN_TCP = "Requests and split models are faster over TCP. Let it through to the port of `--quic-port` there."


class Verdict(StrEnum):
    """How much a finding matters."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one check: its topic, what was found, and what to do."""

    topic: str
    verdict: Verdict
    text: str
    hint: str = ""


def _ok(topic: str, text: str) -> Finding:
    return Finding(topic=topic, verdict=Verdict.OK, text=text)


def check_python() -> Finding:
    """The interpreter and the system."""
    return _ok("python", f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")


def check_home(home: Home | MeshError) -> list[Finding]:
    """The home exists, and this user can write it and everything in it."""
    if isinstance(home, MeshError):
        return [Finding(topic="home", verdict=Verdict.PROBLEM, text=home.message, hint=home.hint)]
    found = [
        Finding(topic="home", verdict=Verdict.PROBLEM, text=error.message, hint=error.hint)
        for error in _unusable_places(home)
    ]
    if os.name == "posix" and home.root.stat().st_mode & 0o022:
        found.append(
            Finding(
                topic="home",
                verdict=Verdict.WARNING,
                text=f"Other users can write to {home.root}, where the node's key is.",
                hint=f"chmod go-w {home.root}",
            )
        )
    return found or [_ok("home", f"{home.root} is writable")]


def _unusable_places(home: Home) -> list[MeshError]:
    """The first directory or file of the home that a node could not write, as the node's error."""
    for place in (home.root, home.logs, home.cache, home.mesh, *sorted(home.root.iterdir())):
        if place.exists() and not os.access(place, os.W_OK | os.R_OK):
            number = errno.EROFS if os.statvfs(place).f_flag & os.ST_RDONLY else errno.EACCES
            error = OSError(number, os.strerror(number), str(place))
            explained = explain_os_error(error, home.root)
            if explained is not None:
                return [explained]
    try:
        # A full or read-only disk shows only in writing.
        with home.explained(), tempfile.NamedTemporaryFile(dir=home.root) as file:
            file.write(bytes(_TRIED))
            file.flush()
    except MeshError as error:
        return [error]
    return []


def nodes_here(home: Home | MeshError) -> list[RunningNode]:
    """The running nodes of this home; none if the home cannot be read."""
    try:
        return [] if isinstance(home, MeshError) else running_nodes(home)
    except MeshError:
        # Reported by `check_home`.
        return []


def check_ports(home: Home | MeshError) -> list[Finding]:
    """The default ports are free, or used by this home's own nodes."""
    found: list[Finding] = []
    for node in nodes_here(home):
        holder = node.holder
        what = {"client": "a client", "ephemeral": "an ephemeral node"}.get(holder.role, "a node")
        text = f"{what} runs here (pid {holder.pid}): API on {holder.api_port}, console on {holder.console_port}"
        found.append(_ok("ports", text))
    if found:
        return found
    for port, option in ((API_PORT, "--port"), (CONSOLE_PORT, "--console")):
        try:
            bind("127.0.0.1", port, option).close()
        except MeshError as taken:
            known = not isinstance(home, MeshError)
            error = explain_taken(taken, home, "127.0.0.1", port, option) if known else taken
            found.append(Finding(topic="ports", verdict=Verdict.WARNING, text=error.message, hint=error.hint))
        else:
            found.append(_ok("ports", f"port {port} is free"))
    return found


def check_service(services: Sequence[ServiceStatus] | None = None) -> list[Finding]:
    """The installed services of systemd or launchd: none is no problem."""
    found: list[Finding] = []
    for one in [examine_service(one) for one in managers()] if services is None else services:
        if not one.installed:
            continue
        of = "the machine" if one.scope == "system" else "this user"
        if not one.problems:
            found.append(_ok("service", f"a service of {of}: {one.state}{f', {one.text}' if one.text else ''}"))
        found += [
            Finding(topic="service", verdict=Verdict.WARNING, text=problem.text, hint=problem.hint)
            for problem in one.problems
        ]
    return found


def check_disk(home: Home | MeshError) -> list[Finding]:
    """Disk space for logs and models."""
    found: list[Finding] = []
    try:
        models = models_directory()
    except MeshError as error:
        return [Finding(topic="disk", verdict=Verdict.PROBLEM, text=error.message, hint=error.hint)]
    topic = "disk"
    for path in (models,) if isinstance(home, MeshError) else (home.root, models):
        try:
            place = next(parent for parent in (path, *path.parents) if parent.exists())
            free = shutil.disk_usage(place).free
        except OSError as error:
            found.append(
                Finding(
                    topic=topic,
                    verdict=Verdict.PROBLEM,
                    text=f"{path} cannot be looked at: {error.strerror}.",
                    hint="Keep models where this user may: MESH_LLM_MODELS=DIR, or --models-dir DIR.",
                )
            )
            continue
        text = f"{free / 1e9:.1f} GB free at {path}"
        if free < _LOW_DISK:
            found.append(
                Finding(
                    topic=topic,
                    verdict=Verdict.WARNING,
                    text=f"{text}: little for models.",
                    hint="Free some room, or keep models elsewhere: --models-dir DIR.",
                )
            )
        else:
            found.append(_ok(topic, text))
    return found


def check_engines(engines: Sequence[EngineInfo]) -> list[Finding]:
    """Each engine source and its problems."""
    if not any(engine.usable for engine in engines):
        hint = "Install mesh-llm where a wheel of xllamacpp exists, or give your own llama.cpp by --bin-dir."
        return [
            Finding(topic="engine", verdict=Verdict.PROBLEM, text="No llama.cpp engine can run here.", hint=hint),
            *(
                Finding(topic="engine", verdict=Verdict.PROBLEM, text=problem)
                for engine in engines
                for problem in engine.problems
            ),
        ]
    found: list[Finding] = []
    for engine in engines:
        rpc = f", RPC {engine.rpc_version}, {described(engine.confinement)}" if engine.rpc_version else ""
        found.append(_ok("engine", f"{engine.label}{rpc} ({engine.path})"))
        found += [Finding(topic="engine", verdict=Verdict.WARNING, text=problem) for problem in engine.problems]
        found += [_of_accelerator(part) for part in engine.parts if part.name in KINDS]
    return found


def _of_accelerator(part: EnginePart) -> Finding:
    text = f"the {part.name} plugin: {part.text}"
    if part.state is PartState.READY:
        return _ok("engine", text)
    return Finding(topic="engine", verdict=Verdict.WARNING, text=text, hint=part.hint)


def check_devices(
    engines: Sequence[EngineInfo], machine: Callable[[], Machine] = examine_machine, *, serving: bool = False
) -> list[Finding]:
    """The devices that models can use, those that they cannot use, and the free memory.

    `serving`: a node runs here, whose models may fill a GPU.
    """
    found = [
        _ok(
            "devices",
            f"{device.id}: {device.name}" + (f", {device.memory_total / 1e9:.1f} GB" if device.memory_total else ""),
        )
        for engine in engines
        for device in engine.devices
    ]
    known = [device for engine in engines if engine.usable for device in engine.devices]
    here = machine()
    found += [
        Finding(
            topic="devices",
            verdict=Verdict.WARNING,
            text=f"{gpu.name} is here, and no engine that was found can use it.",
            hint=UNUSED_HINT,
        )
        for gpu in unused_gpus(here, known)
    ]
    full = () if serving else filter(None, map(fullness, known))
    problems = (*full, *hidden_cards(here))
    found += [Finding(topic="devices", verdict=Verdict.WARNING, text=problem) for problem in dict.fromkeys(problems)]
    free = psutil.virtual_memory().available
    if free < _LOW_MEMORY:
        found.append(
            Finding(
                topic="memory",
                verdict=Verdict.WARNING,
                text=f"Only {free / 1e9:.1f} GB of memory are free.",
                hint="Close other programs, or serve a smaller model.",
            )
        )
    else:
        found.append(_ok("memory", f"{free / 1e9:.1f} GB of memory are free"))
    return found


def check_network() -> list[Finding]:
    """Loopback works, and other machines can reach this one."""
    found: list[Finding] = []
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.bind(("127.0.0.1", 0))
    except OSError as error:
        found.append(
            Finding(
                topic="network",
                verdict=Verdict.PROBLEM,
                text=f"Loopback does not work: {error.strerror}.",
                hint="Bring it up: ip link set lo up",
            )
        )
    outside = _outside_addresses()
    if outside:
        found.append(_ok("network", f"other machines can try {', '.join(outside)}"))
    else:
        found.append(
            Finding(
                topic="network",
                verdict=Verdict.WARNING,
                text="This machine has no address besides loopback: only nodes on it can be in its mesh.",
                hint="Connect it to a network, if other machines are to join.",
            )
        )
    return found


def check_peers(peers: Sequence[StatusPeer]) -> list[Finding]:
    """What carries requests to each node that a running node is connected with, and why that is not TCP."""
    found: list[Finding] = []
    for peer in peers:
        name = peer.name or peer.node_id[:10]
        if peer.transport == "tcp":
            found.append(_ok("peers", f"{name} is reached over TCP"))
        elif peer.transport:
            way = "through a relay" if peer.transport == "relay" else "over QUIC"
            reason = peer.transport_reason or "TCP is tried with the first request"
            hint = _OPEN_TCP if reason.startswith("TCP") and peer.transport_reason else ""
            text = f"{name} is reached {way}: {reason}"
            found.append(Finding(topic="peers", verdict=Verdict.OK, text=text, hint=hint))
    return found


def _outside_addresses() -> list[str]:
    stats = psutil.net_if_stats()
    return [
        address.address
        for name, addresses in psutil.net_if_addrs().items()
        if name in stats and stats[name].isup
        for address in addresses
        if address.family == socket.AF_INET and not address.address.startswith("127.")
    ]


def examine(home: Home | MeshError, engines: Sequence[EngineInfo]) -> list[Finding]:
    """All checks, in the order of a start. `home`: the home, or why there is none."""
    return [
        check_python(),
        *check_home(home),
        *check_ports(home),
        *check_service(),
        *check_disk(home),
        *check_engines(engines),
        *check_devices(engines, serving=bool(nodes_here(home))),
        *check_network(),
    ]
