"""Builds the engine's RPC plugin, which splits models over machines, and what saves the prompt caches of its slots.

python tools/build_plugin.py               build it, unless it is there; fail where that cannot be done
python tools/build_plugin.py --optional    the same, but only say so where it cannot be done: the node works without
python tools/build_plugin.py --bundle DIR  build it, and the library that confines it, into DIR: for a wheel
"""

import argparse
import sys
from pathlib import Path

import msgspec

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.confinement.policy import compile_library
from mesh_llm.engine.installation import look, record_part
from mesh_llm.engine.sources.embedded import library_build, plugin, slot_library
from mesh_llm.engine.sources.embedded.archive import VERSION
from mesh_llm.runtime.home import Home


def main(arguments: list[str]) -> int:
    """Do as the arguments say; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optional", action="store_true")
    parser.add_argument("--bundle", type=Path, metavar="DIR")
    options = parser.parse_args(arguments)
    try:
        if options.bundle is not None:
            bundle(options.bundle)
        elif not ready(cache := Home.default().cache):
            plugin.install(cache, say)
            slot_library.install(cache, say)
    except MeshError as error:
        print(f"The RPC plugin was not built: {error.message}", file=sys.stderr)
        print(f"  {error.hint}", file=sys.stderr)
        if not options.optional:
            return 1
        print("The node works without it. It only cannot take part in a split model.", file=sys.stderr)
    return 0


def ready(cache: Path) -> bool:
    """Whether both are there."""
    slots = slot_library.find(cache) is not None or not slot_library.supported()
    return plugin.find(cache) is not None and slots


def bundle(directory: Path) -> None:
    """Build all that a wheel carries of the engine, and only that. Raises MeshError."""
    directory.mkdir(parents=True, exist_ok=True)
    compile_library(directory)
    library_build.build(plugin.LIBRARY, directory.parent, directory, say)
    if slot_library.supported():
        library_build.build(slot_library.LIBRARY, directory.parent, directory, say)
    for name in (plugin.RPC, slot_library.SLOTS):
        part = look(name, VERSION, [directory]).part
        if part is not None:
            # The log names this machine's directories.
            (directory / part.log).unlink()
            how = f"in the wheel of mesh-llm, {part.how}"
            record_part(directory, VERSION, msgspec.structs.replace(part, how=how, log=""))


def say(step: str, text: str) -> None:
    """Print what is being done, except the short steps."""
    if step in {"download", "wait", "compile"}:
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
