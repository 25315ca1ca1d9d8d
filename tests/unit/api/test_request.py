"""Finding the model that a request asks for."""

import pytest

from mesh_llm.api.request import Request, json_fields, requested_model
from mesh_llm.core.types.errors import MeshError


async def nothing() -> bytes:
    return b""


def request(method: str = "POST", query: str = "", content_type: bytes = b"application/json") -> Request:
    return Request(method, "/v1/chat/completions", query, ((b"content-type", content_type),), nothing)


def model_of(asked: Request, body: bytes) -> str | None:
    return requested_model(asked, json_fields(asked, body))


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (b'{"messages": [], "model": "tiny"}', "tiny"),
        (b'{"model": null}', None),
        (b'{"messages": [{"model": "inner"}]}', None),
        (b"{}", None),
        ('{"model": "größe"}'.encode(), "größe"),
        (b'{"model":"a","model":"b"}', "b"),
        (b'{"model":"a","mod\\u0065l":"b"}', "b"),
    ],
)
def test_in_json(body: bytes, name: str | None):
    assert model_of(request(), body) == name


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"model": 7}', "invalid_model"),
        (b'{"model": ["a"]}', "invalid_model"),
        (b'{"model": "' + b"x" * 600 + b'"}', "invalid_model"),
        (b"", "invalid_json"),
        (b"[]", "invalid_json"),
        (b'"x"', "invalid_json"),
        (b'{"model": "tiny"', "invalid_json"),
        (b'{"model": "tiny"} x', "invalid_json"),
        (b'{"model": "\xff"}', "invalid_json"),
        (b"model=tiny", "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"a":' * 100_000, "invalid_json"),
    ],
)
def test_what_is_wrong_is_said(body: bytes, code: str):
    with pytest.raises(MeshError) as caught:
        model_of(request(), body)
    assert (caught.value.code, caught.value.status) == (code, 400)


@pytest.mark.parametrize(
    ("query", "name"),
    [("", None), ("model=tiny", "tiny"), ("a=b&model=Owner%2FTiny", "Owner/Tiny"), ("model=", None), ("x", None)],
)
def test_in_a_query(query: str, name: str | None):
    assert model_of(request("GET", query), b"") == name


def test_a_query_is_bounded():
    with pytest.raises(MeshError) as caught:
        model_of(request("GET", "&".join(["a=b"] * 100)), b"")
    assert caught.value.code == "invalid_query"


@pytest.mark.parametrize("kind", [b"multipart/form-data; boundary=XX", b"Multipart/Form-Data"])
def test_a_form_is_refused_for_an_engine_would_read_fields_that_were_not_looked_at(kind: bytes):
    form = b'--XX\r\nContent-Disposition: form-data; name="grammar"\r\n\r\n(((\r\n--XX--\r\n'
    with pytest.raises(MeshError) as caught:
        model_of(request(content_type=kind), form)
    assert (caught.value.code, caught.value.status) == ("not_json", 415)
