"""Compares the source that the firewall's rules were read from with that of the pinned engine.

    python -m tools.rpc_kernels [--archive FILE]    lists functions that changed, or are gone
    python -m tools.rpc_kernels --write             after all of them were read and the rules follow them

A new release of the engine changes kernels, and a rule that was right for the old one may let the new one run over. So
each function and file that a rule names has a digest here, and a test fails until they were read again.
"""

import argparse
import hashlib
import json
import re
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

from tools.engine_source import archive

from mesh_llm.engine.sources.embedded.archive import VERSION
from mesh_llm.wire.ggml_rpc.rules import sources

TABLE = Path(__file__).parent.parent / "tests" / "data" / "rpc_kernels.json"
_SOURCE = "/llama.cpp/ggml/src/"
_HEADER = "/llama.cpp/ggml/include/ggml.h"


class Source:
    """C and C++ files of one archive, by their path below ggml/src."""

    def __init__(self, path: Path) -> None:
        self.files: dict[str, str] = {}
        wanted = {name.partition(":")[0] for name in sources()}
        with tarfile.open(path) as tar:
            for member in tar:
                name = member.name.partition(_SOURCE)[2] or ("ggml.h" if member.name.endswith(_HEADER) else "")
                if name in wanted or name == "ggml.h":
                    file = tar.extractfile(member)
                    self.files[name] = "" if file is None else file.read().decode("utf-8", "replace")

    def text(self, name: str) -> str | None:
        """A function, a table or a whole file; None where it is not there. Functions of one name are joined."""
        path, _, function = name.partition(":")
        text = self.files.get(path)
        if text is None or function == "*":
            return text
        found = "\n".join(_definitions(text, function))
        return found or None


def _definitions(text: str, function: str) -> list[str]:
    """Each definition from its first line to the closing brace, which stands alone at the beginning of a line."""
    start = re.compile(rf"^(?![ \t#/}}]).*\b{re.escape(function)}\b(\(|\[| = \{{)", re.MULTILINE)
    found: list[str] = []
    for match in start.finditer(text):
        end = re.compile(r"^}.*$", re.MULTILINE).search(text, match.end())
        # A declaration ends with a semicolon before anything is opened.
        opened, ended = text.find("{", match.start()), text.find(";", match.end())
        if end is not None and opened >= 0 and (ended < 0 or opened < ended):
            found.append(text[match.start() : end.end()])
    return found


def digests(source: Source) -> dict[str, str]:
    """Of all that the rules were read from; "" where it is not there. Spaces and line breaks do not count."""
    found: dict[str, str] = {}
    for name in sources():
        text = source.text(name)
        found[name] = "" if text is None else hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:16]
    return found


def enumeration(source: Source, name: str) -> list[str]:
    """Members of an enumeration of ggml.h, in order."""
    body = re.search(rf"enum {name} {{(.*?)}};", source.files["ggml.h"], re.DOTALL)
    lines = [] if body is None else [line.partition("//")[0].strip() for line in body[1].splitlines()]
    return [part.strip() for line in lines for part in line.split(",") if part.strip()]


def table() -> Mapping[str, str]:
    """The digests of what was read, by name; the release by the name "release"."""
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def changed(source: Source) -> list[str]:
    """What is to be read again."""
    known = table()
    return [name for name, digest in digests(source).items() if not digest or known.get(name) != digest]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", type=Path, help="another release's source archive")
    parser.add_argument("--write", action="store_true", help="all of it was read, and the rules follow it")
    arguments = parser.parse_args()
    source = Source(arguments.archive or archive())
    names = changed(source)
    if arguments.write:
        TABLE.write_text(json.dumps({"release": VERSION} | digests(source), indent=1) + "\n")
    print("\n".join(names) or "All that the rules were read from is as it was.")
    sys.exit(bool(names) and not arguments.write)


if __name__ == "__main__":
    main()
