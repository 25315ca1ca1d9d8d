"""The models that come with the program, as package data: `tiny`, and the draft that guesses ahead for it."""

from importlib import resources
from pathlib import Path

from mesh_llm.core.errors import MeshError

BUILTIN_NAMES = ("tiny", "tiny-draft")


def builtin_path(name: str) -> Path | None:
    """The file of a built-in model; None where this installation has none, or not as a file of its own."""
    path = Path(str(resources.files("mesh_llm.models") / "builtin" / f"{name}.gguf"))
    return path if path.is_file() else None


def require_builtin(name: str) -> Path:
    """The file of a built-in model. Raises MeshError `builtin_missing`."""
    path = builtin_path(name)
    if path is None:
        raise MeshError(
            code="builtin_missing",
            message=f"The built-in model {name} is not part of this installation.",
            hint="Install mesh-llm again from its package, or give a GGUF file: mesh-llm --model PATH.",
            status=404,
        )
    return path
