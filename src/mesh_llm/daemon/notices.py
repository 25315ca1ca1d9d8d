"""What a starting daemon tells whoever watches it: values, so that a terminal and a log can show them differently.

The notices that were given, for the console and its event stream; and the bell that says that something changed.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import structlog

from mesh_llm.console.schema import NoticeRecord, Status
from mesh_llm.core.types.effects import Notice, NoticeLevel


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A step of the start. `name`: engine, devices, models, fetch, mesh, api, model, split; `done`: it ended well."""

    name: str
    text: str
    done: bool


@dataclass(frozen=True, kw_only=True)
class Told:
    """A notice, as it was given."""

    level: NoticeLevel
    code: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Ready:
    """The API answers with a model, and a node that joins others has heard of them, unless nobody answers for long.

    Told once; `status` holds addresses, models and the invite. `sign_in_url`: opens the page signed in, once; empty
    where there is no page.
    """

    status: Status
    console_url: str
    sign_in_url: str = ""


Progress: TypeAlias = Stage | Told | Ready
OnStage: TypeAlias = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """Nobody watches."""


_KEPT = 500

_log = structlog.get_logger(__name__)


class Bell:
    """Rung on every change; waited for by any number."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def ring(self) -> None:
        """Wake all that wait."""
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self, timeout: float) -> bool:
        """Wait for the next ring; False when `timeout` seconds passed first."""
        event = self._event
        try:
            async with asyncio.timeout(timeout):
                await event.wait()
        except TimeoutError:
            return False
        return True


class NoticeBook:
    """Keeps the last notices, numbered from 1."""

    def __init__(self, bell: Bell, tell: Callable[[Notice], None], wall_clock: Callable[[], float] = time.time) -> None:
        """`tell`: is told each one as it is given."""
        self._bell = bell
        self._tell = tell
        self._wall_clock = wall_clock
        self._records: deque[NoticeRecord] = deque(maxlen=_KEPT)
        self._count = 0

    def add(self, notice: Notice) -> None:
        """Log a notice, keep it, and tell it."""
        write = {NoticeLevel.INFO: _log.info, NoticeLevel.WARNING: _log.warning, NoticeLevel.ERROR: _log.error}
        write[notice.level](notice.text, code=notice.code, about=notice.about)
        self._count += 1
        self._records.append(
            NoticeRecord(
                id=self._count,
                at=self._wall_clock(),
                level=notice.level.value,
                code=notice.code,
                text=notice.text,
                about=notice.about,
            )
        )
        self._tell(notice)
        self._bell.ring()

    def after(self, number: int) -> list[NoticeRecord]:
        """Those with a higher number, oldest first."""
        return [record for record in self._records if record.id > number]
