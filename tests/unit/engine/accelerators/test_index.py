"""What an index says, and which of its wheels fits."""

import contextlib
import importlib.metadata
import json
import time

import pytest
from packaging.tags import Tag

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.accelerators.cards import Card, Vendor
from mesh_llm.engine.accelerators.index import (
    VARIABLE,
    Index,
    Listed,
    Wheel,
    choose,
    configured,
    is_private,
    parse_flavour,
    parse_html,
    parse_json,
    places,
    publisher_indexes,
)
from mesh_llm.engine.sources.embedded.archive import PACKAGE, VERSION
from mesh_llm.engine.sources.embedded.loading import CUDA, ROCM, VULKAN

AT = "https://host.example/whl/vulkan"
PAGE = f"{AT}/{PACKAGE}/"
DIGEST = "ab" * 32
TAGS = [Tag("cp311", "abi3", "manylinux_2_35_x86_64"), Tag("cp310", "abi3", "manylinux_2_17_x86_64")]
NAMED = tuple(f"https://host.example/whl/{name}" for name in ("cu128", "cu132", "rocm-6.4.1", "rocm-7.2.4", "vulkan"))


def card(architecture: str = "89", cuda: tuple[int, int] = (13, 2)) -> Card:
    return Card(vendor=Vendor.NVIDIA, name="RTX", architecture=architecture, driver="NVIDIA 580", cuda=cuda)


def name(version: str = VERSION, tags: str = "cp310-abi3-manylinux_2_17_x86_64", package: str = PACKAGE) -> str:
    return f"{package}-{version}-{tags}.whl"


def found_in(address: str, *names: str, kind: str = VULKAN, card: Card | None = None) -> Wheel | MeshError:
    files = [Listed(filename=one, url=f"https://host.example/{one}") for one in names]
    return choose(files, address, kind, card, TAGS)


def test_the_installed_package_names_its_publishers_indexes() -> None:
    found = publisher_indexes()
    assert {flavour.kind for one in found if (flavour := parse_flavour(one.rpartition("/")[2]))} == {CUDA, ROCM, VULKAN}
    assert all(one.startswith("https://") for one in found)


def test_only_indexes_of_accelerators_count() -> None:
    text = f"""
    pip install {PACKAGE} --index-url https://a.example/whl/cu128.
    pip install {PACKAGE} --index-url http://plain.example/whl/cu128
    pip install {PACKAGE} --index-url https://a.example/simple
    pip install other --index-url https://b.example/whl/vulkan
    pip install {PACKAGE} --extra-index-url https://a.example/whl/cu128
    """
    assert publisher_indexes(text) == ("https://a.example/whl/cu128",)
    assert publisher_indexes("") == ()


def test_without_the_package_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> None:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    assert publisher_indexes() == ()


@pytest.mark.parametrize(
    ("text", "kind", "version"),
    [
        ("cu128", CUDA, (12, 8)),
        ("cu132", CUDA, (13, 2)),
        ("cuda12.4", CUDA, (12, 4)),
        ("cuda-13", CUDA, (13,)),
        ("rocm-6.4.1", ROCM, (6, 4, 1)),
        ("rocm.7.2.4", ROCM, (7, 2, 4)),
        ("hip", ROCM, ()),
        ("Vulkan", VULKAN, ()),
    ],
)
def test_flavours(text: str, kind: str, version: tuple[int, ...]) -> None:
    found = parse_flavour(text)
    assert found is not None
    assert (found.kind, found.version) == (kind, version)


@pytest.mark.parametrize(
    "text", ["", "cpu", "simple", "cu", "cuxx", "vulkanic", "metal", "cu128/../x", "cu" + "1" * 99]
)
def test_other_names_are_no_flavours(text: str) -> None:
    found = parse_flavour(text)
    assert found is None or (text == "cu" and found.version == ())


def test_the_newest_that_the_driver_runs_is_asked_first() -> None:
    def asked(kind: str, card: Card | None) -> list[str]:
        return [one.rpartition("/")[2] for one in places(Index(), kind, card, NAMED)]

    assert asked(CUDA, card()) == ["cu132", "cu128"]
    assert asked(CUDA, card(cuda=(13, 0))) == ["cu128"]
    assert asked(CUDA, card(cuda=(12, 4))) == []
    assert asked(CUDA, card(architecture="61")) == ["cu128"]
    assert asked(CUDA, None) == ["cu132", "cu128"]
    assert asked(ROCM, card()) == ["rocm-7.2.4", "rocm-6.4.1"]
    assert asked(VULKAN, None) == ["vulkan"]


def test_a_users_index_is_asked_itself_and_in_folders() -> None:
    root = "https://mirror.example/whl"
    assert places(Index(address=root), CUDA, card(cuda=(12, 8)), NAMED) == (root, f"{root}/cu128", f"{root}/cuda")
    assert places(Index(address=f"{root}/cu128"), CUDA, card(), NAMED) == (f"{root}/cu128",)
    assert places(Index(address=f"{root}/cu128"), VULKAN, card(), NAMED) == ()


def test_which_index_is_configured() -> None:
    assert configured(None, environ={}) == Index()
    assert configured(None, environ={VARIABLE: "https://a.example/whl/"}) == Index(address="https://a.example/whl")
    assert configured("https://b.example", "AB" * 32, {VARIABLE: "https://a.example"}) == Index(
        address="https://b.example", sha256=DIGEST, strict=True
    )
    assert configured("none", environ={}) is None
    assert configured(None, environ={VARIABLE: "none"}) is None


@pytest.mark.parametrize(
    "address",
    ["ftp://a.example", "file:///etc", "a.example/whl", "https://", "https://a b", "https://[1/", "https://a:x/"],
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(MeshError) as caught:
        configured(address, environ={})
    assert caught.value.code == "index_address"


def test_what_is_no_digest_is_refused() -> None:
    with pytest.raises(MeshError, match="64 hexadecimal"):
        configured(None, "abc", {})


def test_who_can_change_what_an_address_answers() -> None:
    assert is_private("https://a.example")
    assert is_private("http://127.0.0.1:8000/whl")
    assert is_private("http://localhost/whl")
    assert is_private("http://[::1]/whl")
    assert not is_private("http://a.example")
    assert not is_private("http://192.168.1.5/whl")


def test_links_with_digests_and_without() -> None:
    page = f"""<!DOCTYPE html><html><head><base href="/files/"></head><body>
    <a href="{name()}#sha256={DIGEST}" data-requires-python="&gt;=3.10">one</a>
    <a href="https://other.example/{name("2")}#md5=00">two</a>
    <a href="{name("3")}" data-yanked="broken">withdrawn</a>
    <a href="{name("4")}" data-requires-python="&lt;3">old</a>
    <a href="file:///etc/{name("5")}">here</a>
    <a href="sdist.tar.gz">source</a><a>nothing</a>
    """.encode()
    one, two = parse_html(page, PAGE)
    assert one == Listed(filename=name(), url=f"https://host.example/files/{name()}", sha256=DIGEST)
    assert (two.url, two.sha256) == (f"https://other.example/{name('2')}", "")


def test_a_local_version_is_quoted_in_addresses() -> None:
    (one,) = parse_html(f'<a href="{name().replace(VERSION, VERSION + "%2Bcu128")}">x</a>'.encode(), PAGE)
    assert one.filename == name(f"{VERSION}+cu128")


@pytest.mark.parametrize("page", [b"", b"<html>Please log in</html>", bytes(range(256)) * 4, b"<" * 10_000])
def test_a_page_without_links_is_no_index(page: bytes) -> None:
    with pytest.raises(MeshError) as caught:
        parse_html(page, PAGE)
    assert caught.value.code == "index_unreadable"


@pytest.mark.parametrize(
    "path", [f"{PACKAGE}-{VERSION}-1/../../x-py3-none-any.whl", f"{PACKAGE}-{VERSION}-py3-none-any./../../x.whl"]
)
def test_no_name_is_a_path(path: str) -> None:
    # For a reader that splits at dashes and dots, both are names of wheels.
    assert path.endswith(".whl")
    assert path.split("-")[:2] == [PACKAGE, VERSION]
    page = json.dumps({"meta": {"api-version": "1.0"}, "files": [{"filename": path, "url": "x"}]}).encode()
    assert parse_json(page, PAGE) == []
    assert parse_html(f'<a href="{path.replace("/", "%2F")}">x</a>'.encode(), PAGE) == []


def test_comments_and_single_quotes() -> None:
    page = f"<!-- <a href='{name('1')}'> --><A HREF='{name()}' data-requires-python='>=3.8'>x</a><!-- <a href='x'>"
    assert [one.filename for one in parse_html(page.encode(), PAGE)] == [name()]


@pytest.mark.parametrize("piece", ["<!--", "<a ", "<a href=", "<a href='", "<base ", "<!", "<a x=\"'"])
def test_hostile_pages_take_no_long_time(piece: str) -> None:
    page = (piece * (2_000_000 // len(piece)) + "<a href='x'>").encode()
    began = time.process_time()
    with contextlib.suppress(MeshError):
        parse_html(page, PAGE)
    assert time.process_time() - began < 60


def test_json_pages() -> None:
    files = [
        {"filename": name(), "url": f"../{name()}", "hashes": {"sha256": DIGEST, "md5": "0"}, "size": 5},
        {"filename": name("2"), "url": name("2"), "hashes": {}, "yanked": "broken"},
        {"filename": name("3"), "url": name("3"), "requires-python": "<3"},
        {"filename": name("4"), "url": name("4"), "hashes": {"sha256": "short"}, "size": -1, "requires-python": None},
        {"filename": "x.tar.gz", "url": "x.tar.gz"},
    ]
    page = json.dumps({"meta": {"api-version": "1.4"}, "name": PACKAGE, "files": files, "more": 1}).encode()
    one, four = parse_json(page, PAGE)
    assert one == Listed(filename=name(), url=f"{AT}/{name()}", sha256=DIGEST, size=5)
    assert (four.sha256, four.size) == ("", 0)


@pytest.mark.parametrize(
    "page",
    [
        b"",
        b"[]",
        b"{}",
        b'{"files": 1}',
        b'{"files": []}',
        b'{"meta": {"api-version": "2.0"}, "files": []}',
        b"[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_what_is_no_json_index_is_refused(page: bytes) -> None:
    with pytest.raises(MeshError) as caught:
        parse_json(page, PAGE)
    assert caught.value.code == "index_unreadable"


def test_the_best_tag_is_chosen() -> None:
    better = name(tags="cp311-abi3-manylinux_2_35_x86_64")
    found = found_in(AT, name(), better, name("1.0"), name(package="other"), "nonsense.whl")
    assert isinstance(found, Wheel)
    assert (found.filename, found.flavour, found.index) == (better, "vulkan", AT)


def test_a_local_version_stands_above_the_indexs_name() -> None:
    root = "https://host.example/whl"
    names = [name(), name(f"{VERSION}+vulkan"), name(f"{VERSION}+cu128"), name(f"{VERSION}+cu132")]
    found = found_in(root, *names)
    assert isinstance(found, Wheel)
    assert found.filename == names[1]
    found = found_in(root, *names, kind=CUDA, card=card(cuda=(13, 0)))
    assert isinstance(found, Wheel)
    assert found.flavour == "cu128"
    assert isinstance(found_in(AT, name(f"{VERSION}+cu128")), MeshError)


@pytest.mark.parametrize(
    ("address", "names", "kind", "why"),
    [
        (AT, [], VULKAN, f"has no wheel of {PACKAGE} {VERSION}"),
        (AT, [name("2026.10.11548"), name(f"{VERSION}.post1"), name(f"{VERSION}rc1")], VULKAN, "has no wheel of"),
        ("https://host.example/simple", [name()], VULKAN, "but no build for vulkan"),
        (AT, [name(tags="cp310-abi3-win_amd64"), name(tags="cp39-cp39-linux_x86_64")], VULKAN, "none for this system"),
        ("https://host.example/cu140", [name()], CUDA, "newer driver"),
    ],
)
def test_where_nothing_fits_the_reason_is_a_sentence(address: str, names: list[str], kind: str, why: str) -> None:
    found = found_in(address, *names, kind=kind, card=card())
    assert isinstance(found, MeshError)
    assert found.code == "index_without_wheel"
    assert why in found.message
    assert address in found.message
