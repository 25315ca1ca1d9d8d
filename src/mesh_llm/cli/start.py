"""From what a starting daemon tells to what a person sees, ending in what to do next."""

import sys

from mesh_llm.cli.display import StartDisplay
from mesh_llm.core.effects import NoticeLevel
from mesh_llm.core.status import Status
from mesh_llm.daemon.progress import OnProgress, Progress, Ready, Stage, Told


def show(display: StartDisplay) -> OnProgress:
    """A watcher for the daemon's progress that draws on `display`."""

    def watch(progress: Progress) -> None:
        match progress:
            case Stage():
                display.stage(progress.name, progress.text, done=progress.done)
            case Told():
                if progress.level is not NoticeLevel.INFO or progress.code in _SHOWN:
                    display.notice(progress.level.value, progress.text)
            case Ready():
                # A link that signs in is for the person at the terminal, not for a log.
                link = progress.sign_in_url if sys.stdout.isatty() else ""
                display.ready(next_steps(progress.status, progress.console_url, link))

    return watch


_SHOWN = frozenset(
    {
        "model_assigned",
        "model_ready",
        "model_waiting",
        "peer_joined",
        "peer_lost",
        "mesh_joined",
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
    }
)
"""Notices of level info that a person at the terminal wants to see."""


def next_steps(status: Status, console_url: str, sign_in_url: str = "") -> list[str]:
    """What to do with a node that is ready: try it, point clients at it, add a machine.

    `sign_in_url`: opens the console signed in, once.
    """
    warm = [model for model in status.models if model.status == "warm"]
    name = warm[0].name if warm else ""
    lines = [f"API      {status.api_base}" + (f"   model {name}" if name else "")]
    if sign_in_url:
        lines.append(f"Console  {sign_in_url}")
        lines.append("         (this link works once, within 15 minutes; mesh-llm console makes another)")
    elif console_url:
        lines.append(f"Console  {console_url}   sign in: mesh-llm console")
    if name:
        lines += [
            "",
            "Try it:",
            f"  curl {status.api_base}/chat/completions -H 'content-type: application/json' \\",
            f'    -d \'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello"}}]}}\'',
        ]
    lines += [
        "",
        "Point OpenAI clients at it:",
        f"  export OPENAI_BASE_URL={status.api_base} OPENAI_API_KEY=none",
    ]
    if status.token:
        lines += [
            "",
            "Add a machine (keep the token to yourself: it lets its holder in):",
            f"  mesh-llm --join {status.token}",
        ]
    return [*lines, "", "Ctrl-C stops this node."]
