"""The GPU of this machine: what is installed for it by itself, and what is used when devices come and go.

At the start, `decide` finds out whether a plugin is to be built, and asks the user if that takes long. `EngineSetup`
builds it in the background. `Devices` then lets the node use it, and serves on the processor where a GPU is lost.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from mesh_llm.core.types.effects import Notice, NoticeLevel
from mesh_llm.core.types.errors import UNREADABLE
from mesh_llm.core.types.events import AnyEvent, CapacityChanged
from mesh_llm.daemon.model_fetcher import on_thread
from mesh_llm.daemon.model_registry import Machine, measure_for
from mesh_llm.daemon.published_state import NoticeShown, ProgressListener, Stage
from mesh_llm.daemon.settings import Settings
from mesh_llm.daemon.startup_models import Ask
from mesh_llm.engine.accelerators.cards import find_cards
from mesh_llm.engine.accelerators.install_main import FAILED, OFFER, InstallStep, install_command
from mesh_llm.engine.accelerators.installation import AUTO, NONE
from mesh_llm.engine.devices import hides_all
from mesh_llm.engine.process import run
from mesh_llm.engine.sources.embedded import backends
from mesh_llm.engine.sources.embedded.source import NAME as EMBEDDED
from mesh_llm.engine.spec import EngineInfo
from mesh_llm.runtime.home import Home, write_atomic

_MUCH_BYTES = 200_000_000
_LONG_SECONDS = 600
"""More than that is installed only if the user agrees."""
_OFFER_SECONDS = 240.0


@dataclass(frozen=True, kw_only=True)
class GpuPlan:
    """What is done about this machine's GPU.

    Attributes:
        part: the plugin to build, by its kind; empty for none.
        problem: why the GPU is not used, with what to type; empty if there is none, or it is used, or will be.
    """

    part: str = ""
    problem: str = ""


async def decide(settings: Settings, home: Home, machine: Machine, on_progress: ProgressListener, ask: Ask) -> GpuPlan:
    """Find out whether a plugin is to be built for this machine's GPU, and ask the user if that takes long."""
    wanted = await _wanted(settings, home, machine)
    if not wanted:
        return GpuPlan()
    on_progress(Stage(name="gpu", text="looking what the GPU needs", done=False))
    offer = await _offer(home, wanted)
    if offer.step == FAILED:
        if offer.code == "no_gpu":
            return GpuPlan()
        return GpuPlan(problem=f"The GPU is not used. {offer.text} {offer.hint}".strip())
    if offer.hint:
        on_progress(NoticeShown(level=NoticeLevel.INFO, code="gpu_better", text=offer.hint))
    large = offer.download > _MUCH_BYTES or (offer.seconds_left or 0) > _LONG_SECONDS
    if large and not settings.yes and not await _agreed(home, offer, ask):
        how = "To install it: mesh-llm engine install, or start the node with --yes."
        return GpuPlan(problem=f"The GPU is not used, because its plugin was not agreed to. {offer.text} {how}")
    on_progress(Stage(name="gpu", text=offer.text, done=True))
    return GpuPlan(part=offer.part)


async def _wanted(settings: Settings, home: Home, machine: Machine) -> str:
    """The plugin to offer: a kind, or `auto`; empty for none."""
    if machine.source is None or machine.source.name != EMBEDDED or settings.gpu == NONE:
        return ""
    if settings.gpu != AUTO:
        loaded = await asyncio.to_thread(backends.chosen, home.cache)
        return (
            "" if loaded is not None and loaded.part is not None and loaded.part.name == settings.gpu else settings.gpu
        )
    if settings.devices or machine.sees_gpu:
        return ""
    cards = await asyncio.to_thread(find_cards)
    # What the user hides is not wanted.
    return AUTO if any(not hides_all(card.vendor) for card in cards) else ""


async def _offer(home: Home, wanted: str) -> InstallStep:
    argv, env = install_command(home.cache, wanted, "--offer")
    done = await run(argv, env, _OFFER_SECONDS)
    for line in reversed(done.stdout.splitlines()):
        with suppress(*UNREADABLE):
            step = msgspec.json.decode(line, type=InstallStep)
            if step.step in {OFFER, FAILED}:
                return step
    text = f"What it needs could not be found out: {done.last_lines() or 'it took too long'}"
    return InstallStep(step=FAILED, text=text, hint="Run `mesh-llm engine install`.")


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What the user of a home answered when the plugin of this kind was offered."""

    part: str
    agreed: bool


async def _agreed(home: Home, offer: InstallStep, ask: Ask) -> bool:
    """Whether the user agrees, or has agreed. Asked once for each kind, on a terminal."""
    with suppress(OSError, *UNREADABLE):
        answer = msgspec.json.decode(home.gpu_answer.read_bytes(), type=_Answer)
        if answer.part == offer.part:
            return answer.agreed
    agreed = await on_thread(lambda: ask(f"No engine here can use the GPU yet. {offer.text} Install it?"))
    if agreed is None:
        return False
    with suppress(OSError):
        # Where it cannot be remembered, it is asked again.
        write_atomic(home.gpu_answer, msgspec.json.encode(_Answer(part=offer.part, agreed=agreed)), 0o600)
    return agreed


class Devices:
    """What models use on this machine, while plugins are built and GPUs go away and come back."""

    def __init__(
        self,
        settings: Settings,
        machine: Machine,
        post: Callable[[AnyEvent], None],
        changed: Callable[[], Awaitable[None]],
    ) -> None:
        """`changed`: called before models move to other devices."""
        self._settings = settings
        self._machine = machine
        self._post = post
        self._changed = changed
        self.lost: tuple[str, ...] = ()
        """The names of what was used last, where that is not here any more."""

    async def use(self, info: EngineInfo) -> Notice | None:
        """Take what the engine can use now. Returns a notice if models move to other devices."""
        machine = self._machine
        measured = await asyncio.to_thread(measure_for, self._settings, info, waits=True)
        before, now = machine.capacity.devices, measured.capacity.devices
        if (before, machine.devices) == (now, measured.devices):
            machine.use(info)
            return None
        names = ", ".join(now)
        had_gpu = machine.accelerators > 0
        machine.use(info, measured)
        has_gpu = machine.accelerators > 0
        gone = tuple(name for name in before if name not in now) if had_gpu else ()
        self.lost = gone or (() if has_gpu else self.lost)
        if gone:
            reason = f"{', '.join(gone)} is gone, and it moves to {names}"
            text = (
                f"{', '.join(gone)} is not there any more: its driver ended, or its plugin was removed. Models start "
                f"again on {names}. It is used again once it is back."
            )
            notice = Notice(level=NoticeLevel.WARNING, code="device_lost", text=text)
        else:
            reason = f"it moves to {names}"
            text = f"Models compute on {names} from now on. Each starts again there between two of its requests."
            notice = Notice(level=NoticeLevel.INFO, code="device_used", text=text)
        await self._changed()
        self._post(CapacityChanged(capacity=measured.capacity, reason=reason))
        return notice
