"""What a name in a request means."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh_llm.core.routing.aliases import AliasError, Aliases
from mesh_llm.core.routing.model_names import Ambiguous, Candidates, NotFound, match, resolve
from mesh_llm.core.routing.ranking import ModelRoute, RoutingSnapshot
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import ModelStatus

CANDIDATES = {
    ModelName("Qwen2.5-3B-Instruct"): ("qwen2.5-3b-instruct-q4_k_m",),
    ModelName("Qwen2.5-7B-Instruct"): (),
    ModelName("tiny"): ("builtin-tiny",),
    ModelName("tiny-coder"): (),
    ModelName("Owner/Llama"): ("llama-3",),
}


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("tiny", "tiny"),
        ("builtin-tiny", "tiny"),
        ("TINY", "tiny"),
        ("Tiny-C", "tiny-coder"),
        ("qwen2.5-3b", "Qwen2.5-3B-Instruct"),
        ("Qwen2.5-3B-Instruct-Q4_K_M.gguf", "Qwen2.5-3B-Instruct"),
        ("/models/x/tiny.gguf", "tiny"),
        ("C:\\models\\Tiny.GGUF", "tiny"),
        ("owner/l", "Owner/Llama"),
        ("llama", "Owner/Llama"),
    ],
)
def test_names_that_mean_one_model(asked: str, meant: str):
    assert match(asked, CANDIDATES) == meant


def test_an_ambiguous_beginning_lists_the_choices():
    assert match("qwen", CANDIDATES) == Ambiguous(
        "qwen", (ModelName("Qwen2.5-3B-Instruct"), ModelName("Qwen2.5-7B-Instruct"))
    )


def test_unknown_names_list_what_there_is():
    assert match("gpt-4o", CANDIDATES) == NotFound("gpt-4o", tuple(sorted(CANDIDATES)))


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("tiny:latest", "tiny"),
        ("openai/tiny", "tiny"),
        ("hf.co/owner/tiny", "tiny"),
        ("hf.co/owner/Tiny-GGUF:latest", "tiny"),
        ("tiny[1m]", "tiny"),
        ("openai/TINY:latest[1m]", "tiny"),
        ("tiny:q4_0", "tiny"),
        ("qwen2.5:7b", "Qwen2.5-7B-Instruct"),
        ("hf.co/Qwen/Qwen2.5-3B-Instruct-GGUF:Q4_K_M", "Qwen2.5-3B-Instruct"),
        ("openrouter/owner/llama:latest", "Owner/Llama"),
    ],
)
def test_marks_of_other_services_are_understood(asked: str, meant: str):
    route = resolve(asked, served(CANDIDATES))
    assert isinstance(route, ModelRoute)
    assert route.name == meant
    # A model to serve is meant as it is written: another owner's is another one.
    assert isinstance(match(asked, CANDIDATES), NotFound)


@pytest.mark.parametrize(
    "asked", ["qwen2.5:14b", "tinier:latest", "openai/gpt-4o", "openai/", ":latest", "/", ":", "[1m]", "a/:b", "//x"]
)
def test_marks_do_not_make_a_name_of_nothing(asked: str):
    found = resolve(asked, served(CANDIDATES))
    assert isinstance(found, NotFound)
    assert (found.asked, set(found.choices)) == (asked, set(CANDIDATES))


def test_a_beginning_behind_marks_that_means_several_lists_them():
    found = resolve("openai/qwen2.5:latest", served(CANDIDATES))
    assert isinstance(found, Ambiguous)
    assert found.asked == "openai/qwen2.5:latest"
    assert found.choices == (ModelName("Qwen2.5-3B-Instruct"), ModelName("Qwen2.5-7B-Instruct"))


@pytest.mark.parametrize("name", ["tiny:latest", "openai/tiny", "tiny[1m]"])
def test_a_model_whose_own_name_has_marks_wins(name: str):
    route = resolve(name, served({ModelName("tiny"): (), ModelName(name): ()}))
    assert isinstance(route, ModelRoute)
    assert route.name == name


@given(st.text(alphabet="aA:/[].-x1", max_size=30))
def test_any_name_means_something_or_nothing(asked: str):
    assert isinstance(resolve(asked, served({ModelName("a"): ("x",)})), (ModelRoute, Ambiguous, NotFound))


def test_two_models_that_differ_in_case_only():
    names = {ModelName("A"): (), ModelName("a"): ()}
    assert match("a", names) == "a"
    assert match("A", names) == "A"
    assert isinstance(match("A.gguf", names), Ambiguous)


def served(candidates: Candidates) -> RoutingSnapshot:
    routes = {
        name: ModelRoute(name=name, status=ModelStatus.WARM, aliases=aliases) for name, aliases in candidates.items()
    }
    return RoutingSnapshot(version=1, node=NodeId("a" * 64), models=routes)


def snapshot(default: str | None = "tiny", **statuses: ModelStatus) -> RoutingSnapshot:
    routes = {ModelName(name): ModelRoute(name=ModelName(name), status=status) for name, status in statuses.items()}
    return RoutingSnapshot(
        version=1, node=NodeId("a" * 64), default=ModelName(default) if default else None, models=routes
    )


def test_no_name_means_the_nodes_own():
    view = snapshot(tiny=ModelStatus.WARM, other=ModelStatus.COLD)
    for asked in (None, ""):
        route = resolve(asked, view)
        assert isinstance(route, ModelRoute)
        assert route.name == "tiny"


def test_no_name_and_no_default():
    for default in (None, "gone"):
        view = snapshot(default, cold=ModelStatus.COLD, warm=ModelStatus.WARM)
        assert resolve(None, view) == NotFound(None, (ModelName("warm"), ModelName("cold")))


def test_a_shared_beginning_means_the_served_one():
    view = snapshot(**{"qwen-a": ModelStatus.COLD, "qwen-b": ModelStatus.LOADING})
    route = resolve("qwen", view)
    assert isinstance(route, ModelRoute)
    assert route.name == "qwen-b"
    both = snapshot(**{"qwen-a": ModelStatus.WARM, "qwen-b": ModelStatus.LOADING})
    assert isinstance(resolve("qwen", both), Ambiguous)


def test_an_exact_name_wins_over_a_served_one_that_begins_with_it():
    view = snapshot(**{"qwen": ModelStatus.COLD, "qwen-b": ModelStatus.WARM})
    route = resolve("qwen", view)
    assert isinstance(route, ModelRoute)
    assert route.name == "qwen"


ALIASES = Aliases(
    {
        "gpt-4o-mini": "tiny",
        "claude-*": "Qwen2.5-7B-Instruct",
        "claude-*-haiku*": "tiny",
        "tiny-coder": "Owner/Llama",
        "tin?": "Owner/Llama",
        "gone": "no-such-model",
    }
)


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("gpt-4o-mini", "tiny"),
        ("GPT-4o-Mini", "tiny"),
        ("openai/gpt-4o-mini:latest", "tiny"),
        ("claude-opus-4-8", "Qwen2.5-7B-Instruct"),
        ("claude-opus-4-8[1m]", "Qwen2.5-7B-Instruct"),
        ("anthropic/claude-3-5-haiku-latest", "tiny"),
        # A model of that very name comes first, and other readings of a name before patterns.
        ("tiny-coder", "tiny-coder"),
        ("tiny", "tiny"),
        ("TINY", "tiny"),
        ("tin4", "Owner/Llama"),
    ],
)
def test_aliases_and_patterns_of_the_user(asked: str, meant: str):
    route = resolve(asked, served(CANDIDATES), ALIASES)
    assert isinstance(route, ModelRoute)
    assert route.name == meant


def test_an_alias_of_a_model_that_is_not_there_names_both():
    found = resolve("gone", served(CANDIDATES), ALIASES)
    assert isinstance(found, NotFound)
    assert (found.asked, found.alias) == ("no-such-model", "gone")


def test_an_alias_does_not_lead_to_another_alias():
    round_about = Aliases({"a": "b", "b": "a", "c": "tiny", "d": "c"})
    for asked in ("a", "b", "d"):
        assert isinstance(resolve(asked, served({ModelName("tiny"): ()}), round_about), NotFound)


@pytest.mark.parametrize(
    ("alias", "model"),
    [("", "x"), ("x", ""), (" x", "y"), ("a\nb", "x"), ("*" * 9, "x"), ("x", "qwen*"), ("a" * 201, "x"), (1, "x")],
)
def test_what_is_no_alias_is_refused(alias: str, model: str):
    with pytest.raises(AliasError):
        Aliases({alias: model})


@given(
    st.dictionaries(st.text(min_size=1, max_size=8), st.text(min_size=1, max_size=8), max_size=5), st.text(max_size=20)
)
def test_any_aliases_mean_something_or_nothing(table: dict[str, str], asked: str):
    try:
        aliases = Aliases(table)
    except AliasError:
        return
    plain = resolve(asked, served(CANDIDATES))
    found = resolve(asked, served(CANDIDATES), aliases)
    if isinstance(plain, ModelRoute) and plain.name == asked:
        assert found == plain
