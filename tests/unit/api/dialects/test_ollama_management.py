"""The paths of Ollama that change the disk, with a store that records."""

import json
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field

import httpx
import pytest
from tests.support.api_harness import THERE, Api, peer_streams, running_api

from mesh_llm.api.dialects.ollama.management import PullStep
from mesh_llm.api.types import ApiConfig, KeyLimit
from mesh_llm.core.types.errors import MeshError

DIGEST = "sha256:" + "a" * 64


@dataclass
class Store:
    """Does nothing but remember."""

    calls: list[tuple[str, ...]] = field(default_factory=list[tuple[str, ...]])
    steps: list[PullStep] = field(default_factory=list[PullStep])
    fails: str = ""

    async def pull(self, model: str) -> AsyncGenerator[PullStep]:
        self.calls.append(("pull", model))
        for step in self.steps:
            yield step
        if self.fails:
            raise MeshError("hub_unreachable", self.fails, "", 503)

    async def delete(self, model: str) -> None:
        self.calls.append(("delete", model))
        if self.fails:
            raise MeshError("model_not_found", self.fails, "", 404)

    async def copy(self, source: str, destination: str) -> str:
        self.calls.append(("copy", source, destination))
        return destination

    async def create(self, model: str, digest: str) -> str:
        self.calls.append(("create", model, digest))
        return model

    def has_blob(self, digest: str) -> bool:
        return ("blob", digest) in [call[:2] for call in self.calls]

    async def store_blob(self, digest: str, size: int | None, pieces: AsyncIterator[bytes]) -> None:
        content = b"".join([piece async for piece in pieces])
        self.calls.append(("blob", digest, str(size), content.decode()))


async def send(api: Api, method: str, path: str, body: object = None, **headers: str) -> httpx.Response:
    content = json.dumps(body).encode() if body is not None else b""
    return await api.client.request(method, f"/api/{path}", content=content, headers=headers)


FETCHING = PullStep(phase="fetching", digest=DIGEST, total=10, completed=5)


async def test_a_pull_reports_its_progress():
    async with running_api() as api:
        asking = PullStep(phase="asking")
        store = Store(
            steps=[asking, FETCHING, PullStep(phase="checking", digest=DIGEST, total=10, completed=10), asking]
        )
        api.server.use_store(store)
        answer = await send(api, "POST", "pull", {"model": "m:7b"})
        assert answer.headers["content-type"] == "application/x-ndjson"
        assert [json.loads(line) for line in answer.text.splitlines()] == [
            {"status": "pulling manifest"},
            {"status": "pulling aaaaaaaaaaaa", "digest": DIGEST, "total": 10, "completed": 5},
            {"status": "verifying sha256 digest"},
            {"status": "writing manifest"},
            {"status": "success"},
        ]
        whole = await send(api, "POST", "pull", {"name": "m:7b", "stream": False})
        assert whole.json() == {"status": "success"}
        assert store.calls == [("pull", "m:7b")] * 2


async def test_a_pull_that_fails():
    async with running_api() as api:
        api.server.use_store(Store(steps=[FETCHING], fails="no hub"))
        answer = await send(api, "POST", "pull", {"model": "m"})
        assert json.loads(answer.text.splitlines()[-1]) == {"error": "no hub"}
        whole = await send(api, "POST", "pull", {"model": "m", "stream": False})
        assert (whole.status_code, whole.json()) == (503, {"error": "no hub"})


async def test_models_are_deleted_copied_and_created():
    async with running_api() as api:
        store = Store()
        api.server.use_store(store)
        assert (await send(api, "DELETE", "delete", {"model": "m"})).status_code == 200
        assert (await send(api, "POST", "copy", {"source": "a", "destination": "b"})).status_code == 200
        made = await send(api, "POST", "create", {"model": "c", "files": {"x.gguf": DIGEST}})
        assert json.loads(made.text.splitlines()[-1]) == {"status": "success"}
        assert (await send(api, "POST", "create", {"model": "d", "from": "a", "stream": False})).json()[
            "status"
        ] == "success"
        assert store.calls == [("delete", "m"), ("copy", "a", "b"), ("create", "c", DIGEST), ("copy", "a", "d")]
        store.fails = "model 'm' not found."
        missing = await send(api, "DELETE", "delete", {"model": "m"})
        assert (missing.status_code, missing.json()) == (404, {"error": "model 'm' not found."})


@pytest.mark.parametrize(
    ("path", "body", "error"),
    [
        ("create", {"model": "c"}, "neither 'from' or 'files'"),
        ("create", {"model": "c", "from": "a", "system": "be kind"}, "without system"),
        ("create", {"model": "c", "from": "a", "quantize": "q4_0"}, "without quantize"),
        ("create", {"model": "c", "files": {"a": DIGEST, "b": DIGEST}}, "one GGUF file"),
        ("create", {"from": "a"}, "model is required"),
        ("copy", {"source": "a"}, "invalid model name"),
        ("pull", {}, "model is required"),
        ("pull", {"model": "a\n"}, "invalid model name"),
        ("push", {"model": "a"}, "not pushed"),
    ],
)
async def test_what_cannot_be_done_is_refused(path: str, body: dict[str, object], error: str):
    async with running_api() as api:
        store = Store()
        api.server.use_store(store)
        answer = await send(api, "POST", path, body)
        shown = answer.json() if answer.status_code == 400 else json.loads(answer.text.splitlines()[-1])
        assert error in shown["error"]
        assert not store.calls


async def test_a_file_is_uploaded():
    async with running_api() as api:
        store = Store()
        api.server.use_store(store)
        missing = await api.client.head(f"/api/blobs/{DIGEST}")
        assert (missing.status_code, missing.content) == (404, b"")
        stored = await api.client.post(f"/api/blobs/{DIGEST}", content=b"abc" * 50_000)
        assert (stored.status_code, store.calls) == (201, [("blob", DIGEST, "150000", "abc" * 50_000)])
        assert (await api.client.head(f"/api/blobs/{DIGEST}")).status_code == 200
        assert (await api.client.post(f"/api/blobs/{DIGEST}", content=b"abc")).status_code == 200
        assert (await api.client.put(f"/api/blobs/{DIGEST}", content=b"abc")).status_code == 405


async def test_an_upload_may_be_larger_than_a_request_but_not_stop():
    config = ApiConfig(port=0, body_bytes=10, body_seconds=0.3)
    async with running_api(config=config) as api:
        store = Store()
        api.server.use_store(store)

        async def pieces() -> AsyncGenerator[bytes]:
            for _ in range(5):
                yield b"abcdef"

        assert (await api.client.post(f"/api/blobs/{DIGEST}", content=pieces())).status_code == 201
        assert store.calls == [("blob", DIGEST, "None", "abcdef" * 5)]
        head = f"POST /api/blobs/{DIGEST[:-1]}b HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nabc"
        assert b" 408 " in (await api.raw(head.encode())).partition(b"\r\n")[0]
        assert len(store.calls) == 1


async def test_only_the_nodes_user_changes_models():
    async with running_api() as api:
        store = Store()
        api.server.use_store(store)
        for path, method in (
            ("pull", "POST"),
            ("delete", "DELETE"),
            ("copy", "POST"),
            ("create", "POST"),
            (f"blobs/{DIGEST}", "POST"),
        ):
            page = await send(api, method, path, {"model": "m"}, origin="http://localhost:3000")
            assert (page.status_code, "web page" in page.json()["error"]) == (403, True)
            image = await send(api, method, path, {"model": "m"}, **{"sec-fetch-site": "same-site"})
            assert image.status_code == 403
        assert not store.calls
        async with peer_streams(api.server, THERE) as address:
            for method, path in (("POST", "pull"), ("DELETE", "delete"), ("POST", f"blobs/{DIGEST}")):
                async with httpx.AsyncClient(base_url=f"http://{address}", trust_env=False) as peer:
                    assert (await peer.request(method, f"/api/{path}", json={"model": "m"})).status_code == 404
        assert not store.calls
    async with running_api(config=ApiConfig(port=0, keys=("secret",))) as api:
        api.server.use_store(store)
        assert (await send(api, "DELETE", "delete", {"model": "m"})).status_code == 401
        key = {"authorization": "Bearer secret"}
        assert (await send(api, "DELETE", "delete", {"model": "m"}, **key)).status_code == 200
    limits = {"guest": KeyLimit(tokens_per_day=1000)}
    guests = ApiConfig(port=0, keys=("guest:long-secret", "mine:longer-secret"), key_limits=limits)
    async with running_api(config=guests) as api:
        api.server.use_store(store)
        before = list(store.calls)
        for method, path in (("DELETE", "delete"), ("POST", "pull"), ("POST", f"blobs/{DIGEST}")):
            refused = await send(api, method, path, {"model": "m"}, authorization="Bearer long-secret")
            assert (refused.status_code, "with a limit" in refused.json()["error"]) == (403, True)
        assert store.calls == before
        mine = await send(api, "DELETE", "delete", {"model": "m"}, authorization="Bearer longer-secret")
        assert mine.status_code == 200
    async with running_api() as api:
        none = await send(api, "POST", "pull", {"model": "m"})
        assert (none.status_code, "keeps no models" in none.json()["error"]) == (400, True)
