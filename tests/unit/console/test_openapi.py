"""The description of the management API is the one that its calls give, and names everything that is bound."""

from pathlib import Path

import httpx
import msgspec
from starlette.routing import Mount
from tests.unit.console.fake_daemon import FakeDaemon, console_app

from mesh_llm.console.auth import Access
from mesh_llm.console.openapi import FILE, describe, text
from mesh_llm.console.routes import CALLS


def test_the_file_is_what_the_calls_give() -> None:
    assert FILE.read_text(encoding="utf-8") == text(), "run: python -m mesh_llm.console.openapi"


def test_every_bound_path_is_described(tmp_path: Path) -> None:
    app = console_app(FakeDaemon(), tmp_path, page=False)
    (api,) = (route for route in app.routes if isinstance(route, Mount))
    bound = {f"{api.path}{getattr(route, 'path', '')}" for route in api.routes} - {"/api/openapi.json"}
    assert bound == set(describe()["paths"])


def test_references_lead_somewhere() -> None:
    described = describe()
    schemas = described["components"]["schemas"]
    raw = msgspec.json.encode(described).decode()
    for reference in raw.split('"$ref":"')[1:]:
        path = reference.partition('"')[0]
        assert path.removeprefix("#/components/schemas/") in schemas


def test_what_changes_something_is_for_the_user_alone() -> None:
    read = {(call.method, call.path) for call in CALLS if call.access is Access.READ}
    assert {method for method, _ in read} == {"GET"}
    assert {call.name for call in CALLS if call.access is Access.OPEN} == {"health", "sign_in"}
    described = describe()["paths"]
    for call in CALLS:
        assert ("security" in described[call.path][call.method.lower()]) is (call.access is not Access.OPEN)


async def test_a_wrong_method_is_told_as_one_where_the_page_is_served(tmp_path: Path) -> None:
    app = console_app(FakeDaemon(), tmp_path, page=True)
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:3131") as client:
        wrong = await client.get("/api/load")
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
        assert wrong.headers["allow"] == "POST"
        assert (await client.get("/api/nothing")).status_code == 404
