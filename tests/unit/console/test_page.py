"""The console's page as it is served: what a first visit loads, and that nothing but the page's own files is given."""

import gzip
import re
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from tests.unit.console.fake_daemon import FakeDaemon, console_app

from mesh_llm.console import app as page

MOST_BYTES = 200_000
_LINKED = re.compile(r"""(?:src|href)="\./([^"]+)\"""")
_IMPORTED = re.compile(r"""(?:import|from)\s*["']\./([\w.-]+\.js)["']""")


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    app = console_app(FakeDaemon(), tmp_path)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost") as client:
        yield client


async def test_a_first_visit_is_small_and_loads_only_from_here(client: httpx.AsyncClient) -> None:
    index = await client.get("/")
    assert index.headers["content-type"].startswith("text/html")
    names = _LINKED.findall(index.text)
    assert any(name.endswith(".js") for name in names), "the page is not built: make page"
    assert "http" not in "".join(re.findall(r'(?:src|href)="([^"]+)"', index.text))
    weight, seen = len(gzip.compress(index.content)), set[str]()
    while names:
        name = names.pop()
        if name in seen:
            continue
        seen.add(name)
        answer = await client.get(f"/{name}", headers={"accept-encoding": "gzip"})
        assert answer.status_code == 200
        weight += int(answer.headers["content-length"])
        # Static imports come with the first load, too; what is imported later is written import("...").
        if name.endswith(".js"):
            names += [f"assets/{found}" for found in _IMPORTED.findall(answer.text)]
    assert weight < MOST_BYTES, f"{weight} bytes, compressed"


@pytest.mark.parametrize(
    "name",
    [
        "page.py",
        "assets",
        "assets/",
        "../app.py",
        "assets/../index.html",
        "..%2fapp.py",
        ".source",
        "index.html",
        "a/b.js",
    ],
)
async def test_other_files_are_not_given(client: httpx.AsyncClient, name: str) -> None:
    answer = await client.get(f"/{name}")
    assert answer.status_code == 404


async def test_who_takes_no_gzip_gets_the_file_as_it_is(client: httpx.AsyncClient) -> None:
    (name,) = [found for found in _LINKED.findall((await client.get("/")).text) if found.endswith(".css")]
    plain = await client.get(f"/{name}", headers={"accept-encoding": "identity"})
    packed = await client.get(f"/{name}", headers={"accept-encoding": "gzip"})
    assert "content-encoding" not in plain.headers
    assert packed.headers["content-encoding"] == "gzip"
    assert plain.text == packed.text
    assert "immutable" in plain.headers["cache-control"]


async def test_without_a_built_page_a_plain_one_says_how_to_build_it(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Path(page.__file__).parent / "page"
    monkeypatch.setattr(page, "_folder", lambda: plain)
    index = await client.get("/")
    assert "make page" in index.text
    assert (await client.get("/console.js")).headers["content-type"].startswith("text/javascript")
    assert (await client.get("/console.css")).status_code == 200
