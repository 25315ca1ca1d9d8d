"""Which accelerator's plugin the embedded engine's children load beside the wheel, and what is known of the others.

Where two plugins show one card, models would be planned for it twice: so one is loaded, the one that was installed
last. `loading.py` is the children's side.
"""

from pathlib import Path

import msgspec

from mesh_llm.engine.installation import Found, Part, look, manifests
from mesh_llm.engine.sources.embedded.archive import VERSION
from mesh_llm.engine.sources.embedded.loading import KINDS, LOAD
from mesh_llm.engine.sources.embedded.plugin import directories
from mesh_llm.engine.spec import EnginePart, PartState

_PREBUILT = "-wheel"


def prebuilt_name(kind: str) -> str:
    """Under which the failure of a kind's prebuilt engine is noted: a build of the same kind may work."""
    return f"{kind}{_PREBUILT}"


def chosen(cache: Path) -> Found | None:
    """The accelerator that children load; None if there is none that may be loaded. Reads the whole file: blocks."""
    for kind in _newest_first(cache):
        found = look(kind, VERSION, directories(cache))
        if found.part is not None:
            return found
    return None


def load_arguments(cache: Path) -> tuple[str, ...]:
    """What a child's command line needs to load it. Blocks."""
    found = chosen(cache)
    return () if found is None else (LOAD, str(found.path))


def parts(cache: Path) -> tuple[EnginePart, ...]:
    """Every accelerator that was built here, or could not be, for people. Blocks."""
    loaded = chosen(cache)
    known = _newest_first(cache)
    places = directories(cache)
    found: list[EnginePart] = []
    for kind in known:
        part = _part(kind, look(kind, VERSION, places), loaded)
        failure = look(prebuilt_name(kind), VERSION, places).failure
        if failure is not None:
            texts = (part.text, f"the prebuilt engine was not taken: {failure.message}")
            part = msgspec.structs.replace(part, text="; ".join(filter(None, texts)))
        found.append(part)
    return tuple(found)


def failed_test(cache: Path, kind: str) -> Part | None:
    """The plugin of this engine that failed its self-test, with the reason; None if there is none."""
    known = [manifest.part(kind) for manifest in manifests(directories(cache)) if manifest.engine == VERSION]
    return next((part for part in known if part is not None and part.set_aside), None)


def _newest_first(cache: Path) -> list[str]:
    """The kinds of which something is known; those that were made first, the last one at the beginning."""
    found: list[str] = []
    for manifest in manifests(directories(cache)):
        names = [part.name for part in reversed(manifest.parts)]
        names += [failure.part.removesuffix(_PREBUILT) for failure in manifest.failures]
        found += [name for name in names if name in KINDS]
    return list(dict.fromkeys(found))


def _part(kind: str, found: Found, loaded: Found | None) -> EnginePart:
    if found.part is not None and found.path is not None:
        active = loaded is not None and loaded.path == found.path
        about = [found.part.how, found.part.tested, "" if active else "not loaded: another one was installed later"]
        return EnginePart(
            name=kind,
            state=PartState.READY,
            version=VERSION,
            path=str(found.path),
            text="; ".join(filter(None, about)),
            log=str(found.path.with_name(found.part.log)) if found.part.log else "",
        )
    text = " ".join((found.failure.message if found.failure is not None else "", *found.set_aside)).strip()
    hint = found.failure.hint if found.failure is not None and found.failure.hint else ""
    retry = f"To try again: `mesh-llm engine install --gpu {kind} --force`."
    return EnginePart(name=kind, state=PartState.FAILED, text=text, hint=hint or retry)
