"""What `--yield` and `--use` may say."""

import pytest

from mesh_llm.cli.settings import most_slots, read_part, read_yield
from mesh_llm.core.config import YieldPolicy
from mesh_llm.core.types.errors import MeshError


@pytest.mark.parametrize(
    ("words", "policy"),
    [
        ([], YieldPolicy()),
        (["load"], YieldPolicy(load=0.5)),
        (["load:70%"], YieldPolicy(load=0.7)),
        (["load:0.7,battery"], YieldPolicy(load=0.7, battery=True)),
        (["auto"], YieldPolicy(load=0.5, battery=True, fullscreen=True)),
        (["load:20%", "auto"], YieldPolicy(load=0.2, battery=True, fullscreen=True)),
        (["09:00-17:30", "22:00-8:00"], YieldPolicy(schedule=((540, 1050), (1320, 480)))),
        (["18:00-24:00,fullscreen"], YieldPolicy(fullscreen=True, schedule=((1080, 1440),))),
    ],
)
def test_when_to_yield(words: list[str], policy: YieldPolicy) -> None:
    assert read_yield(words) == policy


@pytest.mark.parametrize(
    "word",
    ["", "sometimes", "loads", "load:0", "load:150%", "9-17", "25:00-26:00", "09:61-10:00", "09:00-09:00"],
)
def test_what_is_not_understood_says_what_would_be(word: str) -> None:
    with pytest.raises(MeshError) as refused:
        read_yield([word])
    assert refused.value.hint


def test_parts() -> None:
    assert read_part("50%", "--use") == 0.5
    assert read_part("0.25", "--use") == 0.25
    assert read_part("100%", "--use") == 1.0
    for bad in ("0", "0%", "101%", "-1", "half", "nan", "inf"):
        with pytest.raises(MeshError):
            read_part(bad, "--use")


def test_slots_follow_the_share() -> None:
    assert [most_slots(share) for share in (1.0, 0.8, 0.5, 0.3, 0.25, 0.1)] == [4, 4, 2, 2, 1, 1]
