"""How long a suspect has to refute before it is dead, and whose word that rests on.

The formula is that of Lifeguard (Dadgar, Phillips, Currey: "Lifeguard: Local Health Awareness for More Accurate Failure
Detection", 2018): the time shrinks from `stretch` times the minimum with the logarithm of independent confirmations.
"""

import math
from dataclasses import dataclass, field

from mesh_llm.core.ids import NodeId
from mesh_llm.core.pace import Pace

_MOST_NAMES = 8


def shortest(pace: Pace, size: int) -> float:
    """Seconds that any suspect is given in a mesh of `size` members."""
    return pace.suspicion * max(1.0, math.log10(max(1, size)))


def allowance(pace: Pace, size: int, confirmations: int) -> float:
    """Seconds from suspicion to death, given how many besides the first accuser say the same.

    Where the mesh is too small for others to confirm, the shortest time holds at once.
    """
    least = shortest(pace, size)
    expected = min(pace.confirmations, size - 2)
    if expected < 1:
        return least
    share = math.log(min(confirmations, expected) + 1) / math.log(expected + 1)
    return least * (pace.stretch - (pace.stretch - 1.0) * share)


@dataclass
class Suspicion:
    """A case against one incarnation of a node.

    Attributes:
        since: when it began here.
        own: this node's own probe of the suspect failed.
        accusers: nodes in whose name it was said.
        witnesses: peers that said so in their own name on their own connection: one liar cannot invent these.
    """

    since: float
    own: bool = False
    accusers: set[NodeId] = field(default_factory=set[NodeId])
    witnesses: set[NodeId] = field(default_factory=set[NodeId])

    def heard(self, accuser: NodeId, teller: NodeId) -> bool:
        """Note that `teller` passed on the word of `accuser`; says whether the accuser is new."""
        if accuser == teller and len(self.witnesses) < _MOST_NAMES:
            self.witnesses.add(teller)
        if accuser in self.accusers or len(self.accusers) >= _MOST_NAMES:
            return False
        self.accusers.add(accuser)
        return True

    def probed(self, me: NodeId) -> bool:
        """Note that this node's own probe failed; says whether that is new."""
        known = self.own
        self.own = True
        self.accusers.add(me)
        return not known

    @property
    def proven(self) -> bool:
        """Whether it rests on more than one other node's word."""
        return self.own or len(self.witnesses) >= 2

    def due(self, pace: Pace, size: int) -> float:
        """When the time to refute is over."""
        return self.since + allowance(pace, size, max(0, len(self.accusers) - 1))
