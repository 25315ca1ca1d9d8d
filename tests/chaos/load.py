"""Steady load of mixed clients, each at some node's own API, and a record of what came of every request."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from tests.chaos.questions import End, Question, Read, error_of, judge, read
from tests.support.http import TruncatedError
from tests.support.node import NodeProcess

from mesh_llm.runtime.supervision import TaskScope

DEADLINE = 90.0
"""By when every request must have ended, whatever happens: twice the time for which a lost host is waited for, and
as much again for a machine that has other work."""


@dataclass
class Asked:
    """One request. `host`: the node that its answer comes from, once known. Times are monotonic."""

    question: Question
    door: int
    began: float
    host: str = ""
    got: Read = field(default_factory=Read)
    end: End | None = None
    why: str = ""
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    ended: float = 0.0
    moved: bool = False


class Load:
    """`clients` askers. `expected`: the undisturbed answers, by question's key.

    `pause`: seconds between two requests of one client, about; None: for as long as the last one took.
    `keeps`: whether requests are recorded in `asked`; a long flood has too many.
    """

    def __init__(
        self,
        nodes: Sequence[NodeProcess],
        questions: Sequence[Question],
        expected: Mapping[tuple[str, str, str, int], str],
        *,
        clients: int,
        pause: float | None,
        seed: int,
        keeps: bool = True,
    ) -> None:
        self._nodes = nodes
        self._questions = questions
        self._expected = expected
        self._clients = clients
        self._pause = pause
        self._random = Random(seed)
        self._keeps = keeps
        self._scope = TaskScope("load", self._failed)
        self._running: list[asyncio.Task[object]] = []
        self._stopping = asyncio.Event()
        self._began = asyncio.Event()
        self.failure: BaseException | None = None
        self.doors: set[int] = set(range(len(nodes)))
        """Nodes whose API is used."""
        self.asked: list[Asked] = []
        self.open: set[int] = set()
        """Indices into `asked` of those that have not ended."""

    def start(self) -> None:
        """Begin to ask."""
        for number in range(self._clients):
            client = self._client(Random(self._random.random()))
            self._running.append(self._scope.spawn(client, f"client {number}"))

    async def stop(self) -> None:
        """Ask nothing more, and wait until everything has ended."""
        self._stopping.set()
        async with asyncio.timeout(DEADLINE + 30):
            await asyncio.gather(*self._running)
        await self._scope.close()

    async def answering(self, node_id: str, timeout: float) -> bool:
        """Wait until a stream comes from a node; False where none did in time."""
        deadline = time.monotonic() + timeout
        while not any(self.asked[index].host == node_id for index in self.open):
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return False
            self._began.clear()
            try:
                async with asyncio.timeout(remaining):
                    await self._began.wait()
            except TimeoutError:
                continue
        return True

    def _failed(self, error: BaseException) -> None:
        self.failure = self.failure or error

    async def _client(self, random: Random) -> None:
        while not self._stopping.is_set():
            door = random.choice(sorted(self.doors))
            asked = await self.ask(random.choice(self._questions), door)
            pause = asked.ended - asked.began if self._pause is None else self._pause
            try:
                async with asyncio.timeout(pause * random.uniform(0.5, 1.5)):
                    await self._stopping.wait()
            except TimeoutError:
                continue

    async def ask(self, question: Question, door: int) -> Asked:
        """Ask once, and record it."""
        asked = Asked(question, door, time.monotonic())
        index = len(self.asked)
        if self._keeps:
            self.asked.append(asked)
            self.open.add(index)
        try:
            async with asyncio.timeout(DEADLINE):
                await self._ask(asked)
        except TimeoutError:
            asked.end, asked.why = End.HUNG, f"nothing more for long, after {len(asked.got.text)} characters"
        except (TruncatedError, OSError, asyncio.IncompleteReadError) as error:
            asked.end, asked.why = End.CUT, f"{type(error).__name__}: {error}"
            if not self._expected[question.key].startswith(asked.got.text):
                asked.end = End.WRONG
        finally:
            asked.ended = time.monotonic()
            self.open.discard(index)
        return asked

    async def _ask(self, asked: Asked) -> None:
        question = asked.question
        client = self._nodes[asked.door].api
        async with client.stream("POST", question.path, json=question.body()) as answer:
            asked.status, asked.headers = answer.status, answer.headers
            asked.host = answer.headers.get("x-mesh-llm-node", "")
            self._began.set()
            if answer.status != 200:
                body = (await answer.read()).body
                message = error_of(question, body)
                asked.end = End.REFUSED if message is not None else End.WRONG
                asked.why = message if message is not None else f"status {answer.status}: {body[:200]!r}"
                return
            await read(question, answer, asked.got)
        asked.end, asked.why = judge(question, asked.got, self._expected[question.key])
