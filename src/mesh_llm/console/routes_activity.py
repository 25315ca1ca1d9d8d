"""Calls about the front door's requests: how they were routed and why, and the last hour in numbers."""

from mesh_llm.console.call import Access, Asked, Call, Desk, Integer, part
from mesh_llm.core.console_values import Decisions, History

_AFTER = Integer(name="after", text="Only those with a higher id.", lowest=0, highest=2**53, default=0)
_LIMIT = Integer(name="limit", text="At most so many of the newest.", lowest=1, highest=1000, default=100)


async def _routing(desk: Desk, asked: Asked) -> Decisions:
    activity = part(desk.parts.activity, "front door")
    return Decisions(decisions=tuple(activity.decisions(asked.integer(_AFTER) or 0, asked.integer(_LIMIT) or 1)))


async def _history(desk: Desk, _: Asked) -> History:
    return part(desk.parts.activity, "front door").history()


CALLS = (
    Call(
        method="GET",
        path="/api/routing",
        name="routing",
        summary="How the last requests were routed, why, and what came of them; newest first.",
        handler=_routing,
        answer=Decisions,
        access=Access.READ,
        query=(_AFTER, _LIMIT),
    ),
    Call(
        method="GET",
        path="/api/history",
        name="history",
        summary="Requests, tokens and latencies of the last hour, a bucket a minute.",
        handler=_history,
        answer=History,
    ),
)
