import pytest

from mesh_llm.core.types.errors import listed


@pytest.mark.parametrize(
    ("names", "text"),
    [("", ""), ("a", "a"), ("ab", "a and b"), ("abc", "a, b and c"), ("abcd", "a, b, c and d")],
)
def test_names_in_a_sentence(names: str, text: str) -> None:
    assert listed(list(names)) == text


def test_many_names_in_a_sentence() -> None:
    assert listed(list("abc"), 3) == "a, b and c"
    assert listed(list("abcde"), 2) == "a, b and 3 more"
