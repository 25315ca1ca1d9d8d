"""`mesh-llm serve`, and `mesh-llm` alone: run a node, and show how it starts and what to do next."""

import os
import shlex
import sys
import textwrap
import time
from functools import partial
from typing import Any, NoReturn, Protocol, TextIO

import click
import msgspec

from mesh_llm.cli.configuration import ConfigurationSource, from_command_line
from mesh_llm.cli.invite import invite_lines
from mesh_llm.cli.options import ServeCommand, serve_options
from mesh_llm.cli.output import animated, console, exit_code, go_on_without, print_error, printable, sign
from mesh_llm.cli.settings import SECRET_VARIABLES
from mesh_llm.console.status import Status
from mesh_llm.core.types.effects import NoticeLevel
from mesh_llm.core.types.errors import MeshError
from mesh_llm.daemon.published_state import InviteShown, NoticeShown, Progress, ProgressListener, Ready, Stage
from mesh_llm.daemon.settings import Settings
from mesh_llm.runtime.home import Home

_SECONDS_BETWEEN_LINES = 10.0


class StartDisplay(Protocol):
    """Shows the stages of a start."""

    def stage(self, name: str, text: str, *, done: bool) -> None:
        """Stage `name` began, continued or ended."""
        ...

    def notice(self, level: str, text: str) -> None:
        """Show a notice. `level`: info, warning or error."""
        ...

    def ask(self, question: str) -> bool | None:
        """Ask the user, and wait for yes or no; None if there is no user. Called from any thread."""
        ...

    def invite(self, lines: list[str]) -> None:
        """Show how to add a machine; the start goes on."""
        ...

    def ready(self, lines: list[str]) -> None:
        """The node is ready. `lines`: what to do next."""
        ...

    def close(self) -> None:
        """Restore the terminal."""
        ...


class PlainDisplay:
    """One line per event: for logs, pipes and service managers."""

    def __init__(self) -> None:
        self._printed = float("-inf")

    def stage(self, name: str, text: str, *, done: bool) -> None:
        """Print stages that ended, and now and then the progress of those that may take hours."""
        now = time.monotonic()
        if (
            done
            or name in {"plugin", "gpu"}
            or (name in {"fetch", "split"} and now - self._printed >= _SECONDS_BETWEEN_LINES)
        ):
            self._printed = now
            print(printable(f"{name}: {text}"), flush=True)

    def ask(self, question: str) -> None:
        """Nobody can answer."""

    def notice(self, level: str, text: str) -> None:
        """Print a notice and its level."""
        print(printable(f"{level}: {text}"), flush=True)

    def invite(self, lines: list[str]) -> None:
        """Print how to add a machine."""
        print(printable("\n".join(lines)), flush=True)

    def ready(self, lines: list[str]) -> None:
        """Print `ready` and what to do next."""
        print("ready", flush=True)
        for line in lines:
            print(printable(line), flush=True)

    def close(self) -> None:
        """Nothing to restore."""


class JournalDisplay(PlainDisplay):
    """Lines for systemd's journal: it knows their time, takes their priority from `<N>`, and others can read it."""

    def notice(self, level: str, text: str) -> None:
        """Print a notice with its priority, as sd-daemon(3) has it."""
        print(f"<{_PRIORITIES.get(level, 6)}>{printable(text)}", flush=True)

    def invite(self, lines: list[str]) -> None:  # noqa: ARG002 - an invite is a secret
        """Say where the invite is."""
        print("invite: mesh-llm status shows it", flush=True)

    def ready(self, lines: list[str]) -> None:
        """Print `ready`, and where."""
        print("\n".join(["ready", *(printable(line) for line in lines[:2])]), flush=True)

    def error(self, error: MeshError) -> int:
        """Print the error that ends the node; return the exit code."""
        print(f"<3>{printable(error.message)}\n<3>{printable(error.hint)}", flush=True)
        return exit_code(error)


_PRIORITIES = {"error": 3, "warning": 4}


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
        """Show a stage in the list; after `close`, as lines."""
        if self._live is None:
            self._after.stage(name, text, done=done)
            return
        self._stages[name] = (text, done)
        self._draw()

    def ask(self, question: str) -> bool | None:
        """Ask below the list, which is paused meanwhile."""
        live = self._live
        if live is None or not sys.stdin.isatty():
            return None
        live.stop()
        try:
            return click.confirm(printable(question), default=True)
        except click.Abort:
            return None
        finally:
            if self._live is live:
                live.start()

    def notice(self, level: str, text: str) -> None:
        """Print a notice above the list."""
        from rich.text import Text

        style = {"error": "red", "warning": "yellow"}.get(level, "")
        self._console.print(Text(printable(text), style=style))

    def invite(self, lines: list[str]) -> None:
        """Print how to add a machine above the list, each line whole: a token is to be copied."""
        from rich.text import Text

        self._console.print()
        for line in (*lines, ""):
            self._console.print(Text(printable(line)), soft_wrap=True)

    def ready(self, lines: list[str]) -> None:
        """End the list, and print what to do next."""
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
    """Live on a terminal, plain elsewhere."""
    if animated(sys.stdout):
        return LiveDisplay()
    return JournalDisplay() if is_journal(sys.stdout, os.environ.get("JOURNAL_STREAM", "")) else PlainDisplay()


def is_journal(stream: TextIO, variable: str) -> bool:
    """Whether a stream leads to systemd's journal: `JOURNAL_STREAM` is `DEVICE:INODE` of the one that does."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return variable == f"{status.st_dev}:{status.st_ino}"


def show(display: StartDisplay) -> ProgressListener:
    """A callback for the daemon's start that shows it on `display`."""

    def watch(progress: Progress) -> None:
        match progress:
            case Stage():
                display.stage(progress.name, progress.text, done=progress.done)
            case NoticeShown():
                if progress.level is not NoticeLevel.INFO or progress.code in _SHOWN:
                    display.notice(progress.level.value, progress.text)
            case InviteShown():
                display.invite(invite_lines(progress.token, progress.scope, progress.own_scope))
            case Ready():
                # A link that signs in belongs on a terminal, not in a log.
                link = progress.sign_in_url if sys.stdout.isatty() else ""
                display.ready(next_steps(progress.status, progress.console_url, link))

    return watch


_SHOWN = frozenset(
    {
        "model_assigned",
        "model_ready",
        "model_waiting",
        "peer_joined",
        "split_wire",
        "peer_lost",
        "not_admitted",
        "lan_asked",
        "join_asked",
        "join_approved",
        "join_denied",
        "join_expired",
        "mesh_listing",
        "mesh_listed",
        "mesh_full",
        "mesh_moved",
        "model_default",
        "model_fetching",
        "yielding",
        "yield_over",
        "recovered",
        "console_port",
        "scope_changed",
        "config_reloaded",
    }
)
"""Notices of level info that a person at the terminal wants to see."""


def next_steps(status: Status, console_url: str, sign_in_url: str = "") -> list[str]:
    """What to do with a node that is ready: try it, point clients at it.

    `sign_in_url`: opens the console signed in; works once.
    """
    # A client may run beside a node that serves, which the command line asks first.
    select = f" --port {status.api_port}" if status.role == "client" else ""
    warm = [model for model in status.models if model.status == "warm"]
    name = warm[0].name if warm else ""
    lines = [f"API      {status.api_base}" + (f"   model {name}" if name else "")]
    if status.ollama_base:
        lines.append(f"Ollama   {status.ollama_base}")
    if sign_in_url:
        lines.append(f"Console  {sign_in_url}")
        lines.append(f"         (this link works once, within 15 minutes; mesh-llm console{select} makes another)")
    elif console_url:
        lines.append(f"Console  {console_url}   sign in: mesh-llm console{select}")
    if name:
        lines += [
            "",
            "Try it:",
            f"  curl {status.api_base}/chat/completions -H 'content-type: application/json' \\",
            *(["    -H 'authorization: Bearer KEY' \\"] if status.needs_key else []),
            f'    -d \'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello"}}]}}\'',
        ]
    lines += [
        "",
        "Point OpenAI clients at it:",
        f"  export OPENAI_BASE_URL={status.api_base} OPENAI_API_KEY={'KEY' if status.needs_key else 'none'}",
    ]
    if status.needs_key:
        lines.append("  (KEY is one of this node's API keys)")
    return [*lines, "", "Ctrl-C stops this node."]


def ask_to_publish(settings: Settings) -> Settings:
    """Ask whether this mesh may become public, if the user of this home has not agreed to that before (`--publish`).

    Returns the settings without the listing if the user says no. Raises MeshError(publication_not_agreed) if nobody can
    be asked.
    """
    policy, relays = settings.discovery.publicity, settings.discovery.urls
    if policy is None:
        return settings
    from mesh_llm.discovery.nostr.consent import PublicationConsent, consent_text, scope_sentence

    consent = PublicationConsent(Home(settings.home))
    # Options are not broken at their hyphens: people copy them.
    wrap = partial(textwrap.fill, width=96, break_on_hyphens=False, break_long_words=False)
    sentence = wrap(scope_sentence(policy, consent.widest(relays)))
    if consent.covers(policy, relays):
        click.echo(sentence)
        return settings
    if not settings.yes and not sys.stdin.isatty():
        raise MeshError(
            code="publication_not_agreed",
            message="--publish makes this mesh public, and nobody has agreed to that here yet.",
            hint="Start it once on a terminal: it says what becomes public, and asks. Or agree with: --publish --yes",
        )
    click.echo(wrap(printable(consent_text(policy, relays))))
    if not settings.yes and not click.confirm("List this mesh?", default=False):
        click.echo("The mesh is not listed. Without --publish this is not asked.")
        return msgspec.structs.replace(settings, discovery=msgspec.structs.replace(settings.discovery, publicity=None))
    click.echo(sentence)
    consent.give(policy, relays)
    return settings


@click.command(cls=ServeCommand)
@serve_options
def serve(**options: Any) -> None:
    """Serve models; the same as mesh-llm without a command."""
    run_serve(options)


def run_serve(options: dict[str, Any]) -> NoReturn:
    """Run a node until it is stopped, then end the process. Raises MeshError if options contradict each other."""
    source = ConfigurationSource(from_command_line(click.get_current_context()))
    read = source.load()
    settings = ask_to_publish(read.settings)
    for name in SECRET_VARIABLES:
        # Engines inherit the environment, and do not need these.
        os.environ.pop(name, None)

    from mesh_llm.daemon.configuration import ConfigurationControl
    from mesh_llm.daemon.main import run_daemon
    from mesh_llm.runtime.process import exit_process

    go_on_without()
    if any(not key.startswith("@") for key in options["api_keys"]):
        click.echo(
            "warning: other users of this machine can read --api-key in the list of processes.\n"
            "  Use --api-key-file FILE, or set MESH_LLM_API_KEY.",
            err=True,
        )
    for file in read.exposed:
        click.echo(
            f"warning: other users of this machine can read the secrets in {file}.\n"
            f"  Type: chmod 600 {shlex.quote(str(file))}",
            err=True,
        )
    display = choose_display()
    try:
        code = run_daemon(settings, show(display), display.ask, ConfigurationControl(read, source.load))
        display.close()
    except MeshError as error:
        display.close()
        code = display.error(error) if isinstance(display, JournalDisplay) else print_error(error)
    exit_process(code)
