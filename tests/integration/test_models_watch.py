import asyncio
import os
import shutil
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

from tests.support.gguf_writer import llama_metadata, llama_tensors, write

from mesh_llm.models.library.library import Library
from mesh_llm.models.library.watch import watch


def model(path: Path, context: int = 4096) -> Path:
    return write(path, llama_metadata(context=context), llama_tensors())


class Watching:
    def __init__(self, libraries: AsyncIterator[Library]) -> None:
        self._libraries = libraries

    async def until(self, *names: str) -> Library:
        async with asyncio.timeout(20):
            async for library in self._libraries:
                if set(library.models) == set(names):
                    return library
        raise AssertionError


@asynccontextmanager
async def watching(*directories: Path, quiet: float = 0.3) -> AsyncGenerator[Watching]:
    libraries = watch(directories, builtin=False, debounce_seconds=0.1, quiet_seconds=quiet)
    try:
        yield Watching(libraries)
    finally:
        await cast("AsyncGenerator[Library]", libraries).aclose()


async def test_files_come_change_and_go(tmp_path: Path) -> None:
    model(tmp_path / "one.gguf")
    async with watching(tmp_path) as library:
        await library.until("one")
        model(tmp_path / "two.gguf")
        await library.until("one", "two")
        (tmp_path / "deep").mkdir()
        model(tmp_path / "deep" / "three.gguf", context=64)
        await library.until("one", "two", "three")
        (tmp_path / "one.gguf").rename(tmp_path / "uno.gguf")
        await library.until("uno", "two", "three")
        shutil.rmtree(tmp_path / "deep")
        await library.until("uno", "two")


async def test_a_directory_that_comes_later_goes_and_comes_again(tmp_path: Path) -> None:
    target = tmp_path / "not" / ".yet" / "models"
    async with watching(target) as library:
        await library.until()
        model(target / "one.gguf")
        await library.until("one")
        shutil.rmtree(tmp_path / "not")
        await library.until()
        model(target / "two.gguf")
        await library.until("two")


async def test_a_file_that_grows_is_offered_when_it_is_whole(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    whole = model(tmp_path / "source.gguf").read_bytes()
    async with watching(tmp_path / "models") as library:
        await library.until()
        growing = tmp_path / "models" / "one.gguf"
        growing.write_bytes(whole[: len(whole) // 2])
        seen = await library.until()
        assert seen.unusable[0].incomplete
        with growing.open("ab") as file:
            file.write(whole[len(whole) // 2 :])
        await library.until("one")


async def test_a_file_of_its_full_size_from_the_start_is_offered_when_it_rests(tmp_path: Path) -> None:
    async with watching(tmp_path, quiet=600) as library:
        await library.until()
        path = model(tmp_path / "one.gguf")
        seen = await library.until()
        assert seen.unusable[0].reason == "it is still being written"
        os.utime(path, (1, 1))
        await library.until("one")


async def test_a_linked_directory_is_watched_too(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "models" / "link").symlink_to(tmp_path / "elsewhere")
    async with watching(tmp_path / "models") as library:
        await library.until()
        model(tmp_path / "elsewhere" / "one.gguf")
        await library.until("one")


async def test_a_name_that_is_not_utf8_ends_no_watch(tmp_path: Path) -> None:
    async with watching(tmp_path) as library:
        await library.until()
        model(tmp_path / "one.gguf").rename(Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xe8le.gguf")))
        seen = await library.until()
        assert seen.unusable[0].name == "m\\xe8le"
        model(tmp_path / "two.gguf")
        await library.until("two")
