"""What is wrong with a running node: services that fail and are started again, and files that cannot be written.

There is one `Supervision` for each life of a daemon. It is found by context, so that every task of that life reports
to it without being handed it: `use` sets it, `current` finds it.

Tasks with an owner: a failure is never lost, and closing the scope ends them all.

A task is either a job, which has an end (`spawn`), or a service, which the node cannot do without (`supervise`). A
service that fails is started again; what fails is reported to the daemon's `Supervision`.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from typing import Any, Self

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
        what: the service or file, as in `mesh/maintenance` or `daemon.log`.
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


OnFailure = Callable[[BaseException], None]
Service = Callable[[], Coroutine[Any, Any, object]]

FIRST_PAUSE = 0.1
LONGEST_PAUSE = 10.0
"""Seconds before a service that failed is started again: doubled at each failure in a row."""
WELL_AFTER = 15.0
"""Seconds after which a service that was started again counts as well."""


class TaskScope:
    """Owns background tasks. A job that fails is logged, and reported to `on_failure`; the others go on.

    Use as an async context manager, or call `close()`: it cancels what still runs and waits for it.
    """

    def __init__(self, name: str, on_failure: OnFailure | None = None) -> None:
        """`on_failure`: told of each job that fails, by the error; without it the daemon's supervision is."""
        self._name = name
        self._on_failure = on_failure
        self._supervision = current()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ending: set[asyncio.Task[Any]] = set()
        self._services: dict[asyncio.Task[Any], tuple[Service, str]] = {}
        self._handlers: dict[asyncio.Task[Any], OnFailure] = {}
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether it takes no more tasks."""
        return self._closed

    def spawn(
        self, coroutine: Coroutine[Any, Any, object], name: str, on_failure: OnFailure | None = None
    ) -> asyncio.Task[Any]:
        """Start a job; `on_failure` stands for the scope's own. Raises RuntimeError after `close()`."""
        if self._closed:
            coroutine.close()
            msg = f"task scope {self._name} is closed"
            raise RuntimeError(msg)
        task = asyncio.get_running_loop().create_task(coroutine, name=f"{self._name}/{name}")
        self._tasks.add(task)
        if on_failure is not None:
            self._handlers[task] = on_failure
        task.add_done_callback(self._done)
        return task

    def supervise(self, service: Service, name: str) -> asyncio.Task[Any]:
        """Keep a service running: it is started again, after a growing pause, whenever it fails.

        The returned task ends when the service returns, and with the scope. `service` is called for each start; what
        it has to know of an earlier one is its own affair.
        """
        task = self.spawn(self._keep_running(service, name), f"{name} (supervisor)")
        self._services[task] = (service, name)
        return task

    async def _keep_running(self, service: Service, name: str) -> None:
        loop = asyncio.get_running_loop()
        full = f"{self._name}/{name}"
        self._supervision.services.add(full)
        pause, failing = 0.0, False
        try:
            while True:
                began = loop.time()
                error = await self._run_once(service, full, failing=failing)
                if error is None:
                    return
                failing = True
                well = loop.time() - began >= WELL_AFTER
                pause = FIRST_PAUSE if well or not pause else min(LONGEST_PAUSE, 2 * pause)
                _log.error("service failed", service=full, again_in=round(pause, 1), exc_info=error)
                self._supervision.failed(full, error)
                await asyncio.sleep(pause)
        finally:
            self._supervision.services.discard(full)
            self._supervision.end(full, f"{full} has ended.")

    async def _run_once(self, service: Service, name: str, *, failing: bool) -> BaseException | None:
        """How the service failed; None where it returned."""
        task = asyncio.get_running_loop().create_task(service(), name=name)
        try:
            done, _ = await asyncio.wait({task}, timeout=WELL_AFTER if failing else None)
            if not done:
                self._supervision.end(name)
                await asyncio.wait({task})
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
        return None if task.cancelled() else task.exception()

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        self._ending.discard(task)
        service = self._services.pop(task, None)
        on_failure = self._handlers.pop(task, self._on_failure)
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            return
        _log.error("task failed", task=task.get_name(), exc_info=error)
        if service is not None:
            # Out of memory in the supervisor itself.
            task.get_loop().call_later(LONGEST_PAUSE, self._supervise_again, *service)
        elif on_failure is not None:
            on_failure(error)
        else:
            self._supervision.lost(task.get_name(), error)

    def _supervise_again(self, service: Service, name: str) -> None:
        if not self._closed:
            self.supervise(service, name)

    def __len__(self) -> int:
        return len(self._tasks)

    async def close(self) -> None:
        """Cancel all tasks and wait until they have ended. Idempotent; a task may close its own scope.

        A task is cancelled once, however often and by whom this is called: a second time would hit its tidying up.
        """
        self._closed = True
        current = asyncio.current_task()
        tasks = [task for task in self._tasks if task is not current]
        for task in tasks:
            if task not in self._ending:
                self._ending.add(task)
                task.cancel()
        if tasks:
            # Not gather: cancelled itself, it cancels what it waits for.
            await asyncio.wait(tasks)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
