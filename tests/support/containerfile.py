"""Reads a Containerfile: its instructions, with variables put in. As much of the format as ours uses."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

_VARIABLE = re.compile(r"\$\{(\w+)\}|\$(\w+)")


@dataclass(frozen=True)
class Instruction:
    """One instruction. `flags`: its `--name=value`; `words`: of a JSON list, else split at spaces."""

    name: str
    text: str
    flags: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def words(self) -> list[str]:
        """The arguments."""
        return json.loads(self.text) if self.text.startswith("[") else self.text.split()


@dataclass(frozen=True)
class Stage:
    """What follows one FROM."""

    base: str
    name: str
    instructions: list[Instruction]


def read(path: Path, **arguments: str) -> list[Stage]:
    """The stages of a Containerfile. `arguments`: as `--build-arg` gives them."""
    text = "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#"))
    outer: dict[str, str] = {}
    inner: dict[str, str] = outer
    stages: list[Stage] = []
    for line in filter(str.strip, text.replace("\\\n", " ").splitlines()):
        name, _, rest = line.strip().partition(" ")
        flags: dict[str, str] = {}
        rest = rest.strip()
        while found := re.match(r"--([a-z-]+)=(\S+)\s+", rest) if name != "RUN" else None:
            flags[found[1]] = found[2]
            rest = rest[found.end() :]
        if name == "ARG":
            variable, _, default = rest.partition("=")
            inner[variable] = arguments.get(variable, default)
            continue
        # FROM knows what stands before the first one; the shell of a RUN gets the stage's arguments too.
        rest = _put_in(rest, outer if name == "FROM" else inner)
        if name == "FROM":
            base, _, stage = rest.partition(" AS ")
            inner = {}
            stages.append(Stage(base, stage, []))
            continue
        stages[-1].instructions.append(Instruction(name, rest, flags))
    return stages


def _put_in(text: str, values: dict[str, str]) -> str:
    return _VARIABLE.sub(lambda found: values.get(found[1] or found[2], found[0]), text)


def only(stage: Stage, name: str) -> list[Instruction]:
    """A stage's instructions of one kind."""
    return [one for one in stage.instructions if one.name == name]
