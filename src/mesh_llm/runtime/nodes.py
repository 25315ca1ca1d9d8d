"""The nodes that run with one home, and who has a port that a node wants."""

import errno
import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mesh_llm.core.types.errors import MeshError
from mesh_llm.runtime.home import Holder, Home
from mesh_llm.runtime.local_socket import find_node

if TYPE_CHECKING:
    import psutil

_MOST_TRIES = 50


@dataclass(frozen=True)
class RunningNode:
    """A node that runs. `home`: its place; a guest's is within the home."""

    home: Home
    holder: Holder

    @property
    def described(self) -> str:
        """What it is, for people."""
        what = {"client": "a client", "ephemeral": "an ephemeral node"}.get(self.holder.role, "the serving node")
        return f"{what}, API on port {self.holder.api_port}" if self.holder.api_port else f"{what}, which is starting"


def running_nodes(home: Home) -> list[RunningNode]:
    """The nodes that answer on the sockets of a home: the one that locks it first, then its guests.

    Raises:
        MeshError: `home_unusable`.
    """
    shared = Home(home.shared)
    found: list[RunningNode] = []
    for place in (shared, *shared.guests()):
        holder = place.holder()
        # A record alone is no node: its process may have another program's number by now.
        peer = find_node(place)
        if peer is not None and holder is not None:
            found.append(RunningNode(place, holder))
        elif peer is not None:
            found.append(RunningNode(place, Holder(pid=peer.pid, api_port=0, console_port=0, started=0.0)))
    return found


def explain_taken(
    error: MeshError, home: Home, host: str, port: int, option: str, *others: tuple[str, int]
) -> MeshError:
    """A `port_in_use` that says who has the port, and names a free one; any other error as it is.

    `others`: the node's other options and ports: free ports are named for those that are taken too.
    """
    if error.code != "port_in_use":
        return error
    who, stop = _user_of(port, home)
    free = [(option, free_port(host, port))]
    free += [(name, found) for name, wanted in others if wanted and (found := free_port(host, wanted - 1)) != wanted]
    hint = f"Take {'other ports' if len(free) > 1 else 'another port'}: "
    hint += " ".join(f"{name} {found or 'PORT'}" for name, found in free)
    hint += f". Or stop that node: {stop}" if stop else ", or end the program that uses it."
    return MeshError(code=error.code, message=f"Port {port} is used by {who}.", hint=hint, status=error.status)


def _user_of(port: int, home: Home) -> tuple[str, str]:
    """Who listens on a port, and the command that stops it if it is a node of this user."""
    for node in running_nodes(home):
        if port in {node.holder.api_port, node.holder.console_port}:
            of = "the console of " if port == node.holder.console_port else ""
            select = f" --port {node.holder.api_port}" if node.home.is_guest else ""
            return f"{of}{node.described} (pid {node.holder.pid})", f"mesh-llm stop{select}"
    owner = _listener(port)
    if owner is None:
        return "another user's program", ""
    other = _home_of(owner)
    if other:
        return f"a node of yours with the home {other} (pid {owner.pid})", f"MESH_LLM_HOME={other} mesh-llm stop"
    return f"{owner.name()} (pid {owner.pid})", ""


def free_port(host: str, after: int) -> int:
    """The first free TCP port above this one; 0, for any, if the next ones are all taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in range(after + 1, min(after + _MOST_TRIES, 65536)):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
                # Without it, the port of a listener with SO_REUSEADDR can be bound.
                probe.listen(1)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    continue
                break
            return port
    return 0


def _listener(port: int) -> "psutil.Process | None":
    """The process of this user that listens on a TCP port; None if there is none, or the system does not say."""
    import psutil

    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status != psutil.CONN_LISTEN or not connection.pid:
                continue
            if tuple(connection.laddr)[1:2] == (port,):
                return psutil.Process(connection.pid)
    except psutil.Error:
        return None
    return None


def _home_of(process: "psutil.Process") -> str:
    """The home of a process if it is a node of this user; empty if it is something else."""
    import psutil

    try:
        words = [os.path.basename(word) for word in process.cmdline()[:3]]  # noqa: PTH119 - words, not files
        if "mesh_llm" not in words and "mesh-llm" not in words:
            return ""
        environment = process.environ()
    except psutil.Error:
        return ""
    return environment.get("MESH_LLM_HOME") or os.path.join(environment.get("HOME", "~"), ".mesh-llm")  # noqa: PTH118
