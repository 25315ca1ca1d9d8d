"""Fixtures for tests of the console's page: a mesh of three nodes and a browser, shared by a module's tests."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page
from tests.support.browser import Visitor, chromium
from tests.support.node import NodeProcess
from tests.support.pool import alive, named, until, warm

HOSTILE_NAME = "<img src=x onerror=document.title='taken'>"
HOSTILE_MESH = "<h2>home</h2> & garden"
HOSTILE_MODEL = "<b onmouseover=alert(1)>babble"
_SIZES = ("--parallel", "2", "--ctx-size", "2048", "--no-draft")


@dataclass
class PageMesh:
    """Nodes `desk` (tiny), a second with a hostile name (tiny), and a third with a model of a hostile name."""

    desk: NodeProcess
    second: NodeProcess
    third: NodeProcess
    browser: Browser
    start: Callable[..., Any]

    def port(self, node: NodeProcess) -> int:
        """Of a node's console."""
        return node.console.port


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(
    tmp_path_factory: pytest.TempPathFactory, random_model: Callable[[str], Path]
) -> AsyncGenerator[PageMesh]:
    """Three nodes in this process's namespace."""
    folder = tmp_path_factory.mktemp("page")
    babble = named(random_model("small"), HOSTILE_MODEL, folder / "m")
    numbers = itertools.count()
    async with AsyncExitStack() as stack:

        async def start(name: str, *words: str, **options: Any) -> NodeProcess:
            home = folder / f"home{next(numbers)}"
            node = await NodeProcess.start(home, arguments=(*_SIZES, "--name", name, *words), **options)
            stack.push_async_callback(node.close)
            return node

        desk = await start("desk", "--mesh-name", HOSTILE_MESH, models=["tiny"])
        token = await desk.invite()
        second, third, browser = await asyncio.gather(
            start(HOSTILE_NAME, models=["tiny"], join=[token]),
            start("studio", models=[babble], join=[token]),
            stack.enter_async_context(chromium()),
        )
        await until(desk, alive(2), "seeing both others", 60)
        await until(desk, warm(HOSTILE_MODEL), "seeing the third one's model", 60)
        yield PageMesh(desk, second, third, browser, start)


@pytest_asyncio.fixture(loop_scope="module")
async def visitor(mesh: PageMesh) -> AsyncGenerator[Visitor]:
    """A browser without a past; at the end nothing may have gone wrong in it."""
    async with Visitor.of(mesh.browser) as visitor:
        yield visitor
    assert (visitor.foreign, visitor.faults) == ([], []), (visitor.foreign, visitor.faults)


async def ask(page: Page, text: str, model: str = "tiny") -> None:
    """Choose a model, write a question and send it."""
    await page.get_by_label("Model", exact=True).select_option(model)
    await page.get_by_label("What to ask").fill(text)
    await page.get_by_role("button", name="Ask", exact=True).click()
