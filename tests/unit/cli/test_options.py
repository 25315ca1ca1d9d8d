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


@pytest.mark.parametrize(("text", "seconds"), [("90", 90.0), ("1.5", 1.5), ("30m", 1800.0), ("2H", 7200.0), ("0", 0.0)])
def test_a_time_is_seconds_or_has_a_unit(text: str, seconds: float) -> None:
    assert parse("--ttl", text)["ttl"] == seconds


@pytest.mark.parametrize("text", ["soon", "30 minutes", "-5", "nan", "inf"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        parse("--ttl", text)


def test_a_time_beyond_its_limit_is_refused_with_a_unit_too() -> None:
    with pytest.raises(click.BadParameter, match="7200"):
        parse("--drain", "2h")


RELAY_VERBS = (cli, *(cli.get_command(click.Context(cli), verb) for verb in ("serve", "discover", "rotate-key")))


@pytest.mark.parametrize("command", RELAY_VERBS, ids=lambda command: command.name)
def test_relay_and_nostr_relay_are_one_option_and_one_is_shown(command: click.Command) -> None:
    words = ["--relay", "ws://a", "--nostr-relay", "ws://b", "--relay", "ws://c"]
    context = command.make_context("x", words)
    assert context.params["nostr_relays"] == ("ws://a", "ws://b", "ws://c")
    assert command.make_context("x", ["--relay", "ws://a"]).params["nostr_relays"] == ("ws://a",)
    assert command.make_context("x", ["--nostr-relay", "ws://a"]).params["nostr_relays"] == ("ws://a",)
    text = command.get_help(context)
    assert "--nostr-relay URL" in text
    assert "--relay URL" not in text.replace("--nostr-relay URL", "")
    completed = {item.value for item in command.shell_complete(context, "--")}
    assert "--nostr-relay" in completed
    assert "--relay" not in completed


def test_every_command_that_has_one_of_the_two_has_both() -> None:
    context = click.Context(cli)
    for verb in cli.list_commands(context):
        command = cli.get_command(context, verb)
        assert command is not None
        names = {name for option in command.params for name in option.opts}
        assert ("--relay" in names) == ("--nostr-relay" in names), verb


def test_a_flag_without_effect_says_so_and_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    context = cli.make_context("mesh-llm", ["--no-merge"], resilient_parsing=False)
    assert "--no-merge has no effect" in capsys.readouterr().err
    assert "--no-merge" not in cli.get_help(context)


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
