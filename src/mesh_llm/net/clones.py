"""Two machines that live under one key at once, as copied homes and machine images do.

Every process has a session of its own. After a restart the old session is gone for good. Where an earlier session comes
back after a later one, two processes live at once: their connections push each other out, again and again.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

from mesh_llm.core.ids import NodeId

_MOST_NODES = 1024
_MOST_SESSIONS = 4
SAID_AGAIN = 600.0
"""Seconds after which the same finding is worth saying again."""


@dataclass(slots=True)
class _Lives:
    sessions: dict[bytes, str] = field(default_factory=dict[bytes, str])
    """Where each session was last seen, by session; the newest last."""
    said: float = float("-inf")


class CloneWatch:
    """What this node has seen of others' sessions. `now` is monotonic seconds. Bounded."""

    def __init__(self) -> None:
        self._nodes: OrderedDict[NodeId, _Lives] = OrderedDict()

    def seen(self, node: NodeId, session: bytes, address: str, now: float) -> tuple[str, ...]:
        """A peer was admitted. Where its key lives twice: the addresses of both, once in `SAID_AGAIN` seconds."""
        lives = self._nodes.pop(node, None) or _Lives()
        self._nodes[node] = lives
        if len(self._nodes) > _MOST_NODES:
            self._nodes.popitem(last=False)
        back = session in lives.sessions and next(reversed(lives.sessions)) != session
        lives.sessions.pop(session, None)
        lives.sessions[session] = address
        while len(lives.sessions) > _MOST_SESSIONS:
            del lives.sessions[next(iter(lives.sessions))]
        if not back or now - lives.said < SAID_AGAIN:
            return ()
        lives.said = now
        latest = list(lives.sessions.values())[-2:]
        return tuple(dict.fromkeys(latest))

    def cloned(self, node: NodeId, now: float) -> bool:
        """Whether a key was found to live twice within the last `SAID_AGAIN` seconds."""
        lives = self._nodes.get(node)
        return lives is not None and now - lives.said < SAID_AGAIN
