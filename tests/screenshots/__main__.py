"""Start a mesh, talk to it, and take a picture of each panel: light, dark, and as on a phone.

    python -m tests.screenshots [FOLDER]      docs/screenshots by default

Five nodes of a lab: two share one model, two serve another, one only asks. Run it where nothing can leave the machine
(`make screenshots` does).
"""

import asyncio
import shutil
import sys
import tempfile
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from playwright.async_api import Browser, Page
from tests.netlab.lab import NetLab
from tests.support.browser import DESKTOP, PHONE, Visitor, chromium, serious_faults
from tests.support.forward import forwarded
from tests.support.gguf_models import cached_model
from tests.support.node import NodeProcess
from tests.support.pool import named, until, warm

PANELS = ("mesh", "models", "chat", "join", "activity")
_CONSOLE = 3131
_SIZES = ("--parallel", "2", "--ctx-size", "2048")


@asynccontextmanager
async def mesh(folder: Path) -> AsyncGenerator[tuple[NetLab, NodeProcess]]:
    """The mesh in the pictures, and the node whose page is shown."""
    large = named(cached_model(Path(tempfile.gettempdir()) / "mesh-llm-models", "small"), "stories-large", folder / "m")
    async with AsyncExitStack() as nodes:
        lab = await nodes.enter_async_context(NetLab(5, delay_ms=1))
        lab.link(0, 1).set(delay_ms=2)
        lab.link(0, 2).set(delay_ms=6)
        lab.link(0, 3).set(delay_ms=14)
        lab.link(0, 4).set(delay_ms=20)

        async def start(name: str, host: int, *words: str, **options: Any) -> NodeProcess:
            arguments = (*_SIZES, "--name", name, *words)
            node = await NodeProcess.start(folder / name, lab=lab, host=host, arguments=arguments, **options)
            nodes.push_async_callback(node.close)
            return node

        desk = await start("desk", 0, "--mesh-name", "home", "--max-vram", "8", models=["tiny"])
        token = await invite(desk, "split")
        await start("attic", 1, "--max-vram", "24", "--split", "--no-draft", models=[large], join=[token])
        await start("studio", 2, "--max-vram", "16", "--split", "--no-draft", models=[large], join=[token])
        await start("garage", 3, "--max-vram", "12", models=["tiny"], join=[token])
        await start("laptop", 4, client=True, join=[token])
        await until(desk, warm("stories-large"), "seeing the shared model", 120)
        await until(desk, lambda status: status["split"] is not None, "seeing it shared", 120)
        await until(desk, warm("tiny", 2), "seeing both servers", 120)
        yield lab, desk


async def invite(node: NodeProcess, scope: str) -> str:
    """An invite of a scope."""
    answer = await node.console.post("/api/invites", {"scope": scope, "lifetime_seconds": 3600})
    return answer.expect(201).json()["token"]


async def talk(page: Page) -> None:
    """Two questions and their answers."""
    await page.get_by_label("Model", exact=True).select_option("tiny")
    for question in ("Hello!", "What is mesh-llm?"):
        await page.get_by_label("What to ask").fill(question)
        await page.get_by_role("button", name="Ask", exact=True).click()
        await page.get_by_role("button", name="Stop the answer").wait_for(state="detached")
        await page.get_by_text("tokens/s").last.wait_for()


async def pictures(browser: Browser, desk: NodeProcess, port: int, folder: Path) -> None:
    """All panels, in all three ways."""
    looks = (
        ("light", {"viewport": DESKTOP, "color_scheme": "light"}),
        ("dark", {"viewport": DESKTOP, "color_scheme": "dark"}),
        ("phone", {"viewport": PHONE, "color_scheme": "light", "has_touch": True, "is_mobile": True}),
    )
    for look, options in looks:
        async with Visitor.of(browser, **options) as visitor:
            outside = await visitor.page(f"http://localhost:{port}/")
            await outside.goto(f"http://localhost:{port}/")
            await outside.get_by_role("heading", name="Sign in to this node").wait_for()
            await outside.screenshot(path=folder / f"sign-in-{look}.png")
            for fault in await serious_faults(outside):
                print(f"sign-in-{look}: {fault}")
            await outside.close()
            for panel in PANELS:
                page = await visitor.open(desk, panel, port=port)
                if panel == "chat":
                    await talk(page)
                if panel == "join":
                    await page.get_by_role("button", name="Make an invite").click()
                    await page.get_by_role("img", name="The invite as a QR code").wait_for()
                if panel == "mesh":
                    await page.locator("svg [data-node]").first.wait_for()
                if panel == "mesh" and look != "phone":
                    await page.get_by_role("button", name="attic").last.click()
                if panel == "models":
                    await page.get_by_text("fits here").first.wait_for()
                await page.evaluate("scrollTo(0, 0)")
                await page.screenshot(path=folder / f"{panel}-{look}.png")
                for fault in await serious_faults(page):
                    print(f"{panel}-{look}: {fault}")
                await page.close()
            for fault in visitor.faults + visitor.foreign:
                print(f"{look}: {fault}")


async def main(folder: Path) -> None:
    """Take them all."""
    home = Path(tempfile.mkdtemp(prefix="screenshots-"))
    try:
        async with mesh(home) as (lab, desk), forwarded(lab, 0, _CONSOLE) as port, chromium() as browser:
            await pictures(browser, desk, port, folder)
            assert desk.process.status is None
    finally:
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    chosen = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/screenshots")
    chosen.mkdir(parents=True, exist_ok=True)
    asyncio.run(main(chosen))
