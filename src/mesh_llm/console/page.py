"""The console's page: the files that `make page` built, or a plain page where nobody built it."""

import gzip
import re
from functools import lru_cache
from importlib import resources
from importlib.resources.abc import Traversable

from starlette.requests import Request
from starlette.responses import Response

from mesh_llm.core.errors import MeshError

_TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_NAME = re.compile(r"(assets/)?[A-Za-z0-9_-]{1,80}(\.[A-Za-z0-9_-]{1,40})?\.(css|js|svg)")
_FOR_GOOD = "private, max-age=31536000, immutable"
"""A built asset has a digest of its content in its name."""


async def index(_request: Request) -> Response:
    """The page itself. It holds no secret: whoever opens it has to sign in."""
    return Response((_folder() / "index.html").read_text("utf-8"), media_type=_TYPES["html"])


async def asset(request: Request) -> Response:
    """One of its files."""
    name = str(request.path_params["name"])
    if _NAME.fullmatch(name) is None:
        raise _nothing()
    headers = {"vary": "accept-encoding"}
    if name.startswith("assets/"):
        headers["cache-control"] = _FOR_GOOD
    plain, packed = _asset(name)
    if "gzip" not in request.headers.get("accept-encoding", ""):
        packed = None
    if packed is not None:
        headers["content-encoding"] = "gzip"
    return Response(packed or plain, media_type=_TYPES[name.rpartition(".")[2]], headers=headers)


def _folder() -> Traversable:
    """Where the page's files are."""
    console = resources.files("mesh_llm.console")
    built = console.joinpath("built")
    return built if built.joinpath("index.html").is_file() else console.joinpath("page")


def _asset(name: str) -> tuple[bytes, bytes | None]:
    """A file, as it is and packed. Raises MeshError(not_found)."""
    path = _folder().joinpath(*name.split("/"))
    if not path.is_file():
        raise _nothing()
    return _packed(name, path.read_bytes())


@lru_cache(maxsize=64)
def _packed(_name: str, content: bytes) -> tuple[bytes, bytes | None]:
    packed = gzip.compress(content, mtime=0)
    return content, packed if len(packed) < len(content) else None


def _nothing() -> MeshError:
    return MeshError(code="not_found", message="There is nothing at this address.", status=404)
