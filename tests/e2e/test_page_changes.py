"""The console's page while the mesh changes, and who may change it."""

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from playwright.async_api import Page, Route, expect
from tests.support.browser import Visitor, becomes, serious_faults
from tests.support.hub_server import Fault, HubServer
from tests.support.page_mesh import PageMesh, mesh, visitor
from tests.support.pool import alive, until, warm

from mesh_llm.engine.accelerators.index import VARIABLE

__all__ = ["mesh", "visitor"]
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]


async def test_a_model_is_dropped_and_loaded(mesh: PageMesh, visitor: Visitor) -> None:
    page = await visitor.open(mesh.second, "models")
    row = page.locator('li[data-model="tiny"]')
    await row.get_by_role("button", name="Drop tiny").click()
    await page.get_by_role("dialog").get_by_role("button", name="Drop it").click()
    # The other node serves it still, so that it stays warm in the mesh.
    await expect(row.get_by_role("button", name="Load tiny")).to_be_visible()
    await expect(row).to_contain_text("desk")
    await until(mesh.desk, warm("tiny", 1), "served by one node only")
    await row.get_by_role("button", name="Load tiny").click()
    await expect(row.get_by_role("button", name="Drop tiny")).to_be_visible()
    await until(mesh.desk, warm("tiny", 2), "served by both again")


async def test_what_does_not_work_on_this_machine_is_on_its_page(mesh: PageMesh, visitor: Visitor) -> None:
    # No machine of the tests has ROCm's compiler.
    node = await mesh.start("asking", "--gpu", "rocm", models=["tiny"], env={VARIABLE: "none"})
    try:
        page = await visitor.open(node, "mesh")
        here = page.get_by_role("region", name="This node")
        await expect(here).to_contain_text("The GPU is not used.")
        await expect(here).to_contain_text("hipcc")
        assert await serious_faults(page) == []
    finally:
        await node.close()


QWEN = ("unsloth/Qwen3-8B-GGUF", "Qwen3-8B-Q4_K_M.gguf")


async def test_a_model_is_fetched_with_progress_stopped_and_fetched_again(
    mesh: PageMesh, visitor: Visitor, random_model: Callable[[str], Path]
) -> None:
    with HubServer() as hub:
        hub.add(*QWEN, random_model("small").read_bytes())
        slow = hub.faults["/".join(QWEN)] = Fault(bytes_per_second=200_000)
        node = await mesh.start("fetcher", models=["tiny"], env={"HF_ENDPOINT": hub.endpoint})
        try:
            page = await visitor.open(node, "models")
            fetch = page.get_by_role("region", name="Fetch a model")
            await fetch.get_by_role("textbox").fill(f"hf:{QWEN[0]}")
            await fetch.get_by_role("button", name="Download").click()
            bar = fetch.get_by_role("progressbar")
            await expect(bar).to_have_attribute("value", re.compile(r"0\.\d+"))
            await fetch.get_by_role("button", name="Stop").click()
            await expect(fetch.get_by_text("cancelled")).to_be_visible()
            slow.bytes_per_second = 0
            await fetch.get_by_role("textbox").fill(f"hf:{QWEN[0]}")
            await fetch.get_by_role("button", name="Download").click()
            await expect(fetch.get_by_text("done")).to_be_visible()
            row = page.locator('li[data-model="Qwen3-8B-Q4_K_M"]')
            await expect(row.get_by_text("warm")).to_be_visible()
            await row.get_by_role("button", name="Plan").click()
            await expect(page.get_by_role("dialog")).to_contain_text("Runs on this node")
        finally:
            await node.close()


async def test_the_printed_invite_stands_on_the_page_with_its_scope(mesh: PageMesh, visitor: Visitor) -> None:
    page = await visitor.open(mesh.desk, "join")
    card = page.get_by_role("region", name="Add a machine")
    await expect(card).to_contain_text("The scope of this invite is split")
    await card.get_by_role("button", name="Show it").click()
    command = await page.get_by_label("Command to add a machine").inner_text()
    assert command == f"mesh-llm --join {await mesh.desk.invite()}"
    assert await serious_faults(page) == []


async def test_a_member_is_lowered_and_raised_on_the_page(mesh: PageMesh, visitor: Visitor) -> None:
    page = await visitor.open(mesh.desk)
    await page.get_by_role("button", name="studio", exact=True).last.click()
    details = page.get_by_label("Details of studio")
    scope = details.locator("[data-scope]")
    await expect(scope).to_contain_text("split")
    await details.get_by_role("button", name="End splitting models with it").click()
    await expect(scope).to_contain_text("serve: no part in split models")
    await until(mesh.third, lambda status: status["scope"] == "serve", "told that it was lowered")
    assert await serious_faults(page) == []
    await details.get_by_role("button", name="Let it split models").click()
    await expect(scope).to_contain_text("split: serves, and computes parts of models")
    await until(mesh.third, lambda status: status["scope"] == "split", "told that it was raised")


async def test_a_member_is_cut_off_on_the_page(mesh: PageMesh, visitor: Visitor) -> None:
    token = await mesh.desk.invite()
    fourth = await mesh.start("attic", models=["tiny"], join=[token])
    try:
        page = await visitor.open(mesh.desk)
        await page.get_by_role("button", name="attic", exact=True).last.click()
        details = page.get_by_label("Details of attic")
        await details.get_by_role("button", name="Cut it off").click()
        assert await serious_faults(page) == []
        await page.get_by_role("dialog").get_by_role("button", name="Cut it off").click()
        await expect(page.get_by_text("attic is cut off, in the whole mesh.")).to_be_visible()
        await expect(page.locator("svg [data-node]")).to_have_count(3)
    finally:
        await fourth.close()


async def test_an_invite_made_on_the_page_lets_a_fourth_node_in_until_it_is_revoked(
    mesh: PageMesh, visitor: Visitor
) -> None:
    page = await visitor.open(mesh.desk, "join")
    await page.get_by_role("radio", name="Ask and serve").check()
    await page.get_by_label("Machines at most").fill("1")
    await page.get_by_role("button", name="Make an invite").click()
    await expect(page.get_by_role("img", name="The invite as a QR code")).to_be_visible()
    command = await page.get_by_label("Command to join").inner_text()
    program, option, token = command.split()
    assert (program, option) == ("mesh-llm", "--join")
    # Somebody who is not asked to be spared of movement watches the picture.
    watching = await visitor.open(mesh.desk)
    await watching.emulate_media(reduced_motion="no-preference")
    second = (await mesh.second.status())["node_id"]
    await watching.evaluate(
        """(id) => {
            window.places = new Set();
            const look = () => {
                window.places.add(document.querySelector(`svg [data-node="${id}"]`)?.style.transform);
                requestAnimationFrame(look);
            };
            look();
        }""",
        second,
    )
    fourth = await mesh.start("shed", models=["tiny"], join=[token])
    try:
        await expect(watching.locator("svg [data-node]")).to_have_count(4)
        await expect(watching.locator("svg text.name", has_text="shed")).to_be_visible()
        # Making room for it, the others moved: from place to place, with places in between.
        await becomes(watching, "() => window.places.size > 3")
        await page.reload()
        row = page.get_by_role("table").get_by_role("row").filter(has_text="used up")
        await row.get_by_role("button", name="Revoke").click()
        await page.get_by_role("dialog").get_by_role("button", name="Revoke it").click()
        await expect(watching.locator("svg [data-node]")).to_have_count(3)
    finally:
        await fourth.close()


async def test_machines_that_knock_are_let_in_and_the_mesh_is_listed_from_the_page(
    mesh: PageMesh, visitor: Visitor
) -> None:
    """The page's side of it: what it shows and sends; the calls themselves have tests of their own."""
    knocking = {"id": "ab" * 32, "name": "<i>tablet</i>", "scope": "serve", "since": time.time() - 90, "address": "::1"}
    publication = {"on": False, "name": "", "relays": [], "listed": False, "expires": None, "problem": ""}
    publication["consent"] = "This mesh becomes public. Anybody can read its name."
    sent: list[tuple[str, object]] = []

    async def approvals(route: Route) -> None:
        if route.request.method == "POST":
            sent.append((route.request.url.rpartition("/")[2], route.request.post_data_json))
            await route.fulfill(json={"id": knocking["id"], "approved": True})
        else:
            await route.fulfill(json={"waiting": [] if sent else [knocking]})

    async def listing(route: Route) -> None:
        if route.request.method == "POST":
            sent.append(("publication", route.request.post_data_json))
            publication.update(on=True, listed=True, name="attic mesh", relays=["wss://relay.example"], consent="")
        await route.fulfill(json=publication)

    await visitor.context.route(re.compile(r"/api/approvals"), approvals)
    await visitor.context.route("**/api/publication", listing)
    page = await visitor.open(mesh.desk, "join")
    await page.get_by_role("button", name="Let <i>tablet</i> in").click()
    await expect(page.get_by_text("None at the moment.", exact=False)).to_be_visible()
    assert await serious_faults(page) == []
    switch = page.get_by_role("checkbox", name="Strangers can find this mesh")
    dialog = page.get_by_role("dialog")
    await switch.click()
    await expect(dialog).to_contain_text("This mesh becomes public.")
    assert await serious_faults(page) == []
    await dialog.get_by_role("button", name="Cancel").click()
    await expect(switch).not_to_be_checked()
    assert len(sent) == 1
    await switch.click()
    await dialog.get_by_role("button", name="List it").click()
    await expect(page.get_by_text("Listed as attic mesh on wss://relay.example.")).to_be_visible()
    assert sent == [(knocking["id"], {"approved": True}), ("publication", {"on": True, "agreed": True})]
    await expect(switch).to_be_checked()


async def test_a_killed_node_is_seen_within_five_seconds(mesh: PageMesh, visitor: Visitor) -> None:
    page = await visitor.open(mesh.desk)
    gone = await mesh.third.status()
    node = page.locator(f'svg [data-node="{gone["node_id"]}"]')
    await expect(node).to_be_visible()
    try:
        await mesh.third.crash()
        killed = time.monotonic()
        # Suspected at once, and then gone: the picture shows both.
        await becomes(
            page,
            """(id) => {
                const node = document.querySelector(`svg [data-node="${id}"]`);
                return node === null || node.classList.contains("suspect");
            }""",
            gone["node_id"],
        )
        assert time.monotonic() - killed < 5.0
        await expect(node).to_have_count(0)
        await page.goto(page.url.split("#")[0] + "#/activity")
        await expect(page.get_by_role("region", name="What happened")).to_contain_text("studio")
    finally:
        await mesh.third.restart()
    await until(mesh.desk, alive(2), "seeing it again", 60)


async def test_a_page_whose_node_was_started_again_asks_to_sign_in_and_goes_on(mesh: PageMesh) -> None:
    node = await mesh.start("porch", client=True, join=[await mesh.desk.invite()])
    async with Visitor.of(mesh.browser) as visitor:
        # The same port again, as a user's node has.
        port = node.console.port
        page = await visitor.open(node, "models")
        await node.close()
        await expect(page.get_by_text("The node does not answer.", exact=False).first).to_be_visible()
        await expect(page.get_by_text("Disconnected")).to_be_visible()
        again = await mesh.start("porch", "--console", str(port), client=True, join=[await mesh.desk.invite()])
        # While no node was there, any program could have had the port, and all that the page sent to it.
        await expect(page.get_by_role("heading", name="Sign in to this node")).to_be_visible()
        await expect(page.get_by_text("Your session has ended", exact=False)).to_be_visible()
        await page.goto(await visitor.link(again))
        await expect(page.get_by_text("Live", exact=True)).to_be_visible()
        # What it shows is of the new run, and what only the user may see.
        await page.goto(page.url.split("#")[0] + "#/join")
        await expect(page.get_by_role("heading", name="Invites made here")).to_be_visible()
        await expect(page.get_by_text("Only the user who runs", exact=False)).to_have_count(0)
        await again.close()


@asynccontextmanager
async def foreign_site(script: str) -> AsyncGenerator[str]:
    """A web page of another origin on this machine, as an attacker's would be."""
    body = f"<!doctype html><title>waiting</title><script>{script}</script>".encode()
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(head + body)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"


_ATTACK = """
const base = 'http://localhost:PORT';
const json = {'content-type': 'application/json'};
const tries = [
  ['page', () => fetch(base + '/')],
  ['status', () => fetch(base + '/api/status')],
  ['drop', () => fetch(base + '/api/drop', {method: 'POST', body: '{"model":"tiny"}', headers: json})],
  ['form', () => fetch(base + '/api/stop', {method: 'POST', mode: 'no-cors', body: '{}'})],
  ['chat', () => fetch(base + '/v1/chat/completions', {method: 'POST', body: '{}'})],
];
(async () => {
  const told = [];
  for (const [name, ask] of tries) {
    try {
      const answer = await ask();
      told.push(name + ':' + (answer.type === 'opaque' ? 'hidden' : answer.status));
    } catch { told.push(name + ':refused'); }
  }
  const frame = document.createElement('iframe');
  frame.src = base + '/';
  document.body.append(frame);
  document.title = told.join(' ');
})();
"""


async def test_a_page_of_another_origin_can_neither_read_nor_change_anything(mesh: PageMesh) -> None:
    script = _ATTACK.replace("PORT", str(mesh.port(mesh.desk)))
    async with foreign_site(script) as url, Visitor.of(mesh.browser) as visitor:
        page: Page = await visitor.context.new_page()
        await page.goto(url)
        await expect(page).to_have_title("page:refused status:refused drop:refused form:refused chat:refused")
    status = await mesh.desk.status()
    assert any(model["name"] == "tiny" and model["here"] and model["status"] == "warm" for model in status["models"])
    assert mesh.desk.process.status is None


async def test_the_settings_of_a_model_are_written_to_the_file(mesh: PageMesh, visitor: Visitor) -> None:
    file = mesh.second.home / "config.toml"
    file.write_text("# mine\n[aliases]\nother = 'tiny'  # stays\n")
    page = await visitor.open(mesh.second, "models")
    button = page.locator('li[data-model="tiny"]').get_by_role("button", name="Settings of tiny")
    await button.click()
    dialog = page.get_by_role("dialog")
    await dialog.get_by_label("Further names").fill("gpt-4o-mini\nclaude-*")
    await dialog.get_by_label("Never unload it").check()
    assert not await serious_faults(page)
    await dialog.get_by_role("button", name="Save").click()
    await expect(dialog).to_be_hidden()
    await expect(page.get_by_text("In effect now: models.tiny, aliases.")).to_be_visible()
    text = file.read_text()
    assert text.startswith("# mine\n")
    assert "# stays" in text
    assert 'aliases = ["gpt-4o-mini", "claude-*"]' in text
    asked = {"model": "claude-opus-4-8", "max_tokens": 1, "messages": [{"role": "user", "content": "Hi"}]}
    answer = (await mesh.second.api.post("/v1/chat/completions", asked)).expect()
    assert answer.headers["x-mesh-llm-model"] == "tiny"
    # A value that the node refuses stays in the form, with the reason.
    await button.click()
    await dialog.get_by_label("Options of llama-server").fill("--host\n0.0.0.0")
    await dialog.get_by_role("button", name="Save").click()
    await expect(dialog.get_by_role("alert")).to_contain_text("--host is refused")
    assert file.read_text() == text
    await dialog.get_by_label("Options of llama-server").fill("")
    await dialog.get_by_label("Further names").fill("")
    await dialog.get_by_role("button", name="Save").click()
    await expect(dialog).to_be_hidden()
    assert "gpt-4o-mini" not in file.read_text()
