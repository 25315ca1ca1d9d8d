"""A real browser for tests of the console's page: the system's Chromium, driven by Playwright."""

import asyncio
import shutil
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from playwright.async_api import Browser, BrowserContext, ConsoleMessage, Page, Request, async_playwright, expect
from tests.support.node import NodeProcess

_PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
# Nothing of its own to say to the world, and no sandbox: tests run as root in a namespace.
_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_PATIENCE_MS = 60_000
"""How long actions and expectations wait. Playwright's own limit, 5 s, is short for a browser on a busy machine."""
expect.set_options(timeout=_PATIENCE_MS)

_AXE = Path(__file__).resolve().parents[2] / "web/node_modules/axe-core/axe.min.js"
DESKTOP = {"width": 1280, "height": 860}
PHONE = {"width": 390, "height": 844}


@asynccontextmanager
async def chromium(*flags: str) -> AsyncGenerator[Browser]:
    """A headless browser. `flags`: more of its command line."""
    program = next((found for name in _PROGRAMS if (found := shutil.which(name))), None)
    assert program is not None, "no Chromium here: bash tools/system_packages.sh browser"
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=program, headless=True, args=[*_FLAGS, *flags])
        try:
            yield browser
        finally:
            await browser.close()


class Visitor:
    """Somebody's browser: a storage of its own, and what went wrong on its pages.

    Attributes:
        faults: errors that scripts threw or the console showed, blocked requests included.
        foreign: addresses that a page asked for beyond the node's own.
    """

    def __init__(self, context: BrowserContext) -> None:
        self.context = context
        self.faults: list[str] = []
        self.foreign: list[str] = []

    @classmethod
    @asynccontextmanager
    async def of(cls, browser: Browser, **options: Any) -> AsyncGenerator["Visitor"]:
        """A visitor with Playwright's context options: `viewport`, `color_scheme` and the like."""
        chosen: dict[str, Any] = {"viewport": DESKTOP, "reduced_motion": "reduce", **options}
        context = await browser.new_context(**chosen)
        context.set_default_timeout(_PATIENCE_MS)
        try:
            yield cls(context)
        finally:
            await context.close()

    async def link(self, node: NodeProcess, port: int | None = None) -> str:
        """A link that opens a node's page signed in, as `mesh-llm console` makes it. `port`: instead of the node's."""
        made = (await node.console.post("/api/sign-in-links", {})).expect(201).json()
        return f"http://localhost:{port or node.console.port}/#sign-in={made['code']}"

    async def open(self, node: NodeProcess, panel: str = "mesh", *, port: int | None = None) -> Page:
        """The page of a node's console, signed in, once it has the node's state."""
        page = await self.visit(node, panel, port=port)
        await page.get_by_text("Live", exact=True).wait_for()
        return page

    async def visit(self, node: NodeProcess, panel: str = "mesh", *, port: int | None = None) -> Page:
        """The page of a node's console, signed in."""
        page = await self.page(f"http://localhost:{port or node.console.port}/")
        await page.goto(await self.link(node, port))
        await page.get_by_role("navigation", name="Panels").wait_for()
        await page.goto(f"{page.url.partition('#')[0]}#/{panel}")
        return page

    async def page(self, *homes: str) -> Page:
        """An empty page, that is watched for what it asks of others than the console at these addresses."""
        page = await self.context.new_page()
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("console", self._said)
        page.on("request", lambda asked: self._asked(asked, homes))
        return page

    def _said(self, message: ConsoleMessage) -> None:
        # A refused call, and a stream that ends with its node, are told on the page; the browser calls each an error.
        if message.type == "error" and not message.text.startswith("Failed to load resource:"):
            self.faults.append(message.text)

    def _asked(self, request: Request, homes: tuple[str, ...]) -> None:
        if not request.url.startswith((*homes, "data:", "blob:")):
            self.foreign.append(request.url)


async def serious_faults(page: Page) -> list[str]:
    """What axe-core finds of serious and critical kind, as one line each."""
    # Run from outside of the page's own scripts, which its policy would not let in.
    await page.evaluate(_AXE.read_text("utf-8"))
    found = await page.evaluate(
        """async () => (await axe.run(document, {resultTypes: ["violations"]})).violations
            .filter((each) => ["serious", "critical"].includes(each.impact))
            .map((each) => `${each.id}: ${each.help}: ${each.nodes.map((node) => node.html).join(" | ")}`)"""
    )
    return [str(each) for each in found]


async def becomes(page: Page, function: str, argument: object = None, seconds: float = 60.0) -> None:
    """Wait until a JavaScript function is true. The browser's own way to wait needs `eval`, which the page forbids."""
    async with asyncio.timeout(seconds):
        while not await page.evaluate(function, argument):
            await page.evaluate("() => new Promise(requestAnimationFrame)")
