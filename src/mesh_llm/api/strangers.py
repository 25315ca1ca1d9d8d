"""Requests of strangers: they are counted, kept to their quotas, and cut off when they misuse the node.

`core.trust.strangers` decides. Who is a stranger, and where it comes from, the daemon knows. What was used today is
kept over a restart, in a file that is bounded and may be damaged.
"""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import structlog

from mesh_llm.api.errors import stranger_cut_off, stranger_quota
from mesh_llm.api.request import Request
from mesh_llm.api.telemetry import CLIENT_GONE, RequestTrace
from mesh_llm.api.types import StrangerUsage, StrangerUse
from mesh_llm.api.usage import utc_day
from mesh_llm.core.trust.strangers import CutOff, Misconduct, Quota, StrangerLimits, StrangerQuotas, UsedToday
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import NodeId
from mesh_llm.runtime.state_file import StateFile, read_state

_MAX_FILE = 1024 * 1024
_ABOUT = "what strangers have used"
_RETRY_CONCURRENT = 2.0
_SHOWN = 8
_MALFORMED = frozenset({400, 408, 411, 413, 414, 415, 431})
_MALFORMED_POINTS, _REFUSED_POINTS = 1.0, 0.1
_log = structlog.get_logger(__name__)


class Strangers:
    """All requests of strangers to this node.

    Attributes:
        source_of: the address of a node that is a stranger; None: it is none.
        cut_off: gets who is cut off, and why.
        file: keeps what was used today.
    """

    def __init__(
        self,
        limits: StrangerLimits,
        file: Path | None,
        clock: Callable[[], float],
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """`file`: where what was used today is kept; None: in memory only. `wall_clock`: UNIX seconds."""
        self.source_of: Callable[[NodeId], str | None] = lambda _: None
        self.cut_off: Callable[[CutOff, str], None] = lambda _who, _why: None
        self.file = StateFile(file, _ABOUT, self._to_save)
        self._clock = clock
        self._wall_clock = wall_clock
        self._quotas = StrangerQuotas(limits, read_used(file))
        self._misconduct = Misconduct()
        self._refused = 0
        self._refused_day = self._day

    def use_limits(self, limits: StrangerLimits) -> None:
        """Keep to these quotas from now on."""
        self._quotas.limits = limits

    def know(self, request: Request) -> None:
        """Note on a request whether a stranger sends it, and where that comes from."""
        if request.peer is not None:
            request.stranger = self.source_of(request.peer)

    def check(self, request: Request) -> None:
        """Refuse a request of a stranger that is cut off.

        Raises:
            MeshError: `stranger_cut_off` (429).
        """
        if request.peer is None or request.stranger is None:
            return
        left = self._misconduct.seconds_left(request.peer, request.stranger, self._clock())
        if left > 0.0:
            raise stranger_cut_off(left)

    @contextmanager
    def admit(self, request: Request) -> Generator[None]:
        """Let a request in for as long as the block lasts. One that is no stranger's is not counted.

        Raises:
            MeshError: a `Quota` as its code (429).
        """
        node, source = request.peer, request.stranger
        if node is None or source is None:
            yield
            return
        reached = self._quotas.begin(node, source, self._day)
        if reached is not None:
            left = utc_day(self._wall_clock()).left
            by_day = reached in {Quota.TOKENS, Quota.ALL_TOKENS}
            raise stranger_quota(reached, self._quotas.limits, left if by_day else _RETRY_CONCURRENT)
        try:
            yield
        finally:
            self._quotas.end(node, source)

    def ended(self, request: Request, trace: RequestTrace) -> None:
        """A request for a model has ended. One that is left before its answer begins counts by an estimate."""
        if request.peer is None or request.stranger is None:
            return
        prompt, generated = trace.tokens()
        if trace.status == CLIENT_GONE:
            prompt = max(prompt, trace.prompt_estimate)
        if prompt + generated > 0:
            self._quotas.used(request.peer, request.stranger, self._day, prompt + generated)
            self.file.changed()

    def refused(self, request: Request, error: MeshError) -> None:
        """A request was refused. One that is malformed counts most; many others are a flood."""
        if request.peer is None or request.stranger is None or error.status >= 500:
            return
        if self._refused_day != self._day:
            self._refused, self._refused_day = 0, self._day
        self._refused += 1
        if error.code != "stranger_cut_off":
            self.blame(request.peer, request.stranger, malformed=error.status in _MALFORMED)

    def blame(self, node: NodeId, source: str, *, malformed: bool) -> None:
        """A stranger sent what is no request (`malformed`), or one that was refused."""
        points = _MALFORMED_POINTS if malformed else _REFUSED_POINTS
        for cut in self._misconduct.blame(node, source, points, self._clock()):
            why = "it sent malformed requests" if malformed else "it sent too many requests that were refused"
            _log.warning("a stranger is cut off", who=cut.who[:40], seconds=round(cut.seconds), reason=why)
            self.cut_off(cut, why)

    def usage(self) -> StrangerUsage:
        """What strangers have used today, and the quotas."""
        used, limits = self._quotas.today(self._day), self._quotas.limits
        most = sorted(used.nodes.items(), key=lambda one: (-one[1], one[0]))
        return StrangerUsage(
            running=self._quotas.running,
            nodes=len(used.nodes),
            tokens_today=used.total,
            refused_today=self._refused if self._refused_day == self._day else 0,
            most=tuple(StrangerUse(node_id=node, tokens_today=tokens) for node, tokens in most[:_SHOWN]),
            concurrent=limits.concurrent,
            tokens_per_day=limits.tokens_per_day,
            all_concurrent=limits.all_concurrent,
            all_tokens_per_day=limits.all_tokens_per_day,
        )

    def _to_save(self) -> UsedToday | None:
        used = self._quotas.today(self._day)
        return used if used.total else None

    @property
    def _day(self) -> int:
        return utc_day(self._wall_clock()).number


def read_used(file: Path | None) -> UsedToday:
    """What was saved; nothing if it cannot be read."""
    return read_state(file, UsedToday, _MAX_FILE, _ABOUT)[0] or UsedToday()
