import ast
from pathlib import Path
from typing import Any

import msgspec
import pytest

import mesh_llm
from mesh_llm.core.types.errors import UNREADABLE, listed

SOURCE = Path(mesh_llm.__file__).parent


@pytest.mark.parametrize(
    ("names", "text"),
    [("", ""), ("a", "a"), ("ab", "a and b"), ("abc", "a, b and c"), ("abcd", "a, b, c and d")],
)
def test_names_in_a_sentence(names: str, text: str) -> None:
    assert listed(list(names)) == text


def test_many_names_in_a_sentence() -> None:
    assert listed(list("abc"), 3) == "a, b and c"
    assert listed(list("abcde"), 2) == "a, b and 3 more"


class Named(msgspec.Struct):
    name: str = ""


@pytest.mark.parametrize(
    ("data", "kind"),
    [(b"", Named), (b"[", Named), (b"[]", Named), (b'{"name":"\xff"}', Named), (b"[" * 100_000, Any)],
)
def test_whatever_cannot_be_decoded(data: bytes, kind: Any) -> None:
    with pytest.raises(UNREADABLE):
        msgspec.json.decode(data, type=kind)


def test_who_catches_one_error_of_decoding_catches_all() -> None:
    """ValidationError alone is another matter: the bytes were read, and say something else."""
    some = {"msgspec.MsgspecError", "msgspec.DecodeError"}
    partly = [
        f"{path.relative_to(SOURCE)}: {ast.unparse(node).splitlines()[0]}"
        for path in sorted(SOURCE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if some & {ast.unparse(one) for caught in _caught(node) for one in ast.walk(caught)}
    ]
    assert not partly


def _caught(node: ast.AST) -> list[ast.expr]:
    """The errors that a handler, or a call of `suppress`, names."""
    if isinstance(node, ast.ExceptHandler):
        return [node.type] if node.type is not None else []
    return node.args if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress") else []
