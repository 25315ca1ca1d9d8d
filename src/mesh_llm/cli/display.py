"""What a user sees while a node starts: a live list on a terminal, plain lines elsewhere."""

import sys
import time
from typing import Protocol

from mesh_llm.cli.errors import printable
from mesh_llm.cli.output import animated, console, sign

_SECONDS_BETWEEN_LINES = 10.0


class StartDisplay(Protocol):
    """Shows the stages of a start."""

    def stage(self, name: str, text: str, *, done: bool) -> None:
        """A stage began, went on, or ended; `name` says which one."""
        ...

    def notice(self, level: str, text: str) -> None:
        """Something that the user should know."""
        ...

    def ask(self, question: str) -> bool:
        """Put a question to the user and wait for yes or no; no where nobody can be asked. From any thread."""
        ...

    def ready(self, lines: list[str]) -> None:
        """The node answers; `lines` say what to do next."""
        ...

    def close(self) -> None:
        """Leave the terminal as it was found."""
        ...


class PlainDisplay:
    """One line an occurrence: for logs, pipes and service managers."""

    def __init__(self) -> None:
        self._told = float("-inf")

    def stage(self, name: str, text: str, *, done: bool) -> None:
        """Print ended stages: a pipe wants facts; and now and then how far a fetch is, which may take hours."""
        now = time.monotonic()
        if done or (name in {"fetch", "split"} and now - self._told >= _SECONDS_BETWEEN_LINES):
            self._told = now
            print(printable(f"{name}: {text}"), flush=True)

    def ask(self, question: str) -> bool:  # noqa: ARG002 - nobody reads it
        """Nobody is there to answer."""
        return False

    def notice(self, level: str, text: str) -> None:
        """Print a notice with its level."""
        print(printable(f"{level}: {text}"), flush=True)

    def ready(self, lines: list[str]) -> None:
        """Print `ready` and what to do next."""
        print("ready", flush=True)
        for line in lines:
            print(printable(line), flush=True)

    def close(self) -> None:
        """Nothing to restore."""


class LiveDisplay:
    """A short list of stages with a spinner on the one that runs, by rich."""

    def __init__(self) -> None:
        from rich.live import Live

        self._console = console()
        self._done = sign("✓", "+")
        self._moving = "dots" if sign("⠋", "") else "line"
        self._stages: dict[str, tuple[str, bool]] = {}
        self._after = PlainDisplay()
        self._live: Live | None = Live(console=self._console, refresh_per_second=8, transient=False)
        self._live.start()

    def _draw(self) -> None:
        from rich.console import Group
        from rich.spinner import Spinner
        from rich.text import Text

        if self._live is None:
            return
        rows: list[Text | Spinner] = []
        for name, (text, done) in self._stages.items():
            line = Text(f"{name:<8} {printable(text)}")
            rows.append(Text(f"{self._done} ", style="green") + line if done else Spinner(self._moving, line))
        self._live.update(Group(*rows))

    def stage(self, name: str, text: str, *, done: bool) -> None:
        """Show a stage in its place in the list; once the list is closed, as lines."""
        if self._live is None:
            self._after.stage(name, text, done=done)
            return
        self._stages[name] = (text, done)
        self._draw()

    def ask(self, question: str) -> bool:
        """Ask below the list, which rests meanwhile."""
        import click

        live = self._live
        if live is None or not sys.stdin.isatty():
            return False
        live.stop()
        try:
            return click.confirm(printable(question), default=True)
        except click.Abort:
            return False
        finally:
            if self._live is live:
                live.start()

    def notice(self, level: str, text: str) -> None:
        """Print a notice above the list."""
        from rich.text import Text

        style = {"error": "red", "warning": "yellow"}.get(level, "")
        self._console.print(Text(printable(text), style=style))

    def ready(self, lines: list[str]) -> None:
        """End the list, and say what to do next."""
        self.close()
        from rich.text import Text

        self._console.print()
        for line in lines:
            self._console.print(Text(printable(line)), soft_wrap=True)

    def close(self) -> None:
        """Stop drawing."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def choose_display() -> StartDisplay:
    """Live on a terminal, plain otherwise."""
    return LiveDisplay() if animated(sys.stdout) else PlainDisplay()
