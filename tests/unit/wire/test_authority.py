"""Hosts and origins are read strictly: what is not exactly one is none."""

import pytest

from mesh_llm.wire.http.http1 import (
    host_of,
    is_loopback_address,
    is_loopback_name,
    split_authority,
    split_origin,
    unbracketed,
)


@pytest.mark.parametrize("text", ["localhost", "LOCALHOST:9337", "127.0.0.1:1", "[::1]", "[::1]:65535"])
def test_names_of_this_machine(text: str) -> None:
    assert is_loopback_name(host_of(text))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "localhost:",
        "localhost:x",
        "localhost:80:evil.example",
        "localhost:80@evil.example",
        "localhost:65536",
        "localhost.",
        "localhost/",
        "localhost ",
        "user@localhost",
        "[::1]evil.example",
        "[::1]:80evil",
        "[::1",
        "::1",
        "127.0.0.1.evil.example",
        "127.1",
        "0.0.0.0",
        "loc\u0430lhost",
        "localhost:\u0663",
    ],
)
def test_what_is_no_name_of_this_machine(text: str) -> None:
    assert not is_loopback_name(host_of(text))


def test_parts() -> None:
    assert split_authority("Mesh.Example:8443") == ("mesh.example", 8443)
    assert split_authority("[2001:DB8::1]") == ("[2001:db8::1]", None)
    assert split_origin("https://mesh.example") == ("https", "mesh.example", 443)
    assert split_origin("HTTP://[::1]:80") == ("http", "[::1]", 80)
    for none in ("null", "file://", "ftp://a", "https://", "https://a/", "https://a b", "mesh.example"):
        assert split_origin(none) is None


@pytest.mark.parametrize(
    ("address", "expected"), [("127.0.0.1", True), ("127.8.0.1", True), ("::1", True), ("localhost", True),
                              ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("box", False)],
)  # fmt: skip
def test_loopback(address: str, *, expected: bool) -> None:
    assert is_loopback_address(address) is expected


def test_an_address_to_bind_needs_no_brackets() -> None:
    assert [unbracketed(text) for text in ("[::1]", "::1", "127.0.0.1", "[::1")] == ["::1", "::1", "127.0.0.1", "[::1"]
