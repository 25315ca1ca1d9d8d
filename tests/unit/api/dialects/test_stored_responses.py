"""Stored answers: whose they are, how long they are kept, and how conversations are put together."""

import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mesh_llm.api.dialects.openai_responses import ResponsesContext, correct_responses
from mesh_llm.api.dialects.stored_responses import StoredResponses, StoreLimits
from mesh_llm.api.request import Request
from mesh_llm.core.types.errors import MeshError

OWNER, OTHER = "a" * 64, "b" * 64


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


class Taken:
    """A reply that keeps what is sent."""

    started = False
    status = 0
    body = b""

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = status
        assert (b"content-type", b"application/json") in headers

    async def write(self, data: bytes) -> None:
        self.body += data

    async def end(self, data: bytes = b"") -> None:
        self.body += data

    def abort(self) -> None: ...

    def watch(self, gone: object) -> None: ...

    def unwatch(self) -> None: ...


async def no_body() -> bytes:
    return b""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "responses"


def output(name: str, said: str) -> dict[str, Any]:
    return {
        "type": "message",
        "id": f"msg_{name}",
        "role": "assistant",
        "content": [{"type": "output_text", "text": said, "annotations": []}],
    }


async def context(kept_by: StoredResponses, owner: str = OWNER, **fields: object) -> ResponsesContext:
    raw = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in fields.items()}
    return await kept_by.context(owner, raw, "small", 1024)


async def turn(kept_by: StoredResponses, name: str, asked: object, said: str, **fields: object) -> dict[str, Any]:
    """A request and its answer; returns what the engine was sent."""
    given: dict[str, Any] = {"input": asked} | fields
    known = await context(kept_by, **given)
    body = msgspec.json.encode(given)
    corrected = correct_responses(body, msgspec.json.decode(body, type=dict[str, msgspec.Raw]), known)
    assert corrected.whole is not None
    corrected.whole({"id": f"resp_{name}", "status": "completed", "output": [output(name, said)], "usage": {}})
    return msgspec.json.decode(corrected.body)


async def get(store: StoredResponses, path: str, owner: str = OWNER, method: str = "GET", query: str = "") -> Any:
    reply = Taken()
    request = Request(method, f"/v1/responses/{path}", query, (), no_body)
    assert store.takes(request.path)
    await store.answer(request, owner, reply, ())
    assert reply.status == 200
    return msgspec.json.decode(reply.body) if reply.body else None


def files(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*.json"))


def texts(listed: list[Any]) -> list[str]:
    return [item["content"][0]["text"] for item in listed]


async def test_a_conversation_goes_on(directory: Path) -> None:
    store = StoredResponses(directory)
    await turn(store, "1", "one", "first")
    sent = await turn(store, "2", [{"role": "user", "content": "two"}], "second", previous_response_id="resp_1")
    assert texts(sent["input"]) == ["one", "first", "two"]
    assert "previous_response_id" not in sent
    sent = await turn(store, "3", "three", "third", previous_response_id="resp_2")
    assert texts(sent["input"]) == ["one", "first", "two", "second", "three"]
    told = await get(store, "resp_3")
    assert (told["id"], told["store"], told["previous_response_id"]) == ("resp_3", True, "resp_2")
    listed = await get(store, "resp_2/input_items", query="order=asc")
    assert texts(listed["data"]) == ["one", "first", "two"]
    assert all(item["id"] for item in listed["data"])
    page = await get(store, "resp_3/input_items", query="limit=2")
    assert (texts(page["data"]), page["has_more"]) == (["three", "second"], True)
    page = await get(store, "resp_3/input_items", query=f"limit=9&after={page['last_id']}")
    assert (texts(page["data"]), page["has_more"]) == (["two", "first", "one"], False)
    await store.close()


async def test_a_restart_loses_nothing(directory: Path) -> None:
    first = StoredResponses(directory)
    await turn(first, "1", "one", "first")
    await first.close()
    again = StoredResponses(directory)
    assert (await get(again, "resp_1"))["output"][0]["id"] == "msg_1"
    await again.close()


async def test_files_are_for_the_user_only(directory: Path) -> None:
    store = StoredResponses(directory)
    await turn(store, "1", "one", "first")
    await store.close()
    path = files(directory)[0]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in (directory, path.parent)} == {0o700}
    assert OWNER not in str(path)


async def test_another_key_finds_nothing(directory: Path) -> None:
    store = StoredResponses(directory)
    await turn(store, "1", "one", "first")
    for method in ("GET", "DELETE"):
        with pytest.raises(MeshError) as caught:
            await get(store, "resp_1", OTHER, method)
        assert (caught.value.status, caught.value.code) == (404, "response_not_found")
    with pytest.raises(MeshError) as caught:
        await context(store, OTHER, previous_response_id="resp_1")
    assert (caught.value.status, caught.value.code) == (400, "previous_response_not_found")
    with pytest.raises(MeshError, match="msg_1"):
        await context(store, OTHER, input=[{"type": "item_reference", "id": "msg_1"}])
    assert (await get(store, "resp_1"))["id"] == "resp_1"
    await store.close()


async def test_an_item_can_be_referred_to(directory: Path) -> None:
    store = StoredResponses(directory)
    await turn(store, "1", "one", "first")
    asked = [{"type": "item_reference", "id": "msg_1"}, {"role": "user", "content": "two"}]
    assert texts((await turn(store, "2", asked, "second"))["input"]) == ["first", "two"]
    await store.close()


async def test_what_is_deleted_is_gone(directory: Path) -> None:
    store = StoredResponses(directory)
    await turn(store, "1", "one", "first")
    told = await get(store, "resp_1", method="DELETE")
    assert told == {"id": "resp_1", "object": "response", "deleted": True}
    with pytest.raises(MeshError):
        await get(store, "resp_1")
    await store.close()
    assert not files(directory)


@pytest.mark.parametrize("kept", [True, False])
async def test_what_is_not_to_be_stored_is_not(directory: Path, *, kept: bool) -> None:
    store = StoredResponses(directory if kept else None)
    await turn(store, "1", "one", "first", **({"store": False} if kept else {}))
    with pytest.raises(MeshError) as caught:
        await get(store, "resp_1")
    assert ("--no-store" in caught.value.hint) is not kept
    await store.close()
    assert not files(directory.parent)


async def test_a_stream_that_is_cut_is_not_stored(directory: Path) -> None:
    store = StoredResponses(directory)
    body = b'{"input":"one","stream":true}'
    corrected = correct_responses(
        body, msgspec.json.decode(body, type=dict[str, msgspec.Raw]), await context(store, input="one", stream=True)
    )
    assert corrected.events is not None
    created = b'{"type":"response.created","response":{"id":"resp_1","status":"in_progress"}}'
    assert corrected.events(b"event: response.created\ndata: " + created + b"\n\n")
    await store.close()
    assert not files(directory)


async def test_it_is_bounded(directory: Path) -> None:
    clock = Clock()
    store = StoredResponses(directory, StoreLimits(count=3, each_bytes=10_000, seconds=1000), clock)
    for name in "123":
        await turn(store, name, name, name)
        await store.write()
        clock.now += 1
    await get(store, "resp_1")
    clock.now += 1
    await turn(store, "4", "4", "4")
    await store.write()
    assert {path.stem for path in files(directory)} == {"resp_1", "resp_3", "resp_4"}
    await turn(store, "5", "x" * 20_000, "5")
    await store.write()
    assert len(files(directory)) == 3
    clock.now += 2000
    with pytest.raises(MeshError):
        await get(store, "resp_4")
    again = StoredResponses(directory, StoreLimits(seconds=1000), clock)
    with pytest.raises(MeshError):
        await get(again, "resp_1")
    assert not files(directory)
    await store.close()
    await again.close()


async def test_bytes_are_bounded(directory: Path) -> None:
    store = StoredResponses(directory, StoreLimits(total_bytes=5_000))
    for name in "1234":
        await turn(store, name, "x" * 1000, name)
        await store.write()
    sizes = [path.stat().st_size for path in files(directory)]
    assert sum(sizes) <= 5_000
    assert sizes
    assert await get(store, "resp_4")
    await store.close()


@pytest.mark.parametrize("name", ["..", "resp_..%2f", "resp_a/b", "nothing", "resp_" + "a" * 200, "resp_a/../x"])
async def test_no_name_leads_out_of_the_directory(directory: Path, name: str) -> None:
    store = StoredResponses(directory)
    with pytest.raises(MeshError) as caught:
        await get(store, name)
    assert caught.value.status == 404
    await store.close()


async def test_a_damaged_file_is_no_answer(directory: Path) -> None:
    store = StoredResponses(directory)
    await turn(store, "1", "one", "first")
    await store.write()
    files(directory)[0].write_bytes(b"{")
    with pytest.raises(MeshError):
        await get(store, "resp_1")
    await store.close()


async def test_what_is_not_there_is_refused(directory: Path) -> None:
    store = StoredResponses(directory)
    await turn(store, "1", "one", "first")
    for path, method, query, status in (
        ("resp_1/cancel", "POST", "", 400),
        ("resp_1", "GET", "stream=true", 400),
        ("resp_1", "POST", "", 405),
        ("resp_1/other", "GET", "", 404),
    ):
        with pytest.raises(MeshError) as caught:
            await get(store, path, method=method, query=query)
        assert caught.value.status == status
    assert not store.takes("/v1/responses")
    assert not store.takes("/v1/responses/input_tokens")
    await store.close()
