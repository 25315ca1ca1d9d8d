"""Background tasks have owners, and a task that the node needs is started again when it fails.

A `TaskScope` owns tasks; closing it ends them all. Its tasks are of two kinds:

- A job has an end (`spawn`). If it fails, its owner handles that (`on_failure`), or the user sees a notice.
- A service is a task that the node cannot do without (`supervise`). If it fails, it is started again with back-off, and
  the user sees a notice when it fails and when it works again.

The essential tasks. All are services, except that a failure of the driver ends the node with a reason (`core_failed`):

- daemon/driver (daemon/main.py): runs the core, and with it the failure detector
- connections/accept (net/connection_manager.py): accepts connections of other nodes
- mesh/maintenance (net/mesh.py): renews the certificate, follows changes of this machine's addresses
- mesh/tls-accept, mesh/tls-accept-ipv6 (net/tls/listener.py): accept TLS connections of other nodes
- mesh/routes (net/mesh.py): keeps the routing table of a passive node up to date
- engine NAME/watchdog (engine/supervisor.py): ends an engine that is stuck
- api/stream-watchdog (api/server.py): cancels streams whose node is dead
- api/usage (api/server.py): saves what each API key has used
- api/strangers (api/server.py): saves what strangers have used today
- NAME/serve (runtime/asgi.py): accepts clients of the API and the console
- daemon/traffic (daemon/main.py): reports load to the core
- daemon/canaries (daemon/main.py): checks now and then what hosts answer
- prompt-caches/keep MODEL (daemon/prompt_cache.py): saves the slots of an engine when it is idle
- daemon/owner (daemon/owner.py): notices when the machine's owner needs it
- daemon/models and models-watch/DIRECTORY (daemon/main.py, models/library/watch.py): notice new model files
- daemon/engine setup (daemon/main.py): builds what the engine lacks, notices devices and plugins that come and go
- daemon/service manager (daemon/main.py): reports to systemd that the event loop runs, and what the node does
- daemon/migration (daemon/main.py): looks for a better mesh and moves there
- publishing/publish (daemon/listing.py): keeps the mesh's public listing up to date
- listing/RELAY (discovery/nostr/listings.py): sends the listing to one relay
- lan/announce (daemon/lan.py): announces the mesh on the local network
- speed/at rest (daemon/speed_meter.py): measures the machine when it is idle

Each life of a daemon has one `Supervision`, which collects what does not work. Tasks find it by context: see
`use_supervision` and `current_supervision`.
"""

import asyncio
import inspect
import re
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from typing import Any, Self

import msgspec
import structlog

_log = structlog.get_logger(__name__)

_QUIET_SECONDS = 60.0
"""Least time between two reports of the same job or file."""


def _only_log(code: str, text: str) -> None:
    (_log.info if code == "recovered" else _log.warning)(text, code=code)


OnProblem = Callable[[str, str], None]
"""Called with a code and a sentence for the user when a problem begins or ends."""


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """Something that does not work now.

    Attributes:
        what: the service or file, such as `mesh/maintenance` or `daemon.log`.
        text: what is wrong, as a sentence.
        since: seconds, by the supervision's clock.
        times: failures in a row.
    """

    what: str
    text: str
    since: float
    times: int = 1


class Supervision:
    """Keeps the current problems. Reports each when it begins and when it ends."""

    def __init__(self, on_problem: OnProblem = _only_log, clock: Callable[[], float] = time.monotonic) -> None:
        self.on_problem = on_problem
        self._clock = clock
        self._problems: dict[str, Problem] = {}
        self._lost: dict[str, float] = {}
        self._forgotten: dict[str, float] = {}
        self.services: set[str] = set()
        """Names of the running services."""

    @property
    def now(self) -> float:
        """Seconds, by the clock of `Problem.since`."""
        return self._clock()

    @property
    def problems(self) -> tuple[Problem, ...]:
        """The current problems, oldest first."""
        return tuple(sorted(self._problems.values(), key=lambda problem: problem.since))

    def failed(self, service: str, error: BaseException) -> None:
        """Report a service that failed and is started again."""
        self.begin(service, f"{_titled(service)} failed and is started again: {error_text(error)}.", "service_failed")

    def begin(self, what: str, text: str, code: str = "not_written") -> None:
        """Something does not work. It is reported once, until `end`."""
        before = self._problems.get(what)
        since, times = (self._clock(), 1) if before is None else (before.since, before.times + 1)
        self._problems[what] = Problem(what=what, text=text, since=since, times=times)
        if before is None and self._clock() - self._forgotten.pop(what, float("-inf")) > _QUIET_SECONDS:
            self.on_problem(code, text)

    def end(self, what: str, text: str = "", code: str = "recovered") -> None:
        """It works again: report that."""
        if self._problems.pop(what, None) is not None:
            self.on_problem(code, text or f"{_titled(what)} works again.")

    def forget(self, what: str) -> None:
        """It is no longer used, so report nothing. If the problem returns soon, it is not reported again."""
        if self._problems.pop(what, None) is not None:
            self._forgotten[what] = self._clock()

    def lost(self, job: str, error: BaseException) -> None:
        """Report a job that ended by an unexpected error. It is not started again."""
        kind = job.partition("/")[0]
        now = self._clock()
        if now - self._lost.get(kind, float("-inf")) >= _QUIET_SECONDS:
            if len(self._lost) > 64:
                self._lost.clear()
            self._lost[kind] = now
            self.on_problem("task_failed", f"A task ({job}) failed: {error_text(error)}. The log has the details.")


class WriteHealth:
    """Reports when a file, or a kind of file, cannot be written, and when it can be written again.

    As thread-safe as the supervision's `on_problem`.
    """

    def __init__(self, what: str, lost: str) -> None:
        """`what`: a name, such as `the journal`; `lost`: a sentence about the consequence for the user."""
        self._what = what
        self._lost = lost
        self._supervision = current_supervision()
        self.failing = False

    def failed(self, error: BaseException) -> None:
        """The file could not be written."""
        self.failing = True
        self._supervision.begin(
            self._what, f"{_titled(self._what)} cannot be written: {error_text(error)}. {self._lost}"
        )

    def wrote(self) -> None:
        """The file was written."""
        if self.failing:
            self.failing = False
            self._supervision.end(self._what, f"{_titled(self._what)} can be written again.")

    def close(self) -> None:
        """The file is no longer used."""
        if self.failing:
            self.failing = False
            self._supervision.forget(self._what)


def error_text(error: BaseException) -> str:
    """An error's text for people, without a full stop at its end."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).rstrip(".") or type(error).__name__


def _titled(what: str) -> str:
    return what[:1].upper() + what[1:]


_current: ContextVar[Supervision | None] = ContextVar("supervision", default=None)


def use_supervision(supervision: Supervision | None) -> None:
    """Set where this task and its descendants report from now on; None: to the log only."""
    _current.set(supervision)


def current_supervision() -> Supervision:
    """The supervision of this task; outside of a daemon one that only logs."""
    return _current.get() or Supervision()


OnFailure = Callable[[BaseException], None]
Service = Callable[[], Coroutine[Any, Any, object]]

FIRST_PAUSE = 0.1
LONGEST_PAUSE = 10.0
"""Most seconds before a failed service is started again. The pause doubles with each failure in a row."""
WELL_AFTER = 15.0
"""A service that runs for so many seconds works again."""


class TaskScope:
    """Owns background tasks. A job that fails does not affect the others.

    Use it as an async context manager, or call `close()`: that cancels the tasks and waits for them.
    """

    def __init__(self, name: str, on_failure: OnFailure | None = None) -> None:
        """`on_failure`: called with the error of a job that fails; None: the supervision reports it."""
        self._name = name
        self._on_failure = on_failure
        self._supervision = current_supervision()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ending: set[asyncio.Task[Any]] = set()
        self._services: dict[asyncio.Task[Any], tuple[Service, str]] = {}
        self._handlers: dict[asyncio.Task[Any], OnFailure] = {}
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether `close` was called, so that no task can be started."""
        return self._closed

    def spawn(
        self, coroutine: Coroutine[Any, Any, object], name: str, on_failure: OnFailure | None = None
    ) -> asyncio.Task[Any]:
        """Start a job; `on_failure` replaces the scope's own. Raises RuntimeError after `close()`."""
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
        """Run a service: whenever it fails, start it again after a growing pause.

        `service` is called for each start. The returned task ends when the service returns, or with the scope.
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
        """Run a service once. Returns its error; None if it returned."""
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
            # The supervisor itself failed, for example because memory ran out.
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

        Each task is cancelled only once: a second cancellation would interrupt its cleanup.
        """
        self._closed = True
        current = asyncio.current_task()
        tasks = [task for task in self._tasks if task is not current]
        for task in tasks:
            if task not in self._ending:
                self._ending.add(task)
                task.cancel()
        if tasks:
            # Not gather: if it is cancelled, it cancels the tasks a second time.
            await asyncio.wait(tasks)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


_WORD = re.compile(r"[a-z]+")


def task_kinds() -> Counter[str]:
    """How many tasks of the running loop there are, by kind.

    A kind is the first word of the scope's name (`task` without a scope), and the coroutine: `peer
    PeerConnection._serve_one`. So it holds nothing about models or nodes, and there are only as many as the code has.
    """
    return Counter(_kind(task) for task in asyncio.all_tasks())


def _kind(task: asyncio.Task[Any]) -> str:
    scope = _WORD.match(task.get_name())
    coroutine = task.get_coro()
    what = coroutine.__qualname__ if inspect.iscoroutine(coroutine) else type(coroutine).__name__
    return f"{scope[0] if scope is not None else 'task'} {what}"


async def wait_for_event(event: asyncio.Event, seconds: float | None) -> bool:
    """Wait until an event is set, at most this long (None: for ever). Returns whether it was set."""
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return event.is_set()
