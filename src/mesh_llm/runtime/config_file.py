"""Configuration files: where they are, and reading one. What a key means is not known here.

`MESH_LLM_HOME/config.toml` is the user's, `/etc/mesh-llm/config.toml` that of the machine
(`MESH_LLM_SYSTEM_CONFIG` names another one).
"""

import os
import re
import stat
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mesh_llm.core.types.errors import MeshError
from mesh_llm.runtime.home import home_root

SYSTEM_VARIABLE = "MESH_LLM_SYSTEM_CONFIG"
MOST_BYTES = 1 << 20

_SYSTEM = Path("/etc/mesh-llm/config.toml")
_AT = re.compile(r" ?\(at (?:line (\d+), column \d+|end of document)\)")
_PART = r"""(?:"(?:[^"\\\n]|\\.)*"|'[^'\n]*'|[A-Za-z0-9_-]+)"""
_DOTTED = re.compile(rf"[ \t]*({_PART}(?:[ \t]*\.[ \t]*{_PART})*)[ \t]*")
_QUOTES = ('"""', "'''", '"', "'")

Keys = tuple[str, ...]


def user_path() -> Path:
    """The user's file. Raises MeshError(home_unknown)."""
    return home_root() / "config.toml"


def system_path() -> Path:
    """The machine's file."""
    return Path(os.environ.get(SYSTEM_VARIABLE) or _SYSTEM)


def plain(key: str) -> str:
    """A key with dashes: `ctx_size` is `ctx-size`."""
    return key.replace("_", "-")


@dataclass(frozen=True)
class ConfigFile:
    """One file as it was read.

    Attributes:
        path: of the file.
        text: its content.
        values: the same, parsed.
        mode: permissions of the file.
    """

    path: Path
    text: str
    values: dict[str, Any]
    mode: int = 0o600
    _lines: dict[Keys, int] = field(default_factory=dict[Keys, int])

    def line(self, *keys: str) -> int:
        """The line of a key, counted from 1; that of its table if the key is not found; 0: unknown."""
        if not self._lines:
            for found, line in _positions(self.text):
                for length in range(1, len(found) + 1):
                    self._lines.setdefault(found[:length], line)
        wanted = tuple(map(plain, keys))
        return next((self._lines[wanted[:n]] for n in range(len(wanted), 0, -1) if wanted[:n] in self._lines), 0)

    def place(self, *keys: str) -> str:
        """The file and the line of a key, for people."""
        line = self.line(*keys)
        return f"{self.path}:{line}" if line else str(self.path)

    def error(self, keys: Keys, message: str, hint: str) -> MeshError:
        """An error about a key, with its place."""
        return MeshError(code="config_invalid", message=f"{self.place(*keys)}: {message}", hint=hint, status=400)


def read_config(path: Path) -> ConfigFile | None:
    """Read a file; None if there is none.

    Raises:
        MeshError: `config_unreadable`, `config_invalid`, `config_exposed`.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(MOST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if not os.access(path.parent, os.X_OK):
            # The home itself is out of reach: whoever needs it says so, and what to type.
            return None
        raise MeshError(
            code="config_unreadable",
            message=f"Cannot read {path}: {error.strerror or error}.",
            hint="Correct its permissions, or move it away.",
            status=409,
        ) from error
    if os.name == "posix" and mode & stat.S_IWOTH:
        raise MeshError(
            code="config_exposed",
            message=f"Every user of this machine may write {path}, and so choose what this node does.",
            hint=f"Take that right away: chmod o-w {path}",
            status=409,
        )
    return parse_config(path, data, stat.S_IMODE(mode))


def parse_config(path: Path, data: bytes, mode: int = 0o600) -> ConfigFile:
    """Parse the content of a file. Raises MeshError(config_invalid)."""
    if len(data) > MOST_BYTES:
        raise _invalid(path, 0, f"it is longer than {MOST_BYTES >> 20} MiB.", "Shorten it.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _invalid(path, line, "it is not UTF-8.", "Save it as UTF-8.") from None
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = _AT.search(str(error))
        line = int(found[1]) if found and found[1] else text.count("\n") + 1
        why = _AT.sub("", str(error)).strip()
        hint = "Texts are in quotation marks, lists in square brackets; see https://toml.io."
        raise _invalid(path, line, f"it is not TOML: {why}.", hint) from None
    except (RecursionError, ValueError) as error:
        raise _invalid(path, 0, f"it is not TOML that can be read: {error}.", "Simplify it.") from None
    return ConfigFile(path, text, values, mode)


def check_secrets(file: ConfigFile, secrets: list[str]) -> None:
    """Refuse a file with secrets that others may read. `secrets`: its keys that hold one.

    Members of the file's group may read the machine's file, which belongs to root.

    Raises:
        MeshError: `config_exposed`.
    """
    others = stat.S_IROTH if file.path == system_path() else stat.S_IROTH | stat.S_IRGRP
    if secrets and os.name == "posix" and file.mode & others:
        chmod = "o-rwx" if file.path == system_path() else "go-rwx"
        raise MeshError(
            code="config_exposed",
            message=f"{file.place(secrets[0])}: {secrets[0]} is a secret, and other users may read the file.",
            hint=f"Keep them out: chmod {chmod} {file.path}",
            status=409,
        )


def _invalid(path: Path, line: int, problem: str, hint: str) -> MeshError:
    place = f"{path}:{line}" if line else str(path)
    return MeshError(code="config_invalid", message=f"{place}: {problem}", hint=hint, status=400)


def _positions(text: str) -> Iterator[tuple[Keys, int]]:
    """The line of each key and table of a valid file. Keys of inline tables are not among them."""
    table: Keys = ()
    at, line = 0, 1
    while at < len(text):
        end = text.find("\n", at)
        end = len(text) if end < 0 else end
        begin = text[at:end].lstrip()
        if begin.startswith("["):
            found = _DOTTED.match(begin.lstrip("["))
            table = _keys(found[1]) if found else table
            yield table, line
        elif (found := _DOTTED.match(text, at)) and text[found.end() : found.end() + 1] == "=":
            yield (*table, *_keys(found[1])), line
            end = _end_of_value(text, found.end() + 1)
        line += text.count("\n", at, end) + 1
        at = end + 1


def _keys(dotted: str) -> Keys:
    """The parts of a dotted key, without quotation marks."""
    try:
        found: Any = tomllib.loads(f"{dotted} = 0")
    except tomllib.TOMLDecodeError:
        return ()
    keys: list[str] = []
    while isinstance(found, dict):
        key, found = next(iter(found.items()))  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        keys.append(plain(str(key)))  # pyright: ignore[reportUnknownArgumentType]
    return tuple(keys)


def _end_of_value(text: str, at: int) -> int:
    """Where the line ends on which a value ends: texts and lists may go over several."""
    depth = 0
    while at < len(text):
        quote = next((mark for mark in _QUOTES if text.startswith(mark, at)), "")
        if quote:
            at = _end_of_text(text, at + len(quote), quote)
            continue
        char = text[at]
        if char == "#":
            end = text.find("\n", at)
            at = len(text) if end < 0 else end
            continue
        if char == "\n" and depth <= 0:
            return at
        depth += (char in "[{") - (char in "]}")
        at += 1
    return len(text)


def _end_of_text(text: str, at: int, quote: str) -> int:
    while at < len(text):
        if quote[0] == '"' and text[at] == "\\":
            at += 2
        elif text.startswith(quote, at):
            at += len(quote)
            while len(quote) == 3 and text.startswith(quote[0], at):
                at += 1
            return at
        else:
            at += 1
    return len(text)
