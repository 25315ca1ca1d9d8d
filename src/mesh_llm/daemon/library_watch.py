"""Tells the core when models come to this machine's disk, go, or get one that can guess ahead for them."""

from collections.abc import Callable, Iterable
from pathlib import Path

from mesh_llm.core.events import AnyEvent, ModelsChanged
from mesh_llm.daemon.machine import Machine
from mesh_llm.models.library import model_directories
from mesh_llm.models.stores import known_stores
from mesh_llm.models.watch import watch


async def watch_library(directories: Iterable[Path], machine: Machine, post: Callable[[AnyEvent], None]) -> None:
    """Watch until cancelled. `directories`: the user's further ones."""
    shelf = machine.shelf
    async for library in watch(model_directories(tuple(directories)), machine.cache, stores=known_stores()):
        known = (shelf.library, shelf.drafts)
        shelf.library = library
        if library != known[0]:
            post(ModelsChanged(on_disk=shelf.facts(), drafts=shelf.drafts))
        await shelf.find_drafts()
        if shelf.drafts != known[1]:
            post(ModelsChanged(on_disk=shelf.facts(), drafts=shelf.drafts))
