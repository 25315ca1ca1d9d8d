"""The console's page: its files as they lie in the package."""

import html
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response

from mesh_llm.core.errors import MeshError

_TYPES = {"index.html": "text/html; charset=utf-8", "console.js": "text/javascript", "console.css": "text/css"}
TOKEN_MARK = "{{control-token}}"  # noqa: S105 - where the token goes, not a secret


class Page:
    """Serves the page, with the control token in it: only a page of this origin can read it there."""

    def __init__(self, token: str) -> None:
        self._token = token

    async def index(self, _request: Request) -> Response:
        """The page itself."""
        page = _read("index.html").decode().replace(TOKEN_MARK, html.escape(self._token, quote=True))
        return Response(page, media_type=_TYPES["index.html"])

    async def asset(self, request: Request) -> Response:
        """One of its files."""
        name = request.path_params["name"]
        if name not in _TYPES or name == "index.html":
            raise MeshError(code="not_found", message="There is nothing at this address.", status=404)
        return Response(_read(name), media_type=_TYPES[name])


def _read(name: str) -> bytes:
    return resources.files("mesh_llm.console").joinpath("page", name).read_bytes()
