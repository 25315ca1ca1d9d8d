"""A client of the Hugging Face hub. The only module that imports huggingface_hub.

It uses that library's HTTP client, tokens, endpoint, proxies and errors, but not its downloader, which starts over
after a kill, uses one connection, and verifies no digest (huggingface_hub 2.4.0, `_download_to_tmp_and_move`).
"""

import logging
import re
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager

import msgspec
from httpx2 import HTTPError, InvalidURL, Response
from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url  # pyright: ignore[reportUnknownVariableType]
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session  # pyright: ignore[reportUnknownVariableType]

from mesh_llm.core.types.errors import MeshError
from mesh_llm.models.hub.source_ref import RemoteModel, RepositoryFile, SourceRef, models_in
from mesh_llm.runtime.transfer.fetch import NoRangesError, TransientError

_TIMEOUT = 20.0
# What huggingface_hub raises for an answer that it does not expect: a page instead of JSON, or other JSON.
_SENSELESS = (ValueError, TypeError, LookupError, AttributeError, InvalidURL)
_FAILURES = (HTTPError, OSError, *_SENSELESS)
_PUBLIC_ENDPOINT = "https://huggingface.co"
_SAFE_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,127}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})

# huggingface_hub writes warnings and retries to standard error. Send them to the node's log.
_library_log = logging.getLogger("huggingface_hub")
_library_log.handlers[:] = [logging.NullHandler()]
_library_log.propagate = True


class HubFileFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What the hub says about one file. `etag` names its content; for large files it is the SHA-256."""

    etag: str
    size: int
    commit: str
    location: str
    sha256: str = ""


class SearchHit(msgspec.Struct, frozen=True, kw_only=True):
    """A repository that a search found."""

    repository: str
    downloads: int
    likes: int = 0
    gated: bool = False


class HubClient:
    """A client of one hub. Every method blocks. Safe to use from several threads.

    Args:
        endpoint: address of the hub; None for `HF_ENDPOINT` or the public hub.
        token: None for `HF_TOKEN` or the token of the login; False for none.
    """

    def __init__(self, endpoint: str | None = None, token: str | bool | None = None) -> None:
        # An empty HF_ENDPOINT means what an unset one does.
        self.endpoint = (endpoint or constants.ENDPOINT or _PUBLIC_ENDPOINT).rstrip("/")
        self._token = token
        self._api = HfApi(endpoint=self.endpoint, token=token)

    def models(self, ref: SourceRef) -> list[RemoteModel]:
        """All complete models in a repository at the revision of `ref`. Raises MeshError."""
        try:
            info = self._api.model_info(ref.repository, revision=ref.revision, files_metadata=True, timeout=_TIMEOUT)
            commit = info.sha or ""
            files = [
                RepositoryFile(
                    path=str(file.rfilename),
                    size=int(file.size or 0),
                    sha256=file.lfs.sha256 if file.lfs is not None and _SHA256.fullmatch(file.lfs.sha256) else "",
                )
                for file in info.siblings or []
            ]
            known = _SAFE_NAME.fullmatch(commit) is not None
        except _FAILURES as error:
            raise translated(error, self.endpoint, ref.repository, "") from error
        if not known:
            raise _strange(ref.repository, "it names no commit")
        return models_in(files, ref.repository, commit)

    def file(self, repository: str, path: str, revision: str) -> HubFileFacts:
        """Facts about one file. Raises MeshError."""
        url = hf_hub_url(repository, path, revision=revision, endpoint=self.endpoint)
        try:
            found = get_hf_file_metadata(url, token=self._token, timeout=_TIMEOUT, endpoint=self.endpoint)
        except _FAILURES as error:
            raise translated(error, self.endpoint, repository, path) from error
        etag, commit = found.etag or "", found.commit_hash or ""
        if found.size is None or found.size < 0 or not _SAFE_NAME.fullmatch(etag) or not _SAFE_NAME.fullmatch(commit):
            raise _strange(repository, f"it names no size or content of {path}")
        return HubFileFacts(
            etag=etag,
            size=found.size,
            commit=commit,
            location=found.location or url,
            sha256=etag if _SHA256.fullmatch(etag) else "",
        )

    def search(self, words: str, limit: int = 20) -> list[SearchHit]:
        """GGUF repositories with these words in their names, most downloads first. Raises MeshError."""
        try:
            found = list(self._api.list_models(search=words, filter="gguf", sort="downloads", limit=limit))
            return [
                SearchHit(
                    repository=str(item.id),
                    downloads=int(item.downloads or 0),
                    likes=int(item.likes or 0),
                    gated=bool(item.gated),
                )
                for item in found
            ]
        except _FAILURES as error:
            raise translated(error, self.endpoint, "", "") from error

    def opener(self, repository: str, path: str, facts: HubFileFacts) -> "PartOpener":
        """Opens parts of a file, for `transfer.fetch`."""
        return PartOpener(self, repository, path, facts)

    def headers(self, location: str) -> dict[str, str]:
        """Headers for a content's address. The token goes to the hub only, never to where it redirects."""
        token = self._token if location.startswith(f"{self.endpoint}/") else False
        return {**build_hf_headers(token=token), "Accept-Encoding": "identity"}


class PartOpener:
    """Opens parts of one file. Asks for its address again when it has expired."""

    def __init__(self, client: HubClient, repository: str, path: str, facts: HubFileFacts) -> None:
        self._client = client
        self._repository = repository
        self._path = path
        self._facts = facts
        self._location = facts.location
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, begin: int, end: int | None) -> Generator[Iterator[bytes]]:
        """See `transfer.Opener`."""
        location = self._location
        headers = self._client.headers(location)
        if end is not None:
            headers["Range"] = f"bytes={begin}-{end - 1}"
        try:
            with get_session().stream(
                "GET", location, headers=headers, timeout=_TIMEOUT, follow_redirects=True
            ) as answer:
                self._check(answer, begin, end, location)
                yield answer.iter_raw()
        except InvalidURL as error:
            raise _strange(self._repository, f"its address for {self._path} is {location!r}: {error}") from None
        except HTTPError as error:
            raise TransientError(str(error) or type(error).__name__) from None

    def _check(self, answer: Response, begin: int, end: int | None, location: str) -> None:
        status = answer.status_code
        if status in _PASSING:
            raise TransientError(f"the hub answers {status}", retry_after(answer.headers.get("Retry-After")))
        if status in {401, 403, 410}:
            self._renew(location, status)
            raise TransientError(f"the address has expired ({status})", 0.0)
        if status not in {200, 206}:
            raise _strange(self._repository, f"it answers {status} for {self._path}")
        if end is None:
            return
        if status == 200:
            if begin == 0 and end == self._facts.size:
                return
            raise NoRangesError
        if not (answer.headers.get("Content-Range") or "").startswith(f"bytes {begin}-"):
            raise NoRangesError

    def _renew(self, expired: str, status: int) -> None:
        """Ask for the address again: once for all threads that found it expired."""
        with self._lock:
            if self._location != expired:
                return
            found = self._client.file(self._repository, self._path, self._facts.commit)
            if found.etag != self._facts.etag:
                raise _strange(self._repository, f"{self._path} changed while it was fetched")
            if found.location == expired:
                raise TransientError(f"the hub's content server answers {status}")
            self._location = found.location


def retry_after(value: str | None) -> float | None:
    """Seconds in a Retry-After header; None for anything else, such as a date or a very long time."""
    return float(value) if value is not None and value.isascii() and value.isdigit() and len(value) < 6 else None


def translated(error: Exception, endpoint: str, repository: str, path: str) -> MeshError:
    """A failure of the hub, as what happened and what to do."""
    page = f"{endpoint}/{repository}"
    what = f"{repository}/{path}" if path else repository
    match error:
        case GatedRepoError():
            return _failure(
                "hub_gated", f"{repository} is only for users who accepted its terms.",
                f"Accept them at {page}, create a token in your settings there, and set HF_TOKEN.", 403,
            )  # fmt: skip
        case RepositoryNotFoundError():
            return _failure(
                "hub_not_found", f"There is no repository {repository}, or it is private.",
                "Check the name. For a private repository set HF_TOKEN.", 404,
            )  # fmt: skip
        case RevisionNotFoundError():
            return _failure(
                "hub_not_found", f"{repository} has no such revision.", f"Its branches and tags: {page}/tree/main", 404
            )
        case RemoteEntryNotFoundError():
            return _failure("hub_not_found", f"There is no file {what}.", f"Its files: {page}/tree/main", 404)
        case OfflineModeIsEnabled():
            return _failure(
                "hub_offline", "HF_HUB_OFFLINE is set, so nothing is fetched.", "Unset HF_HUB_OFFLINE to fetch.", 503
            )
        case HfHubHTTPError() if error.response.status_code == 429:
            wait = retry_after(error.response.headers.get("Retry-After"))
            return _failure(
                "hub_rate_limited", "The hub refuses: too many requests from this address.",
                "Try again later. With HF_TOKEN set, the limit is higher.", 429, wait,
            )  # fmt: skip
        case HfHubHTTPError():
            return _failure(
                "hub_failed", f"The hub answers {error.response.status_code} for {what or endpoint}.",
                "Try again later.", 502,
            )  # fmt: skip
        case FileMetadataError():
            return _strange(repository, str(error))
        case _ if isinstance(error, _SENSELESS) and not isinstance(error, OSError):
            return _strange(repository or endpoint, "no hub answers like this")
        case _:
            return _failure(
                "hub_unreachable", f"The hub at {endpoint} cannot be reached: {error or type(error).__name__}.",
                "Check the network. HF_ENDPOINT sets a mirror, HTTPS_PROXY a proxy.", 503,
            )  # fmt: skip


def _failure(code: str, message: str, hint: str, status: int, wait: float | None = None) -> MeshError:
    return MeshError(code=code, message=message, hint=hint, status=status, retry_after=wait)


def _strange(repository: str, reason: str) -> MeshError:
    return _failure(
        "hub_failed",
        f"The hub's answer about {repository} makes no sense: {reason}.",
        "Try again later. A proxy may answer in its place: check HF_ENDPOINT and HTTPS_PROXY.",
        502,
    )
