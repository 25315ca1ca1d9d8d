"""Reads the last lines of the node's logs, for the console and for `mesh-llm logs`."""

from pathlib import Path

from mesh_llm.core.types.errors import MeshError

_MAX_BYTES = 4 * 1024 * 1024


class LogReader:
    """The `*.log` files of one directory. Files outside it cannot be named."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def names(self) -> list[str]:
        """Names of the logs, without `.log`, sorted."""
        if not self._directory.is_dir():
            return []
        return sorted(path.stem for path in self._directory.glob("*.log"))

    def path(self, name: str) -> Path:
        """The file of one log. Raises MeshError(log_not_found), which lists the logs."""
        names = self.names()
        if name not in names:
            listed = ", ".join(names) or "none yet"
            raise MeshError(
                code="log_not_found", message=f"There is no log called {name!r}.", hint=f"Logs: {listed}.", status=404
            )
        return self._directory / f"{name}.log"

    def tail(self, name: str, lines: int) -> str:
        """The last `lines` lines of a log, at most 4 MiB. Raises MeshError(log_not_found)."""
        with self.path(name).open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _MAX_BYTES))
            text = file.read(_MAX_BYTES).decode("utf-8", "replace")
        return "".join(line + "\n" for line in text.splitlines()[-lines:])
