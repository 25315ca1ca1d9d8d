"""Asks an index over HTTP: bounded pages, the size of a wheel, and its bytes in parts that a transfer can resume.

A page counts only if it comes from the index that was asked: the digests are on it. Files may lie elsewhere, as those
of the publisher do; their digest decides. From an index over HTTPS no step leads to plain HTTP.
"""

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Self
from urllib.parse import urljoin, urlsplit

import httpx2

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.accelerators.index import MAX_PAGE_BYTES, MAX_WHEEL_BYTES, UNREACHABLE, is_private
from mesh_llm.runtime.transfer.fetch import NoRangesError, TransientError

_SECONDS = 15.0
_PAGE_SECONDS = 60.0
_HOPS = 6
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
_JSON = "application/vnd.pypi.simple.v1+json"
_ACCEPT = f"{_JSON}, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
_MAX_DIGITS = 15


class IndexClient:
    """A client for one installation. Every method blocks. Close it, or use it as a context manager."""

    def __init__(self, seconds: float = _SECONDS) -> None:
        """`seconds`: how long to wait for a connection and for each answer."""
        self._client = httpx2.Client(
            timeout=seconds, follow_redirects=False, headers={"User-Agent": "mesh-llm", "Accept-Encoding": "identity"}
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def page(self, address: str) -> tuple[bytes, bool, str] | None:
        """A page: its bytes, whether they are JSON, and its final address; None if there is no such page.

        Raises:
            MeshError: `index_unreachable`, `index_unreadable`.
        """
        try:
            with self._following("GET", address, {"Accept": _ACCEPT}, same_host=True) as answer:
                if answer.status_code in {404, 410}:
                    return None
                if answer.status_code != 200:
                    raise _unreachable(address, f"it answers {answer.status_code}")
                body, end = bytearray(), time.monotonic() + _PAGE_SECONDS
                for piece in answer.iter_bytes():
                    body += piece
                    if time.monotonic() > end:
                        raise _unreachable(address, "its page arrives too slowly")
                    if len(body) > MAX_PAGE_BYTES:
                        raise _wrong(address, f"its page is longer than {MAX_PAGE_BYTES >> 20} MB")
                kind = answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()
                return bytes(body), kind in {_JSON, "application/json"}, str(answer.url)
        except TransientError as error:
            raise _unreachable(address, error.reason) from error

    def size(self, url: str) -> int:
        """The size of a file, in bytes. Raises MeshError as `page`."""
        try:
            with self._following("GET", url, {"Range": "bytes=0-0"}) as answer:
                found = ""
                if answer.status_code == 206:
                    found = answer.headers.get("Content-Range", "").rpartition("/")[2]
                elif answer.status_code == 200:
                    found = answer.headers.get("Content-Length", "")
                else:
                    raise _unreachable(url, f"it answers {answer.status_code}")
        except TransientError as error:
            raise _unreachable(url, error.reason) from error
        if not (found.isascii() and found.isdigit() and len(found) <= _MAX_DIGITS):
            raise _wrong(url, "its server does not say how large it is")
        if not 0 < int(found) <= MAX_WHEEL_BYTES:
            raise _wrong(url, f"{found} bytes is no size of a wheel")
        return int(found)

    @contextmanager
    def part(self, url: str, size: int, begin: int, end: int | None) -> Generator[Iterator[bytes]]:
        """Bytes of a file of `size` bytes, as `runtime.transfer.fetch.Opener` wants it."""
        headers = {} if end is None else {"Range": f"bytes={begin}-{end - 1}"}
        with self._following("GET", url, headers) as answer:
            status = answer.status_code
            if status in _PASSING:
                raise TransientError(f"the server answers {status}")
            if status not in {200, 206}:
                raise _unreachable(url, f"it answers {status}")
            whole = begin == 0 and end == size
            if end is not None and not whole and status == 200:
                raise NoRangesError
            if status == 206 and not answer.headers.get("Content-Range", "").startswith(f"bytes {begin}-"):
                raise NoRangesError
            yield answer.iter_raw()

    @contextmanager
    def _following(
        self, method: str, address: str, headers: dict[str, str], *, same_host: bool = False
    ) -> Generator[httpx2.Response]:
        """The answer at the end of all redirects. Raises TransientError, MeshError."""
        at = address
        for _ in range(_HOPS):
            try:
                with self._client.stream(method, at, headers=headers) as answer:
                    if answer.status_code not in _REDIRECTS:
                        yield answer
                        return
                    target = answer.headers.get("Location", "")
            except (httpx2.InvalidURL, UnicodeError) as error:
                raise _wrong(address, f"its address leads to {at[:200]!r}: {error}") from error
            except httpx2.HTTPError as error:
                raise TransientError(str(error) or type(error).__name__) from error
            at = _next(address, at, target, same_host=same_host)
        raise _wrong(address, "it is redirected again and again")


def _next(address: str, at: str, target: str, *, same_host: bool) -> str:
    """Where a redirect leads. Raises MeshError if it may not be followed."""
    try:
        target = urljoin(at, target)
        to = urlsplit(target)
        scheme, host = to.scheme, to.hostname
    except ValueError:
        scheme, host = "", None
    if scheme not in {"http", "https"} or not host:
        raise _wrong(address, f"it is redirected to {target[:200]!r}, which is not on the web")
    if is_private(at) and not is_private(target):
        raise _wrong(address, f"it is redirected to {host} without encryption")
    if same_host and urlsplit(address).hostname != host:
        raise _wrong(address, f"it is redirected to {host}; if you trust that one, name it")
    return target


def _unreachable(address: str, why: str) -> MeshError:
    return MeshError(
        code=UNREACHABLE,
        message=f"{address} cannot be fetched: {why}.",
        hint="Check the network and the address, then run the same command again.",
        status=503,
    )


def _wrong(address: str, why: str) -> MeshError:
    return MeshError(
        code="index_unreadable",
        message=f"{address} is not used: {why}.",
        hint="Check the address of the index (`--index URL`); `--index none` does without one.",
        status=502,
    )
