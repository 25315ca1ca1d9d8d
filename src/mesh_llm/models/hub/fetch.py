"""Fetches models from the hub into the Hugging Face cache: each content once, complete and verified."""

import contextlib
import threading
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from filelock import FileLock, Timeout

from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.model import ModelFacts
from mesh_llm.models.disk import allocated_bytes, disk_error, require_space
from mesh_llm.models.gguf.facts import read_facts
from mesh_llm.models.gguf.header import DEFAULT_LIMITS, GgufError, GgufHeader, parse_header, read_header
from mesh_llm.models.hub.cache import CachedRepository, hub_cache_directory, models_directory
from mesh_llm.models.hub.client import HubClient, HubFileFacts
from mesh_llm.models.hub.source_ref import RemoteModel, RepositoryFile, SourceRef, choose
from mesh_llm.runtime.transfer.fetch import CONNECTIONS, Job, NoRangesError, TransientError, fetch
from mesh_llm.runtime.transfer.partial_file import take_over
from mesh_llm.runtime.transfer.progress import FetchCancelledError, OnProgress, Progress

_LOCK_SECONDS = 0.5


class Hub:
    """Finds and fetches models. Every method blocks.

    Args:
        client: the hub.
        cache: directory of the cache; None for the one that the environment names.
        connections: per file.
    """

    def __init__(self, client: HubClient, cache: Path | None = None, connections: int = CONNECTIONS) -> None:
        self.client = client
        self.cache = cache or hub_cache_directory()
        self._connections = connections

    def find(self, ref: SourceRef) -> RemoteModel:
        """The model that `ref` means. Raises MeshError."""
        return choose(self.client.models(ref), ref)

    def facts(self, model: RemoteModel) -> ModelFacts:
        """Facts from the headers of a model's files. Fetches only the headers, by range requests.

        Raises:
            MeshError: `hub_*`, or `download_invalid` if a file is no usable GGUF.
        """
        try:
            headers = [self._header(model, file) for file in model.files]
            return read_facts(headers, model.name, model.source)
        except GgufError as error:
            raise _unusable(model.repository, model.files[0].path, error) from error
        except (TransientError, NoRangesError) as error:
            raise MeshError(
                code="hub_failed",
                message=f"The header of {model.name} cannot be read from the hub: {error or 'no parts are sent'}.",
                hint="Try again later, or fetch the model first: mesh-llm download",
                status=502,
            ) from error

    def _header(self, model: RemoteModel, file: RepositoryFile) -> GgufHeader:
        facts = self.client.file(model.repository, file.path, model.revision)
        end = min(facts.size, DEFAULT_LIMITS.header_bytes)
        with self.client.opener(model.repository, file.path, facts)(0, end) as pieces:
            return parse_header(cast("BinaryIO", _Pieces(pieces)), facts.size)

    def fetch(
        self,
        model: RemoteModel,
        on_progress: OnProgress,
        cancel: threading.Event | None = None,
        revision: str = "",
        *,
        projector: bool = True,
    ) -> tuple[Path, ...]:
        """Fetch all parts of a model, and its vision projector. Files in the cache are not fetched again.

        Args:
            model: from `find`.
            on_progress: called with the progress of all files together.
            cancel: set it from another thread to stop. What was fetched is kept.
            revision: the branch or tag, to be noted in the cache.
            projector: whether to fetch the projector.

        Returns:
            The paths of the model's parts in the cache, in order.

        Raises:
            MeshError: `disk_full`, `download_*` or `hub_*`.
            FetchCancelledError: `cancel` was set.
        """
        try:
            return self._fetch(model, on_progress, cancel or threading.Event(), revision, projector=projector)
        except OSError as error:
            raise disk_error(error) from error

    def _fetch(
        self, model: RemoteModel, on_progress: OnProgress, cancel: threading.Event, revision: str, *, projector: bool
    ) -> tuple[Path, ...]:
        place = CachedRepository(self.cache, model.repository)
        extra = _best_projector(model) if projector else ()
        files = (*model.files, *extra)
        self._check_space(place, files)
        total = sum(file.size for file in files)
        before = received = 0
        links: list[Path] = []
        for file in files:
            last = Progress(phase="fetching", done_bytes=0, total_bytes=file.size)

            def report(progress: Progress, before: int = before, received: int = received) -> None:
                nonlocal last
                last = progress
                done = before + progress.done_bytes
                fetched = received + progress.fetched_bytes
                on_progress(Progress(phase=progress.phase, done_bytes=done, total_bytes=total, fetched_bytes=fetched))

            links.append(self._fetch_file(place, model, file, report, cancel))
            before, received = before + file.size, received + last.fetched_bytes
        if revision:
            place.remember(revision, model.revision)
        return tuple(links[: len(model.files)])

    def _fetch_file(
        self,
        place: CachedRepository,
        model: RemoteModel,
        file: RepositoryFile,
        on_progress: OnProgress,
        cancel: threading.Event,
    ) -> Path:
        link = place.link(model.revision, file.path)
        if link.exists():
            return link
        facts = self.client.file(model.repository, file.path, model.revision)
        content = place.content(facts.etag)
        with _locked(place.lock(facts.etag), place.partial(facts.etag), facts.size, on_progress, cancel):
            if not content.exists():
                # The sizes before came from the list of the repository. The hub may say something else here.
                self._check_space(place, (RepositoryFile(path=file.path, size=facts.size, sha256=facts.etag),))
                self._receive(place, model.repository, file, facts, on_progress, cancel)
            return place.publish(model.revision, file.path, facts.etag)

    def _receive(
        self,
        place: CachedRepository,
        repository: str,
        file: RepositoryFile,
        facts: HubFileFacts,
        on_progress: OnProgress,
        cancel: threading.Event,
    ) -> None:
        job = Job(
            name=file.path,
            size=facts.size,
            sha256=facts.sha256 or file.sha256,
            digest=facts.etag,
            prefix=b"GGUF" if facts.size >= 4 else b"",
            kind=("a GGUF file", "Choose another file of the repository: mesh-llm models show hf:OWNER/REPO"),
            mirror="set HF_ENDPOINT to another mirror",
        )
        content = place.content(facts.etag)
        checked = content.with_name(f"{content.name}.checked.incomplete")
        opener = self.client.opener(repository, file.path, facts)
        take_over(models_directory(), place.partial(facts.etag), facts.size, facts.etag)
        try:
            fetch(job, place.partial(facts.etag), checked, opener, on_progress, cancel, self._connections)
            read_header(checked)
            checked.replace(content)
        except GgufError as error:
            checked.unlink(missing_ok=True)
            raise _unusable(repository, file.path, error) from error

    def _check_space(self, place: CachedRepository, files: tuple[RepositoryFile, ...]) -> None:
        """Refuse, before the first byte, what the disk cannot hold. Raises MeshError `disk_full`."""
        needed = sum(
            file.size - allocated_bytes(place.partial(file.sha256)) for file in files if not _is_cached(place, file)
        )
        require_space(place.root, needed)


class _Pieces:
    """A file to read from its beginning, made of the pieces that a connection receives."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._left = b""

    def read(self, count: int) -> bytes:
        """The next `count` bytes; fewer only at the end."""
        parts, have = [self._left], len(self._left)
        while have < count and (piece := next(self._pieces, b"")):
            parts.append(piece)
            have += len(piece)
        whole = b"".join(parts)
        self._left = whole[count:]
        return whole[:count]


def _unusable(repository: str, path: str, error: GgufError) -> MeshError:
    return MeshError(
        code="download_invalid",
        message=f"{repository}/{path} cannot be used: {error.reason}.",
        hint="Choose another file of the repository, or another repository.",
        status=502,
    )


def _best_projector(model: RemoteModel) -> tuple[RepositoryFile, ...]:
    """Of a repository's projectors, which differ in precision only, the one in half precision."""
    by_rank = sorted(
        model.projectors, key=lambda file: (("f16" not in file.path.lower()) or "bf16" in file.path.lower(), file.size)
    )
    return tuple(by_rank[:1])


def _is_cached(place: CachedRepository, file: RepositoryFile) -> bool:
    return bool(file.sha256) and place.content(file.sha256).exists()


@contextlib.contextmanager
def _locked(lock: Path, partial: Path, size: int, on_progress: OnProgress, cancel: threading.Event) -> Generator[None]:
    """Hold the lock of a content. While another process holds it, report how far that is."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(lock)
    while True:
        if cancel.is_set():
            raise FetchCancelledError
        try:
            held.acquire(timeout=_LOCK_SECONDS)
            break
        except Timeout:
            on_progress(Progress(phase="waiting", done_bytes=min(size, allocated_bytes(partial)), total_bytes=size))
    try:
        yield
    finally:
        held.release()
