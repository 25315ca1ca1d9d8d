"""What is wrong with a running node: services that fail and are started again, and files that cannot be written.

There is one `Supervision` for each life of a daemon. It is found by context, so that every task of that life reports
to it without being handed it: `use` sets it, `current` finds it.
"""

import time
from collections.abc import Callable
from contextvars import ContextVar

import msgspec
import structlog

_log = structlog.get_logger(__name__)

_QUIET_SECONDS = 60.0
"""A job or file of one name that fails again and again, each time anew, is reported so often at most."""


def _only_log(code: str, text: str) -> None:
    (_log.info if code == "recovered" else _log.warning)(text, code=code)


OnProblem = Callable[[str, str], None]
"""Called with a code and a sentence for the user, once for each problem that begins or ends."""


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """Something that does not work at present.

    Attributes:
        what: the service or file, as in `mesh/watch` or `daemon.log`.
        text: what is wrong with it, a sentence.
        since: seconds, by the supervision's clock.
        times: how often it failed in a row.
    """

    what: str
    text: str
    since: float
    times: int = 1


class Supervision:
    """Keeps the problems there are, and reports each once when it begins and once when it is over."""

    def __init__(self, on_problem: OnProblem = _only_log, clock: Callable[[], float] = time.monotonic) -> None:
        self.on_problem = on_problem
        self._clock = clock
        self._problems: dict[str, Problem] = {}
        self._lost: dict[str, float] = {}
        self._forgotten: dict[str, float] = {}
        self.services: set[str] = set()
        """Names of the supervised tasks that run."""

    @property
    def now(self) -> float:
        """By the clock that `Problem.since` goes by."""
        return self._clock()

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Those that there are now, the oldest first."""
        return tuple(sorted(self._problems.values(), key=lambda problem: problem.since))

    def failed(self, service: str, error: BaseException) -> None:
        """A service failed, and is started again after a pause."""
        self.begin(service, f"{_titled(service)} failed and is started again: {why(error)}.", "service_failed")

    def begin(self, what: str, text: str, code: str = "not_written") -> None:
        """Something does not work; said once until `end`."""
        before = self._problems.get(what)
        since, times = (self._clock(), 1) if before is None else (before.since, before.times + 1)
        self._problems[what] = Problem(what=what, text=text, since=since, times=times)
        if before is None and self._clock() - self._forgotten.pop(what, float("-inf")) > _QUIET_SECONDS:
            self.on_problem(code, text)

    def end(self, what: str, text: str = "", code: str = "recovered") -> None:
        """It works again."""
        if self._problems.pop(what, None) is not None:
            self.on_problem(code, text or f"{_titled(what)} works again.")

    def forget(self, what: str) -> None:
        """It is not used any more, whether it works or not. Where it comes back soon, it is not said again."""
        if self._problems.pop(what, None) is not None:
            self._forgotten[what] = self._clock()

    def lost(self, job: str, error: BaseException) -> None:
        """A job ended by an error that nobody expected; it is not done again, and its owner has been told."""
        kind = job.partition("/")[0]
        now = self._clock()
        if now - self._lost.get(kind, float("-inf")) >= _QUIET_SECONDS:
            if len(self._lost) > 64:
                self._lost.clear()
            self._lost[kind] = now
            self.on_problem("task_failed", f"A task ({job}) failed: {why(error)}. The log has the details.")


class WriteHealth:
    """Whether one file, or one kind of file, can be written: said once when it cannot, and once when it can again.

    From any thread, as far as the supervision's `on_problem` allows it.
    """

    def __init__(self, what: str, lost: str) -> None:
        """`what` names it, as in `the journal`; `lost` is a sentence of what that means for the user."""
        self._what = what
        self._lost = lost
        self._supervision = current()
        self.failing = False

    def failed(self, error: BaseException) -> None:
        """It could not be written."""
        self.failing = True
        self._supervision.begin(self._what, f"{_titled(self._what)} cannot be written: {why(error)}. {self._lost}")

    def wrote(self) -> None:
        """It was written."""
        if self.failing:
            self.failing = False
            self._supervision.end(self._what, f"{_titled(self._what)} can be written again.")

    def close(self) -> None:
        """It is not written any more."""
        if self.failing:
            self.failing = False
            self._supervision.forget(self._what)


def why(error: BaseException) -> str:
    """Why, for people: without the full stop at its end."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).rstrip(".") or type(error).__name__


def _titled(what: str) -> str:
    return what[:1].upper() + what[1:]


_current: ContextVar[Supervision | None] = ContextVar("supervision", default=None)


def use(supervision: Supervision | None) -> None:
    """What this task makes from now on, and all tasks that come of it, reports there; None: to the log only."""
    _current.set(supervision)


def current() -> Supervision:
    """Where to report; outside of a daemon, to the log only."""
    return _current.get() or Supervision()
