"""Pages of an index and wheels come from outside: they parse, or are refused with a sentence."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.tags import sys_tags
from tests.support.wheel_index import small_files, wheel_name, write_wheel

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.accelerators.index import (
    MAX_WHEEL_BYTES,
    Listed,
    choose,
    configured,
    parse_flavour,
    parse_html,
    parse_json,
    publisher_indexes,
)
from mesh_llm.engine.accelerators.wheel_archive import to_fetch, unpack
from mesh_llm.engine.sources.embedded.archive import PACKAGE, VERSION
from mesh_llm.engine.sources.embedded.loading import KINDS

TAGS = list(sys_tags())
PAGE = f"https://host.example/whl/vulkan/{PACKAGE}/"
NAMES = st.one_of(
    st.text(max_size=60),
    st.builds(
        "-".join,
        st.tuples(
            st.sampled_from([PACKAGE, "XLlamaCpp", "other", ""]),
            st.sampled_from([VERSION, f"{VERSION}+vulkan", f"{VERSION}%2Bcu128", "1", "x", f"{VERSION}+"]),
            st.sampled_from(
                [
                    "cp310-abi3-manylinux_2_17_x86_64.whl",
                    "py3-none-any.whl",
                    "1/../x-py3-none-any.whl",
                    "py3-none-any./../x.whl",
                    ".whl",
                ]
            ),
        ),
    ),
)
ADDRESSES = st.one_of(
    NAMES,
    st.builds("".join, st.tuples(st.sampled_from(["https://", "file://", "//[", "javascript:", "../", "\0"]), NAMES)),
    st.builds("#sha256=".join, st.tuples(NAMES, st.text("0123456789abcdefX", max_size=70))),
)


def check(files: list[Listed]) -> None:
    """What every reader relies on."""
    for file in files:
        assert file.url.startswith(("https://", "http://"))
        assert not any(ord(letter) <= 32 for letter in file.url)
        assert file.filename.endswith(".whl")
        assert file.sha256 == "" or len(bytes.fromhex(file.sha256)) == 32
        assert 0 <= file.size <= MAX_WHEEL_BYTES
    for kind in KINDS:
        found = choose(files, "https://host.example/whl/vulkan", kind, None, TAGS)
        if isinstance(found, MeshError):
            assert found.message
            assert found.hint
        else:
            # It becomes the name of a file.
            assert "/" not in found.filename
            assert not found.filename.startswith(".")


def attempt(codes: set[str], call: Callable[..., Any], *arguments: Any) -> Any:
    """The result; None if it was refused by one of these codes."""
    try:
        return call(*arguments)
    except MeshError as error:
        refusal = error
    assert refusal.code in codes
    assert refusal.message
    assert refusal.hint
    return None


def read(parse: Callable[[bytes, str], list[Listed]], page: bytes) -> None:
    check(attempt({"index_unreadable"}, parse, page, PAGE) or [])


@given(st.binary(max_size=400))
def test_any_bytes(page: bytes) -> None:
    read(parse_html, page)
    read(parse_json, page)


@given(
    st.lists(st.tuples(ADDRESSES, st.sampled_from(["", 'data-yanked=""', "data-requires-python='>=x'"])), max_size=6)
)
@settings(max_examples=300)
def test_any_links(links: list[tuple[str, str]]) -> None:
    page = "".join(f'<a href="{address}" {more}>x</a>' for address, more in links)
    read(parse_html, page.encode(errors="replace"))
    read(parse_html, f'<base href="{links[0][0] if links else ""}">{page}'.encode(errors="replace"))


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=8,
)


@given(
    st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "filename": NAMES,
                "url": ADDRESSES,
                "hashes": st.one_of(JSON, st.dictionaries(st.just("sha256"), st.text("0123456789aA", max_size=64))),
                "size": st.one_of(JSON, st.integers(-1, 1 << 70)),
                "yanked": JSON,
                "requires-python": st.one_of(JSON, st.sampled_from([">=3", "<3", "~x"])),
            },
        ),
        max_size=4,
    ),
    st.sampled_from(["1.0", "1.1", "2", "", None, 1]),
)
@settings(max_examples=300)
def test_any_json(files: list[dict[str, Any]], version: Any) -> None:
    read(parse_json, json.dumps({"meta": {"api-version": version}, "files": files}).encode())


@given(st.text(max_size=300))
def test_any_text_of_a_user_or_a_package(text: str) -> None:
    parse_flavour(text)
    assert all(one.startswith("https://") for one in publisher_indexes(text))
    attempt({"index_address"}, configured, text, "", {})
    attempt({"index_address"}, configured, None, text, {})
    attempt({"wheel_wrong"}, to_fetch, "x.whl", [text])


WHEEL = write_wheel(Path(tempfile.mkdtemp()) / wheel_name(), small_files()).read_bytes()


@given(st.lists(st.tuples(st.integers(0, len(WHEEL) - 1), st.integers(0, 255)), min_size=1, max_size=4), st.data())
@settings(max_examples=200)
def test_any_damage_of_a_wheel(changes: list[tuple[int, int]], data: st.DataObject) -> None:
    wheel = bytearray(WHEEL)
    # Most of it is the library. What directs the reader lies at the end.
    tail = data.draw(st.booleans())
    for place, value in changes:
        wheel[len(wheel) - 1 - place % 900 if tail else place] = value
    with tempfile.TemporaryDirectory() as name:
        path, into = Path(name) / "x.whl", Path(name) / "deep" / "into"
        path.write_bytes(wheel)
        into.mkdir(parents=True)
        attempt({"wheel_wrong", "disk_full"}, unpack, path, into)
        assert sorted(one.name for one in Path(name).iterdir()) == ["deep", "x.whl"]
        assert [one.name for one in into.parent.iterdir()] == ["into"]
