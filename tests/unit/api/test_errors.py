"""Errors in the shapes that clients' libraries understand."""

import msgspec
import pytest

from mesh_llm.api.errors import Dialect, dialect_of, error_answer, error_event
from mesh_llm.core.types.errors import MeshError

LOST = MeshError("model_not_found", "No such model.", "There is: tiny.", 404, param="model")
BUSY = MeshError("too_many_requests", "Busy.", status=429, retry_after=2.6)


@pytest.mark.parametrize(
    ("path", "dialect"),
    [
        ("/v1/messages", Dialect.ANTHROPIC),
        ("/v1/messages/count_tokens", Dialect.ANTHROPIC),
        ("/v1/responses", Dialect.RESPONSES),
        ("/v1/chat/completions", Dialect.OPENAI),
        ("/tokenize", Dialect.OPENAI),
        ("/nowhere", Dialect.OPENAI),
    ],
)
def test_a_path_has_a_dialect(path: str, dialect: Dialect):
    assert dialect_of(path) is dialect


def test_openais_shape():
    status, headers, body = error_answer(LOST, Dialect.OPENAI)
    assert status == 404
    assert msgspec.json.decode(body) == {
        "error": {
            "message": "No such model. There is: tiny.",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    }
    assert dict(headers)[b"content-length"] == b"%d" % len(body)
    assert dict(headers)[b"x-mesh-llm-error"] == b"model_not_found"


def test_anthropics_shape():
    _, _, body = error_answer(LOST, Dialect.ANTHROPIC)
    assert msgspec.json.decode(body) == {
        "type": "error",
        "error": {"type": "not_found_error", "message": "No such model. There is: tiny."},
    }


def test_retry_after_is_whole_seconds():
    assert dict(error_answer(BUSY, Dialect.OPENAI)[1])[b"retry-after"] == b"3"
    assert b"retry-after" not in dict(error_answer(LOST, Dialect.OPENAI)[1])


def test_events_end_a_stream():
    assert error_event(BUSY, Dialect.OPENAI) == (
        b'data: {"error":{"message":"Busy.","type":"rate_limit_error","param":null,"code":"too_many_requests"}}\n\n'
    )
    assert error_event(BUSY, Dialect.ANTHROPIC) == (
        b'event: error\ndata: {"type":"error","error":{"type":"rate_limit_error","message":"Busy."}}\n\n'
    )
    assert error_event(BUSY, Dialect.RESPONSES) == (
        b'event: error\ndata: {"type":"error","code":"too_many_requests","message":"Busy.","param":null}\n\n'
    )
