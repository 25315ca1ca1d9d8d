"""The console's page in a real browser, on a real mesh of three nodes."""

import json
from pathlib import Path

import pytest
from playwright.async_api import Page, Route, expect
from tests.support.browser import PHONE, Visitor, serious_faults
from tests.support.page_mesh import HOSTILE_MESH, HOSTILE_MODEL, HOSTILE_NAME, PageMesh, ask, mesh, visitor

__all__ = ["mesh", "visitor"]
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]

PICTURE = Path(__file__).resolve().parents[2] / "docs/screenshots/mesh-phone.png"
PANELS = ("mesh", "models", "chat", "join", "activity")


async def test_the_picture_shows_the_mesh_and_hostile_names_are_text(mesh: PageMesh, visitor: Visitor) -> None:
    page = await visitor.open(mesh.desk)
    await expect(page.locator("svg [data-node]")).to_have_count(3)
    await expect(page.locator("svg text", has_text="<img src=x onerr")).to_be_visible()
    await page.get_by_role("button", name=HOSTILE_NAME, exact=True).click()
    details = page.get_by_role("complementary")
    await expect(details.get_by_role("heading")).to_have_text(HOSTILE_NAME)
    await expect(details).to_contain_text("tiny")
    await expect(page.locator("img")).to_have_count(0)
    # Choosing a model puts the nodes in the background that have nothing to do with it.
    await page.get_by_role("group", name="Show the nodes").get_by_role("button", name=HOSTILE_MODEL).click()
    await expect(page.locator("svg .node.off")).to_have_count(2)
    await expect(page.locator("svg .label:not(.off) text.name")).to_have_text("studio")
    await page.goto(page.url.split("#")[0] + "#/models")
    await expect(page.get_by_text(HOSTILE_MODEL, exact=True)).to_be_visible()
    await expect(page.get_by_role("banner")).to_contain_text(HOSTILE_MESH)
    assert await page.title() == f"Models · {HOSTILE_MESH}"


@pytest.mark.parametrize(
    "look",
    [
        pytest.param({"color_scheme": "light"}, id="light"),
        pytest.param({"color_scheme": "dark"}, id="dark"),
        pytest.param({"viewport": PHONE, "has_touch": True, "is_mobile": True}, id="phone"),
    ],
)
async def test_every_panel_is_usable_by_all(mesh: PageMesh, look: dict[str, object]) -> None:
    async with Visitor.of(mesh.browser, **look) as visitor:
        page = await visitor.open(mesh.desk)
        for panel in PANELS:
            await page.get_by_role("navigation").get_by_role("link", name=panel.capitalize()).click()
            await expect(page.get_by_role("heading", level=1, name=panel.capitalize())).to_be_attached()
            await settled(page)
            assert await serious_faults(page) == [], panel
            # Nothing is wider than the window: on a phone that would be scrolled sideways.
            assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth"), panel
        assert visitor.faults == []
        assert visitor.foreign == []


async def settled(page: Page) -> None:
    """Wait until nothing on the page says that it is loading."""
    await expect(page.locator(".skeleton")).to_have_count(0)


async def test_the_keyboard_alone_reaches_a_nodes_details(mesh: PageMesh, visitor: Visitor) -> None:
    page = await visitor.open(mesh.desk)
    await page.keyboard.press("Tab")
    await expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    await page.keyboard.press("Enter")
    await expect(page.locator("main")).to_be_focused()
    for _ in range(12):
        await page.keyboard.press("Tab")
        if await page.locator("svg [data-node]:focus").count():
            break
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("complementary")).to_be_visible()


async def test_an_answer_streams_to_its_end(mesh: PageMesh, visitor: Visitor) -> None:
    page = await visitor.open(mesh.desk, "chat")
    await ask(page, "Hello!")
    answer = page.get_by_role("article", name="Answer")
    await expect(answer).to_contain_text("tokens/s")
    await expect(answer).to_contain_text("first token after")
    await expect(answer).to_contain_text("tiny on ")
    said = await answer.locator(".markdown").inner_text()
    assert said.strip()
    # Kept in this browser: there after the page was closed, and asked again without a second question.
    await page.reload()
    await expect(answer.locator(".markdown")).to_have_text(said)
    await answer.get_by_role("button", name="Answer again").click()
    await expect(answer).to_contain_text("tokens/s")
    await expect(page.get_by_role("article")).to_have_count(2)
    await page.get_by_role("button", name="Edit the question").click()
    await page.get_by_label("Edit what you asked").fill("Who are you?")
    await page.get_by_role("button", name="Ask this instead").click()
    await expect(page.get_by_role("article", name="You")).to_have_text("Who are you?")
    await expect(answer).to_contain_text("tokens/s")


async def test_the_end_of_a_chat_stays_in_sight_when_the_receipt_comes(mesh: PageMesh) -> None:
    async with Visitor.of(mesh.browser, viewport=PHONE, has_touch=True, is_mobile=True) as visitor:
        page = await visitor.open(mesh.desk, "chat")
        for count in (1, 2, 3):
            await ask(page, "Hello!")
            receipts = page.get_by_text("Receipt: tiny")
            await expect(receipts).to_have_count(count)
            await expect(receipts.last).to_be_in_viewport(ratio=1)


ANSWERS_DO_NOT_END = """() => {
    const real = window.fetch;
    window.fetch = async (path, options) => {
        const answer = await real(path, options);
        if (!answer.headers.get("content-type")?.startsWith("text/event-stream")) return answer;
        const reader = answer.body.getReader();
        const body = new ReadableStream({
            start(controller) {
                options.signal.addEventListener("abort", () => controller.error(options.signal.reason));
            },
            async pull(controller) {
                const { value, done } = await reader.read();
                const text = done ? "" : new TextDecoder().decode(value);
                if (done || text.includes("[DONE]") || text.includes('"finish_reason":"')) return new Promise(() => {});
                controller.enqueue(value);
            },
        });
        return new Response(body, { status: answer.status, headers: answer.headers });
    };
}"""
"""The last part of each answer is held back: the models of tests answer faster than a browser under load clicks."""


async def test_an_answer_is_stopped(mesh: PageMesh, visitor: Visitor) -> None:
    page = await visitor.open(mesh.desk, "chat")
    await page.evaluate(ANSWERS_DO_NOT_END)
    await ask(page, "Tell me everything.", HOSTILE_MODEL)
    answer = page.get_by_role("article", name="Answer")
    await expect(answer.locator(".markdown")).not_to_be_empty()
    await page.get_by_role("button", name="Stop the answer").click()
    await expect(answer).to_contain_text("stopped")
    await expect(answer).to_contain_text(f"{HOSTILE_MODEL} on studio")
    await expect(page.get_by_role("button", name="Ask", exact=True)).to_be_visible()


HOSTILE_ANSWER = """<script>document.title = 'taken'</script><img src=x onerror="document.title='taken'">

[a link](javascript:document.title='taken') [another](https://example.org/) ![spy](http://example.org/spy.png?secret)
<iframe src="https://example.org/"></iframe> <a href="//example.org">raw</a>

| a | b |
|---|---|
| <b>c</b> | `<i>d</i>` |

```python
def greet(name: str) -> str:
    return "<img src=x onerror=alert(1)>"
```

Maths: $\\frac{a}{b} < \\href{javascript:alert(1)}{c}$ and

$$\\htmlStyle{color:red}{x}^2$$
"""


async def answering(page: Page, *chunks: dict[str, object], end: str = "data: [DONE]\n\n") -> None:
    """Have the model answer with these chunks: what a hostile one would say."""
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + end

    async def fulfil(route: Route) -> None:
        await route.fulfill(status=200, content_type="text/event-stream", body=body)

    await page.route("**/v1/chat/completions", fulfil)


def said(**delta: str) -> dict[str, object]:
    """A chunk of a streamed answer."""
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}


async def test_what_a_model_answers_is_text_however_hostile(mesh: PageMesh, visitor: Visitor) -> None:
    page = await visitor.open(mesh.desk, "chat")
    await answering(page, said(reasoning_content="<b>plotting</b>"), said(content=HOSTILE_ANSWER))
    await ask(page, "<img src=x onerror=\"document.title='taken'\">")
    answer = page.get_by_role("article", name="Answer")
    # Highlighting and maths are loaded now, since they are needed.
    await expect(answer.locator("pre code .hljs-keyword").first).to_have_text("def")
    await expect(answer.locator("math mfrac")).to_be_visible()
    shown = answer.locator(".markdown")
    await expect(shown).to_contain_text("<script>document.title = 'taken'</script><img src=x")
    await expect(shown.locator("pre")).to_contain_text("<img src=x onerror=alert(1)>")
    await expect(shown.locator("td").first).to_have_text("<b>c</b>")
    await expect(page.locator(".thread img, .thread script, .thread iframe, .thread b")).to_have_count(0)
    links = await shown.locator("a").evaluate_all("(all) => all.map((a) => [a.getAttribute('href'), a.rel, a.target])")
    assert links == [["https://example.org/", "noopener noreferrer nofollow", "_blank"]] * 2
    await expect(shown.locator("[style], [onerror], [data-x]")).to_have_count(0)
    # Thoughts are folded away until somebody asks for them.
    thoughts = answer.locator("details")
    await expect(thoughts.get_by_text("<b>plotting</b>")).to_be_hidden()
    await thoughts.get_by_text("Thoughts").click()
    await expect(thoughts.get_by_text("<b>plotting</b>")).to_be_visible()
    assert await page.title() == f"Chat · {HOSTILE_MESH}"
    assert await serious_faults(page) == []


async def test_an_answer_that_breaks_off_keeps_its_text_and_says_why(mesh: PageMesh, visitor: Visitor) -> None:
    page = await visitor.open(mesh.desk, "chat")
    gone: dict[str, object] = {"error": {"message": "The node studio was lost <b>here</b>.", "code": "stream_broken"}}
    await answering(page, said(content="As far as it came"), gone, end="")
    await ask(page, "Hello")
    answer = page.get_by_role("article", name="Answer")
    await expect(answer.locator(".markdown")).to_have_text("As far as it came")
    await expect(answer.get_by_role("alert")).to_contain_text("The node studio was lost <b>here</b>.")
    await page.unroute("**/v1/chat/completions")
    await answer.get_by_role("button", name="Answer again").click()
    await expect(answer).to_contain_text("tokens/s")
    await expect(answer.get_by_role("alert")).to_have_count(0)


async def test_images_go_to_models_that_take_them(mesh: PageMesh, visitor: Visitor) -> None:
    """No small model takes images: the node's word of one is changed on its way, and the answer made up."""
    status = await mesh.desk.status()
    for model in status["models"]:
        model["vision"] = model["name"] == "tiny"
    event = f"retry: 600000\nid: run.0\nevent: status\ndata: {json.dumps(status)}\n\n"

    async def events(route: Route) -> None:
        await route.fulfill(content_type="text/event-stream", body=event)

    await visitor.context.route("**/api/events", events)
    await visitor.context.route("**/api/status", lambda route: route.fulfill(json=status))
    page = await visitor.visit(mesh.desk, "chat")
    await answering(page, said(content="A page."))
    await page.get_by_label("Model", exact=True).select_option("tiny")
    await page.locator("input[type=file]").set_input_files(PICTURE)
    await expect(page.get_by_role("list", name="Images to send along").get_by_role("img")).to_be_visible()
    async with page.expect_request("**/v1/chat/completions") as asked:
        await ask(page, "What is this?")
    image, text = json.loads((await asked.value).post_data or "")["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert text == {"type": "text", "text": "What is this?"}
    await expect(page.get_by_role("article", name="You").get_by_role("img")).to_be_visible()
    await expect(page.get_by_role("article", name="Answer")).to_contain_text("A page.")
    # Another model takes none.
    await page.get_by_label("Model", exact=True).select_option(HOSTILE_MODEL)
    await expect(page.get_by_role("button", name="Send images along")).to_have_count(0)


async def test_settings_go_with_the_request_and_stay_with_the_conversation(mesh: PageMesh, visitor: Visitor) -> None:
    page = await visitor.open(mesh.desk, "chat")
    await page.get_by_role("button", name="Settings of this conversation").click()
    await page.get_by_label("System prompt").fill("Be brief.")
    await page.get_by_label("Longest answer, in tokens").fill("3")
    await page.get_by_role("button", name="Done").click()
    async with page.expect_request("**/v1/chat/completions") as asked:
        await ask(page, "Hello!")
    sent = json.loads((await asked.value).post_data or "")
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (sent["max_tokens"], "temperature" in sent) == (3, False)
    await expect(page.get_by_role("article", name="Answer")).to_contain_text("cut off at the longest answer")
    # Another conversation knows nothing of it; the first one is still there.
    await page.get_by_role("button", name="New conversation").first.click()
    await page.get_by_role("button", name="Settings of this conversation").click()
    await expect(page.get_by_label("System prompt")).to_have_value("")
    await page.keyboard.press("Escape")
    await page.reload()
    await page.get_by_role("list", name="Conversations").get_by_role("button", name="Hello!", exact=True).click()
    await page.get_by_role("button", name="Settings of this conversation").click()
    await expect(page.get_by_label("System prompt")).to_have_value("Be brief.")
