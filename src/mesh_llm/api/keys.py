"""API keys: where they come from, and how one that is shown is checked."""

import hashlib
import hmac
import re
from collections.abc import Iterable
from pathlib import Path

from mesh_llm.core.errors import MeshError

_KEY = re.compile(r"[\x21-\x7e]{8,512}")


def collect_keys(given: Iterable[str], environment: str | None = None, file: Path | None = None) -> tuple[str, ...]:
    """Gather the keys of `--api-key`, of MESH_LLM_API_KEY (commas between several) and of a file, one per line.

    Empty lines of the file and those that begin with # are skipped.

    Raises:
        MeshError: `bad_api_key` for a key that no header could carry or that is too short to be one;
            `api_key_file` where the file cannot be read.
    """
    keys = [key.strip() for key in given]
    keys += [key.strip() for key in (environment or "").split(",") if key.strip()]
    if file is not None:
        try:
            text = file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise MeshError(
                code="api_key_file",
                message=f"Cannot read the API keys in {file}: {error}.",
                hint="Give a text file with one key per line.",
                status=400,
            ) from error
        keys += [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for key in keys:
        if not _KEY.fullmatch(key):
            raise MeshError(
                code="bad_api_key",
                message="An API key must be 8 to 512 visible ASCII characters, without spaces.",
                hint="Make one with: openssl rand -hex 24",
                status=400,
            )
    return tuple(dict.fromkeys(keys))


class KeyRing:
    """Checks keys in a time that tells nothing of them: digests of equal length, each one compared."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accepts(self, shown: Iterable[bytes]) -> bool:
        """Whether one of the keys that a request shows is one of ours."""
        accepted = False
        for candidate in map(_digest, shown):
            for digest in self._digests:
                accepted |= hmac.compare_digest(candidate, digest)
        return accepted


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
