"""When a node starts its next exchange, and with whom: every member once per round, in an order nobody can guess."""

from mesh_llm.core.ids import NodeId
from mesh_llm.core.roster import NOBODY, Alarm, Roster

_JITTER = 0.2
_SMALL = 32
_CHEAPEST = 0.25


class Steps:
    """A fixed average rate. Urgent news may borrow a few steps from the future; they are paid back by waiting."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._round: list[NodeId] = []
        self._regular = 0.0
        self._last = float("-inf")
        self._hurry = 0

    def begin(self, now: float) -> None:
        """Start stepping, out of step with others that start at the same time."""
        self._regular = now + self._roster.chance.random() * self._roster.pace.step
        self._roster.alarm(Alarm.STEP, self._regular)

    def urgent(self, now: float) -> None:
        """There is news that should not wait for the next regular steps."""
        self._hurry = min(self._roster.pace.burst, len(self._roster.contacts))
        self._hasten(now)

    def _hasten(self, now: float) -> None:
        pace = self._roster.pace
        if self._hurry == 0 or not self._roster.contacts or self._regular - now > pace.burst * pace.step:
            return
        soon = max(now, self._last + pace.spacing)
        due = self._roster.timers.at((Alarm.STEP, NOBODY))
        if due is None or soon < due:
            self._roster.alarm(Alarm.STEP, soon)

    def catch_up(self, now: float) -> None:
        """The last answer was full of news, and there may be more: go on asking. What is lacking bounds this."""
        self._regular = now + self._roster.pace.spacing
        self._roster.alarm(Alarm.STEP, self._regular)

    def joined(self, node: NodeId, now: float) -> None:
        """A new member takes part in the present round. A node that was alone takes steps again."""
        if (Alarm.STEP, NOBODY) not in self._roster.timers:
            self.begin(now)
        place = int(self._roster.chance.random() * (len(self._round) + 1))
        self._round.insert(place, node)

    def next(self, now: float) -> NodeId | None:
        """Take a step: schedule the one after it, and return whom to talk to; None while alone."""
        pace = self._roster.pace
        if not self._roster.contacts:
            return None
        self._last = now
        jitter = 1.0 + _JITTER * (2.0 * self._roster.chance.random() - 1.0)
        # In a small mesh a step ahead of its time costs little, and watching must not pause for it.
        early = now < self._regular
        price = min(1.0, max(_CHEAPEST, len(self._roster.contacts) / _SMALL)) if early else 1.0
        self._regular = max(self._regular, now - pace.step) + pace.step * jitter * price
        self._roster.alarm(Alarm.STEP, max(self._regular, now + pace.spacing))
        self._hurry = max(0, self._hurry - 1)
        self._hasten(now)
        contacts = self._roster.contacts
        while True:
            while self._round:
                node = self._round.pop()
                if node in contacts:
                    return node
            self._round = list(contacts)
            self._roster.chance.shuffle(self._round)
