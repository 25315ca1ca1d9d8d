"""Pages of models as Anthropic lists them."""

from typing import Any

from tests.support.api_harness import route

from mesh_llm.api.dialects.model_lists import anthropic_list

ROUTES = [route(name) for name in ("a", "b", "c", "d", "e")]


def page(query: str) -> tuple[list[str], object]:
    told: dict[str, Any] = anthropic_list(ROUTES, query)
    names = [one.id for one in told["data"]]
    assert (told["first_id"], told["last_id"]) == ((names[0], names[-1]) if names else (None, None))
    return names, told["has_more"]


def test_pages() -> None:
    assert page("") == (["a", "b", "c", "d", "e"], False)
    assert page("limit=2") == (["a", "b"], True)
    assert page("limit=2&after_id=b") == (["c", "d"], True)
    assert page("limit=2&after_id=d") == (["e"], False)
    assert page("limit=2&before_id=e") == (["c", "d"], True)
    assert page("limit=9&before_id=c") == (["a", "b"], False)
    assert page("limit=x&after_id=unknown") == (["a", "b", "c", "d", "e"], False)
    assert page("after_id=e") == ([], False)
