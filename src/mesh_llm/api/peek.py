"""Which model a request asks for, without taking its body apart."""

from urllib.parse import parse_qs

import msgspec

from mesh_llm.api.exchange import Request
from mesh_llm.core.errors import MeshError
from mesh_llm.wire.http1_multipart import boundary_of, form_field

MODEL_HEADER = b"x-mesh-llm-model"
_MOST_NAME = 512


class _Asked(msgspec.Struct):
    model: str | None = None


_decoder = msgspec.json.Decoder(_Asked)


def asked_model(request: Request, body: bytes) -> str | None:
    """The name in the query (GET), the form field or the JSON body; None where no model is named.

    Raises:
        MeshError: `invalid_json` or `invalid_model`, both 400.
    """
    if request.method == "GET":
        return _bounded(_query_model(request.query)) if request.query else None
    if not body:
        return None
    boundary = boundary_of(request.header(b"content-type") or b"")
    if boundary is not None:
        field = form_field(body, boundary, b"model")
        return _bounded(field.decode("utf-8", "replace")) if field is not None else None
    try:
        return _bounded(_decoder.decode(body).model)
    except msgspec.ValidationError as error:
        if "$.model" in str(error):
            raise _invalid_model("`model` must be a string.") from None
        raise _invalid_json("The request body must be a JSON object.") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _invalid_json(f"The request body is not valid JSON: {_reason(error)}.") from None


def _query_model(query: str) -> str | None:
    try:
        values = parse_qs(query, max_num_fields=32).get("model")
    except ValueError:
        raise MeshError(
            code="invalid_query", message="The query has too many fields.", hint="Only model= is read.", status=400
        ) from None
    return values[0] if values else None


def _reason(error: Exception) -> str:
    return str(error).removeprefix("JSON is malformed: ") if isinstance(error, msgspec.DecodeError) else "bad text"


def _bounded(name: str | None) -> str | None:
    if name is not None and len(name) > _MOST_NAME:
        raise _invalid_model("`model` is too long to be a name.")
    return name


def _invalid_model(message: str) -> MeshError:
    return MeshError(
        code="invalid_model",
        message=message,
        hint="GET /v1/models lists the names there are.",
        status=400,
        param="model",
    )


def _invalid_json(message: str) -> MeshError:
    return MeshError(code="invalid_json", message=message, hint="Send a JSON object.", status=400)
