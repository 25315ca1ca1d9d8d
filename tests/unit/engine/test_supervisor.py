"""How engines end: crashes, kills from outside, and an engine whose task queue gives no answer."""

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from tests.integration.engine_fixtures import logged

from mesh_llm.core.types.ports import EngineEnd
from mesh_llm.engine import probe
from mesh_llm.engine import supervisor as supervisor_module
from mesh_llm.engine.devices import oom_kills
from mesh_llm.engine.probe import FLOOR_TOKENS_PER_SECOND, stuck_seconds, until_stuck
from mesh_llm.engine.process import Command
from mesh_llm.engine.supervisor import EngineReadyInfo, Exit, RunningEngine, Supervisor, refused_memory
from mesh_llm.runtime.supervision import Supervision, TaskScope, use_supervision

PERIODS = 20


def test_the_limit_leaves_a_slow_batch_its_time() -> None:
    assert stuck_seconds(1) == stuck_seconds(512) == 300.0
    assert stuck_seconds(2048) == 2048 / FLOOR_TOKENS_PER_SECOND > 1000
    assert stuck_seconds(32_768) * FLOOR_TOKENS_PER_SECOND == 32_768


class Queue:
    """An engine's queue, and the time. `answers_at`: by question, the step at which it is answered; 0 for never."""

    def __init__(self, *answers_at: int) -> None:
        self._answers_at = list(answers_at)
        self.seconds = 0.0
        self.questions: list[asyncio.Task[object]] = []
        self.asked = asyncio.Event()
        self._open: list[asyncio.Event] = []
        self._steps = 0

    def ask(self) -> asyncio.Task[object]:
        self._open.append(asyncio.Event())
        self._steps = 0
        self.questions.append(asyncio.get_running_loop().create_task(self._open[-1].wait()))
        self.asked.set()
        return self.questions[-1]

    async def wait(self, task: asyncio.Task[object] | None, seconds: float) -> None:
        self.seconds += seconds
        self._steps += 1
        if task is not None and self._steps == self._answers_at[len(self._open) - 1]:
            self._open[-1].set()
            await task


async def test_it_waits_for_the_whole_limit_anew_after_each_answer() -> None:
    queue = Queue(1, PERIODS, PERIODS - 1, 0)
    await until_stuck(queue.ask, 100.0, queue.wait)
    step = 100.0 / PERIODS
    # Four questions, the last of them without an answer, and a pause before each.
    assert queue.seconds == pytest.approx(step + 100.0 + (100.0 - step) + 100.0 + 4 * step)
    await asyncio.gather(*queue.questions, return_exceptions=True)
    assert [one.cancelled() for one in queue.questions] == [False, False, False, True]


async def test_it_leaves_no_question_open_when_it_ends() -> None:
    queue = Queue(0)
    async with TaskScope("test") as scope:
        scope.spawn(until_stuck(queue.ask, 1.0), "watch")
        await queue.asked.wait()
    await asyncio.gather(*queue.questions, return_exceptions=True)
    assert queue.questions[0].cancelled()


STAND_IN = """
import http.server, itertools, threading
numbers = itertools.count(1)
hung = threading.Event()
PROPS = b'{"default_generation_settings":{"n_ctx":512},"total_slots":1}'
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/hang":
            hung.set()
        if self.path == "/metrics" and hung.is_set():
            threading.Event().wait()
        body = PROPS if self.path == "/props" else b"{}"
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        if self.path == "/metrics":
            print(f"question {next(numbers)};", flush=True)
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(f"listening on 127.0.0.1:{server.server_port}", flush=True)
server.serve_forever()
"""


async def stand_in(supervisor: Supervisor, limit: float) -> tuple[RunningEngine, str]:
    command = Command(argv=(sys.executable, "-c", STAND_IN), stuck_seconds=limit)
    engine = await supervisor.launch(command, "stand-in")
    ready = await engine.ready()
    assert isinstance(ready, EngineReadyInfo)
    return engine, ready.address


async def with_stand_in(tmp_path: Path, limit: float, check: Callable[[RunningEngine, str], Awaitable[None]]) -> None:
    supervisor = Supervisor(tmp_path)
    try:
        async with asyncio.timeout(30):
            await check(*await stand_in(supervisor, limit))
    finally:
        await supervisor.close()


async def test_an_engine_whose_queue_hangs_is_ended_and_that_is_a_crash(tmp_path: Path) -> None:
    async def check(engine: RunningEngine, address: str) -> None:
        assert await probe.get(address, "/hang") is not None
        assert await probe.is_healthy(address)
        ended = await engine.wait()
        assert (ended.code, ended.stuck, ended.asked) == (-signal.SIGKILL, True, False)
        assert ended.end is EngineEnd.CRASHED
        assert ended.reason.startswith("it was stuck: its task queue gave no answer for 0.5 s")

    await with_stand_in(tmp_path, 0.5, check)


async def test_one_that_answers_is_asked_on_and_on_and_stops_as_ever(tmp_path: Path) -> None:
    async def check(engine: RunningEngine, _address: str) -> None:
        await logged(engine, "question 3;")
        assert engine.running
        ended = await engine.stop()
        assert (ended.stuck, ended.asked, ended.reason) == (False, True, "stopped")

    await with_stand_in(tmp_path, 5.0, check)


@pytest.mark.parametrize(("asked", "never_ready"), [(True, False), (False, True)])
def test_one_that_was_to_end_anyway_is_no_crash(asked: bool, never_ready: bool) -> None:
    ended = Exit(code=-signal.SIGKILL, reason="", asked=asked, never_ready=never_ready, stuck=True)
    assert ended.end is EngineEnd.EXPLAINED


def ended(code: int, **more: bool) -> EngineEnd:
    fields: dict[str, Any] = {"never_ready": False, "asked": False, **more}
    return Exit(code=code, reason="", **fields).end


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGSYS])
def test_a_fault_of_its_own_is_a_crash(number: signal.Signals) -> None:
    assert ended(-number) is EngineEnd.CRASHED
    assert ended(-number, out_of_memory=True) is EngineEnd.CRASHED
    assert ended(-number, asked=True) is EngineEnd.EXPLAINED
    assert ended(-number, never_ready=True) is EngineEnd.EXPLAINED


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_who_is_killed_from_outside_is_not_to_blame(number: signal.Signals) -> None:
    assert ended(-number) is EngineEnd.EXPLAINED


def test_want_of_memory_is_told_apart() -> None:
    assert ended(-signal.SIGKILL, out_of_memory=True) is EngineEnd.OUT_OF_MEMORY
    assert ended(-signal.SIGTERM, out_of_memory=True) is EngineEnd.EXPLAINED
    assert ended(1) is EngineEnd.CRASHED
    assert ended(0) is EngineEnd.EXPLAINED


def test_kills_for_memory_are_counted(tmp_path: Path) -> None:
    assert oom_kills(tmp_path / "proc", tmp_path / "groups") == 0
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "vmstat").write_text("pgfault 5\noom_kill 3\n")
    assert oom_kills(tmp_path / "proc", tmp_path / "groups") == 3


async def test_a_watchdog_that_fails_is_restarted_and_the_engine_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems: list[str] = []
    reported = asyncio.Event()

    def on_problem(code: str, _text: str) -> None:
        problems.append(code)
        reported.set()

    failures = 1

    async def failing(address: str, path: str, timeout: float, key: str) -> object:
        nonlocal failures
        if failures:
            failures -= 1
            raise RuntimeError("a fault of the watchdog")
        return await probe.get(address, path, timeout, key)

    monkeypatch.setattr(supervisor_module, "get", failing)

    async def check(engine: RunningEngine, address: str) -> None:
        await reported.wait()
        assert problems == ["service_failed"]
        await logged(engine, "question 2;")
        assert engine.running
        # The second one still ends an engine that hangs.
        assert await probe.get(address, "/hang") is not None
        assert (await engine.wait()).stuck

    use_supervision(Supervision(on_problem))
    try:
        await with_stand_in(tmp_path, 2.0, check)
    finally:
        use_supervision(None)


@pytest.mark.parametrize(
    ("line", "refused"),
    [
        ("llama_model_load: error loading model: unable to allocate Vulkan0 buffer", "Vulkan0"),
        ("ggml_gallocr_reserve_n_impl: failed to allocate CUDA0 buffer of size 9876543210", "CUDA0"),
        ("alloc_tensor_range: failed to allocate CPU buffer of size 12345", "CPU"),
        ("alloc_buffer: allocating 9.00 MiB on device 0: cudaMalloc failed: out of memory", "device"),
        ("ggml_vulkan: vk::Device::allocateMemory: ErrorOutOfDeviceMemory", "device"),
        ("failed to allocate buffer for kv cache", "device"),
        ("llama_init_from_model: failed to initialize the context: failed to allocate compute pp buffers", "device"),
        ("error: unknown model architecture: 'x'", ""),
        ("llama_kv_cache: CUDA0 KV buffer size = 512.00 MiB", ""),
    ],
)  # fmt: skip
def test_memory_that_a_device_refuses_is_recognised(line: str, refused: str) -> None:
    assert refused_memory(line) == refused


async def test_an_engine_that_got_no_memory_says_which(tmp_path: Path) -> None:
    told = "printf 'llama_model_load: error: unable to allocate Vulkan0 buffer\\n'; seq 100; exit 1"
    engine = RunningEngine(Command(argv=("/bin/sh", "-c", told)), tmp_path / "engine.log")
    await engine.start()
    ended = await engine.ready()
    assert isinstance(ended, Exit)
    assert (ended.code, ended.never_ready, ended.refused) == (1, True, "Vulkan0")
