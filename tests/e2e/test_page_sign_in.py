"""How a person gets into the console's page: by a link, once, behind a proxy too; and what others see of it."""

import asyncio
import re
import shutil
import subprocess
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from playwright.async_api import Browser, expect
from tests.support.browser import PHONE, Visitor, chromium, serious_faults
from tests.support.fixtures import StartNode
from tests.support.node import NodeOptions, NodeProcess
from tests.support.terminal import on_terminal

from mesh_llm.console import app as pages

pytestmark = pytest.mark.timeout(240)

PUBLIC = "mesh.example"
_NGINX = """
daemon off;
pid {directory}/nginx.pid;
error_log stderr notice;
master_process off;
events {{ worker_connections 256; }}
http {{
  access_log off;
  client_body_temp_path {directory}/body;
  proxy_temp_path {directory}/proxy;
  fastcgi_temp_path {directory}/fastcgi;
  uwsgi_temp_path {directory}/uwsgi;
  scgi_temp_path {directory}/scgi;
  server {{
    listen 127.0.0.1:{port} ssl;
    ssl_certificate {directory}/certificate.pem;
    ssl_certificate_key {directory}/key.pem;
    location /named/ {{
      proxy_pass http://127.0.0.1:{console}/;
      proxy_set_header Host $http_host;
      proxy_buffering off;
    }}
    location /bare/ {{
      proxy_pass http://127.0.0.1:{console}/;
      proxy_buffering off;
    }}
  }}
}}
"""


@pytest_asyncio.fixture
async def browser() -> AsyncGenerator[Browser]:
    async with chromium(f"--host-resolver-rules=MAP {PUBLIC} 127.0.0.1") as started:
        yield started


def addresses(node: NodeProcess) -> tuple[str, str]:
    return f"http://127.0.0.1:{node.console.port}/", f"http://localhost:{node.console.port}/"


async def test_a_link_opens_the_page_once_and_reloading_keeps_it_open(start_node: StartNode, browser: Browser) -> None:
    node = await start_node("a", models=["tiny"])
    async with Visitor.of(browser) as user, Visitor.of(browser, viewport=PHONE) as other:
        # Who has no link sees how to get one, and nothing of the node.
        page = await other.page(*addresses(node))
        await page.goto(f"http://127.0.0.1:{node.console.port}/")
        await expect(page.get_by_role("heading", name="Sign in to this node")).to_be_visible()
        await expect(page.get_by_text("mesh-llm console", exact=True)).to_be_visible()
        assert await page.title() == "Sign in · mesh-llm"
        assert await serious_faults(page) == []
        assert "tiny" not in await page.content()
        # The link is used by reading it in the page only, and is gone from the address at once.
        link = await user.link(node)
        mine = await user.page(*addresses(node))
        await mine.goto(link)
        await expect(mine.get_by_text("Live", exact=True)).to_be_visible()
        assert mine.url.endswith("/#/mesh")
        await mine.reload()
        await expect(mine.get_by_text("Live", exact=True)).to_be_visible()
        # The same link again, where a session is open: nothing happens. Elsewhere it is used up.
        await mine.goto(link)
        await expect(mine.get_by_text("Live", exact=True)).to_be_visible()
        await page.goto(link)
        await expect(page.get_by_role("alert")).to_contain_text("was used before")
        # A new link works in the page that is open already.
        await page.goto(await other.link(node))
        await expect(page.get_by_text("Live", exact=True)).to_be_visible()
        # What scripts of another page of this origin could read is half of it.
        assert await mine.evaluate("document.cookie") == ""
        await mine.get_by_role("button", name="Sign out").click()
        await expect(mine.get_by_role("heading", name="Sign in to this node")).to_be_visible()
        await mine.reload()
        await expect(mine.get_by_role("heading", name="Sign in to this node")).to_be_visible()
        await expect(page.get_by_text("Live", exact=True)).to_be_visible()
        # Ending all sessions reaches a page that is open, which asks nothing at the moment.
        code, text = await node.cli("console", "--sign-out")
        assert (code, text) == (0, "Ended 1 session.\n")
        await expect(page.get_by_role("heading", name="Sign in to this node")).to_be_visible()
        await expect(page.get_by_role("alert")).to_contain_text("Your session has ended")
        assert (user.faults, other.faults, user.foreign, other.foreign) == ([], [], [], [])


async def test_two_nodes_of_one_machine_keep_their_sessions_apart(start_node: StartNode, browser: Browser) -> None:
    one, two = await asyncio.gather(start_node("a", models=["tiny"]), start_node("b", models=["tiny"]))
    async with Visitor.of(browser) as user:
        first, second = await user.open(one), await user.open(two)
        for page in (first, second):
            await page.reload()
            await expect(page.get_by_text("Live", exact=True)).to_be_visible()


async def test_the_start_on_a_terminal_prints_a_link_that_works(tmp_path: Path) -> None:
    options = NodeOptions(tmp_path, models=["tiny"])
    shown = r"Console +(http://127\.0\.0\.1:\d+)/#sign-in=([\w-]+)"
    async with on_terminal(options.argv(), env=options.environment(), columns=240) as terminal:
        await terminal.until(shown + r"\s")
        found = re.search(shown, terminal.text)
        assert found is not None
        async with httpx.AsyncClient(base_url=found[1], trust_env=False) as client:
            assert (await client.get("/api/status")).status_code == 401
            made = await client.post("/api/session", json={"code": found[2]})
            key = {"x-mesh-llm-session": made.json()["key"]}
            assert (await client.get("/api/status", headers=key)).json()["ready"]
        terminal.type("\x03")
        assert await terminal.ended() == 0


async def test_a_plain_page_signs_in_too(start_node: StartNode, browser: Browser) -> None:
    """The page of a checkout where the full one is not built, served as the node serves it."""
    plain = Path(pages.__file__).parent / "page"
    node = await start_node("a", models=["tiny"])
    async with Visitor.of(browser) as user:
        page = await user.page(*addresses(node))
        for name in ("console.js", "console.css"):
            await page.route(f"**/{name}", lambda route, _, name=name: route.fulfill(path=plain / name))
        await page.route("**/", lambda route: route.fulfill(path=plain / "index.html", content_type="text/html"))
        await page.goto(f"http://127.0.0.1:{node.console.port}/")
        await expect(page.get_by_role("heading", name="Sign in to this node")).to_be_visible()
        code = (await user.link(node)).partition("#")[2]
        await page.goto(f"http://127.0.0.1:{node.console.port}/#{code}")
        await expect(page.locator("#models").get_by_role("cell", name="tiny")).to_be_visible()
        await page.reload()
        await expect(page.locator("#models").get_by_role("cell", name="tiny")).to_be_visible()
        assert user.faults == []


@asynccontextmanager
async def nginx(directory: Path, port: int, console: int) -> AsyncGenerator[None]:
    """A proxy with TLS for `PUBLIC`: one path that passes the name on, one that does not."""
    program = shutil.which("nginx", path="/usr/sbin:/usr/bin:/sbin:/bin")
    assert program is not None, "no nginx here: bash tools/system_packages.sh tests"
    certificate = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ["-subj", f"/CN={PUBLIC}", "-addext", f"subjectAltName=DNS:{PUBLIC}", "-days", "2"]
    files = ["-keyout", str(directory / "key.pem"), "-out", str(directory / "certificate.pem")]
    await asyncio.to_thread(subprocess.run, [*certificate, *names, *files], check=True, capture_output=True)
    (directory / "nginx.conf").write_text(_NGINX.format(directory=directory, port=port, console=console))
    # Not by `Process`, which knows its own by their environment: nginx writes its title over that.
    process = await asyncio.create_subprocess_exec(
        program, "-p", str(directory), "-c", str(directory / "nginx.conf"), stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(30):
            # Said once it listens.
            await process.stderr.readuntil(b"event method\n")
        yield
    finally:
        process.kill()
        await process.wait()


@pytest.mark.parametrize("path", ["named", "bare"])
async def test_behind_a_proxy_with_tls_the_page_works_below_its_path(
    start_node: StartNode, browser: Browser, tmp_path: Path, unused_tcp_port: int, path: str
) -> None:
    origin = f"https://{PUBLIC}:{unused_tcp_port}"
    node = await start_node("a", models=["tiny"], arguments=["--console-origin", f"{origin}/{path}"])
    proxy = tmp_path / "nginx"
    proxy.mkdir()
    async with (
        nginx(proxy, unused_tcp_port, node.console.port),
        Visitor.of(browser, ignore_https_errors=True) as user,
    ):
        code, text = await node.cli("console", "--no-browser")
        link = next(word for word in text.split() if word.startswith(f"{origin}/{path}/#sign-in="))
        assert code == 0
        page = await user.page(f"{origin}/{path}/")
        await page.goto(link)
        await expect(page.get_by_text("Live", exact=True)).to_be_visible()
        await page.reload()
        await page.goto(f"{origin}/{path}/#/join")
        # A change: that is what a proxy's origin was refused.
        await page.get_by_role("button", name="Make an invite").click()
        await expect(page.get_by_role("img", name="The invite as a QR code")).to_be_visible()
        (cookie,) = await user.context.cookies()
        assert [cookie.get(name) for name in ("secure", "httpOnly", "sameSite")] == [True, True, "Strict"]
        assert (user.faults, user.foreign) == ([], [])
    # Without the option the same proxy's page can change nothing, and another name gets nothing at all.
    token = {"x-mesh-llm-token": (node.options.home / "control-token").read_text()}
    bare = await node.console.post("/api/invites", {}, headers={**token, "origin": "https://other.example"})
    assert bare.status == 403
