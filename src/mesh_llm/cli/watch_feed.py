"""Follows a node's events for `mesh-llm status --watch`, and keeps what they tell."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from mesh_llm.cli.client import DaemonClient, events
from mesh_llm.core.console_values import DownloadRecord, History
from mesh_llm.core.errors import MeshError
from mesh_llm.core.management import NoticeRecord
from mesh_llm.core.status import Status
from mesh_llm.runtime.home import Home

_SILENCE = 40.0
"""The node says something at least every 15 seconds."""
_RETRY = 1.0
_HISTORY_AGE = 15
_KEPT_NOTICES = 50


@dataclass
class Seen:
    """All that the watcher knows. `trouble`: why nothing comes at present; empty while it does."""

    status: Status | None = None
    notices: list[NoticeRecord] = field(default_factory=list[NoticeRecord])
    downloads: dict[str, DownloadRecord] = field(default_factory=dict[str, DownloadRecord])
    history: History | None = None
    trouble: str = ""

    def take(self, news: "News") -> None:
        """Take a piece of news."""
        match news:
            case Status():
                self.status, self.trouble = news, ""
            case NoticeRecord():
                self.notices = [*self.notices, news][-_KEPT_NOTICES:]
            case DownloadRecord():
                self.downloads[news.id] = news
            case History():
                self.history = news
            case Trouble():
                self.trouble = news.text


@dataclass(frozen=True)
class Trouble:
    """The node does not answer; it is tried again."""

    text: str


News = Status | NoticeRecord | DownloadRecord | History | Trouble


class Feed:
    """Follows the node's events on a thread; begins anew when they end, also with a node that was started again."""

    def __init__(self, home: Home, tell: Callable[[News], None]) -> None:
        self._home = home
        self._tell = tell
        self._ended = threading.Event()

    def start(self) -> None:
        """Begin."""
        threading.Thread(target=self._run, name="events", daemon=True).start()

    def stop(self) -> None:
        """Begin no more; what is being read is left to end with the process."""
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self._follow()
                self._tell(Trouble("the node ended; waiting for it to come back"))
            except MeshError as error:
                self._tell(Trouble(f"{error.message} Trying again."))
            self._ended.wait(_RETRY)

    def _follow(self) -> None:
        client = DaemonClient(self._home)
        age = _HISTORY_AGE
        with client.stream("GET", "/api/events", timeout=_SILENCE) as answer:
            for event in events(answer):
                if event.event == "notice":
                    self._tell(msgspec.json.decode(event.data, type=NoticeRecord))
                elif event.event == "download":
                    self._tell(msgspec.json.decode(event.data, type=DownloadRecord))
                elif event.event == "status":
                    self._tell(msgspec.json.decode(event.data, type=Status))
                    age += 1
                    if age > _HISTORY_AGE:
                        age = 0
                        self._tell(client.get("/api/history", History))
