"""What the front door remembers, with the names that people call nodes by. Satisfies core.console_ports.Activity."""

from collections.abc import Callable

import msgspec

from mesh_llm.api.decisions import DecisionBook
from mesh_llm.core.console_values import Decision, History
from mesh_llm.core.ids import NodeId


class FrontActivity:
    """`name_of`: what a node is called."""

    def __init__(self, book: DecisionBook, name_of: Callable[[NodeId], str]) -> None:
        self._book = book
        self._name_of = name_of

    def decisions(self, after: int, limit: int) -> list[Decision]:
        """Those with an id above `after`, newest first."""
        names: dict[str, str] = {}

        def named(decision: Decision) -> Decision:
            for target in decision.targets:
                if target.node_id not in names:
                    names[target.node_id] = self._name_of(NodeId(target.node_id))
            targets = tuple(msgspec.structs.replace(one, name=names[one.node_id]) for one in decision.targets)
            return msgspec.structs.replace(decision, targets=targets)

        return [named(decision) for decision in self._book.after(after, limit)]

    def history(self) -> History:
        """The last hour."""
        return self._book.hour.history()
