"""Which model a request asks for, without taking its body apart."""

from urllib.parse import parse_qs

import msgspec

from mesh_llm.api.bounds import Fields
from mesh_llm.api.exchange import Request
from mesh_llm.core.errors import MeshError

MODEL_HEADER = b"x-mesh-llm-model"
_MOST_NAME = 512


_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_name = msgspec.json.Decoder(str | None)


def fields_of(request: Request, body: bytes) -> Fields:
    """The fields of a JSON body, not taken apart; none where there is no body.

    Raises:
        MeshError: `invalid_json` (400), or `not_json` (415) for a form: no path takes one.
    """
    if request.method == "GET" or not body:
        return {}
    if any(name == b"content-type" and b"multipart" in value.lower() for name, value in request.headers):
        raise MeshError("not_json", "A form is not taken here.", "Send a JSON object.", 415)
    try:
        return _fields.decode(body)
    except msgspec.ValidationError:
        raise _invalid_json("The request body must be a JSON object.") from None
    except RecursionError:
        raise _invalid_json("The request body is nested too deep.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _invalid_json(f"The request body is not valid JSON: {_reason(error)}.") from None


def asked_model(request: Request, fields: Fields) -> str | None:
    """The name in the query (GET) or the body's fields; None where no model is named.

    Raises:
        MeshError: `invalid_model` (400).
    """
    if request.method == "GET":
        return _bounded(_query_model(request.query)) if request.query else None
    try:
        return _bounded(_name.decode(fields["model"])) if "model" in fields else None
    except msgspec.ValidationError:
        raise _invalid_model("`model` must be a string.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
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
