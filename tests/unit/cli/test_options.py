"""The options of serving: ranges, old names, and their help."""

import re

import click
import pytest
from tests.unit.cli.test_settings import parse

from mesh_llm.cli.main import cli
from mesh_llm.cli.options import SECTIONS


@pytest.mark.parametrize(
    "args",
    [
        ("--port", "70000"),
        ("--ctx-size", "0"),
        ("--parallel", "0"),
        ("--max-vram", "0"),
        *((option, number) for option in ("--max-vram", "--seed-limit", "--max-rtt") for number in ("nan", "inf")),
        ("--resume-wait", "nan"),
    ],
)
def test_values_out_of_range_are_refused(args: tuple[str, str]) -> None:
    with pytest.raises(click.BadParameter):
        parse(*args)


def test_a_bad_value_of_an_old_name_is_refused() -> None:
    with pytest.raises(click.BadParameter, match="not a finite number") as caught:
        parse("--share-limit", "nan")
    assert caught.value.param is not None
    assert caught.value.param.opts == ["--seed-limit"]


def test_the_second_name_of_an_option_is_completed() -> None:
    context = cli.make_context("mesh-llm", [], resilient_parsing=True)
    assert "--bind-port" in {item.value for item in cli.shell_complete(context, "--bind")}


@pytest.mark.parametrize("old", ["--share", "--share-limit", "--no-share"])
def test_old_names_are_neither_in_help_nor_completed(old: str) -> None:
    context = cli.make_context("mesh-llm", [], resilient_parsing=True)
    assert f"{old} " not in cli.get_help(context)
    assert old not in {item.value for item in cli.shell_complete(context, "--s") + cli.shell_complete(context, "--n")}


def test_help_lists_every_option_once_and_by_section() -> None:
    text = cli.get_help(cli.make_context("mesh-llm", [], resilient_parsing=True))
    for option in (option for section in SECTIONS.values() for option in section):
        assert len(re.findall(rf"^  {option.opts[0]}\b(?!-)", text, re.MULTILINE)) == 1, option.opts
    for title in ("Commands", *SECTIONS, "Other"):
        assert f"\n{title}:\n" in text
