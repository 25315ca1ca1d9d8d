"""Homes that cannot be used: every verb ends with what happened and what to type, none in a traceback.

Permission bits count although CI runs as root: the programs run without the capabilities that pass them by.
"""

import asyncio
import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from tests.support.fixtures import StartNode
from tests.support.node import NodeOptions

from mesh_llm.cli.main import VERBS

_STRANGER = 54321
_PR_CAPBSET_DROP = 24
_PASSING_PERMISSIONS = (0, 1, 2, 3)
"""CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER (capabilities(7))."""

COMMANDS = {
    "serve": ["serve", "--model", "tiny"],
    "load": ["load", "tiny"],
    "drop": ["drop", "tiny"],
    "unload": ["unload", "tiny"],
    "cache": ["cache", "show"],
    "config": ["config", "show"],
    "service": ["service", "status"],
    "run": ["run", "--show", "claude"],
    "plan": ["plan", "tiny"],
    "models": ["models", "list"],
    "invite": ["invite", "create"],
    "approve": ["approve"],
    "owner": ["owner", "create"],
    "receipt": ["receipt", "show", "receipt.json"],
    "trust": ["trust", "list"],
    "discover": ["discover", "--lan"],
    "rotate-key": ["rotate-key", "--relay", "ws://127.0.0.1:9"],
    "engine": ["engine", "list"],
    "simulate": ["simulate", "--nodes", "2", "--duration", "1"],
    "completion": ["completion", "bash"],
}
NEED_NO_HOME = {"simulate", "completion", "discover", "service", "config", "receipt"}
"""What these do has nothing to do with a home."""

EVERY_VERB = f"""
import importlib, os, sys
from mesh_llm.cli.main import VERBS, main
# Once for all.
for module, _, _ in VERBS.values():
    importlib.import_module(module)
for words in {[COMMANDS.get(verb, [verb]) for verb in VERBS]!r}:
    print("===", *words, flush=True)
    child = os.fork()
    if not child:
        sys.argv = ["mesh-llm", *words]
        main()
    print("---", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
NOT_SERVING = EVERY_VERB.replace("['serve', '--model', 'tiny']", "['serve', '--help']")


def without_capabilities() -> None:
    libc = ctypes.CDLL(None)
    for capability in _PASSING_PERMISSIONS:
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)


def every_verb(env: Mapping[str, str], code: str = EVERY_VERB, cwd: Path | None = None) -> dict[str, tuple[int, str]]:
    """Exit status and output of every verb, by verb."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**env, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
        timeout=100,
        cwd=cwd,
        preexec_fn=without_capabilities,
    )
    found: dict[str, tuple[int, str]] = {}
    for part in done.stdout.split("=== ")[1:]:
        head, _, rest = part.partition("\n")
        text, _, status = rest.rpartition("--- ")
        found[head.split()[0]] = (int(status), text)
    assert set(found) == set(VERBS)
    return found


def nothing_above(root: Path) -> dict[str, str | None]:
    root.mkdir(mode=0o555)
    return {"HOME": str(root), "MESH_LLM_HOME": None}


def a_file(root: Path) -> dict[str, str | None]:
    root.touch()
    return {"MESH_LLM_HOME": str(root)}


def below_a_file(root: Path) -> dict[str, str | None]:
    root.touch()
    return {"MESH_LLM_HOME": str(root / "home")}


def no_user(root: Path) -> dict[str, str | None]:
    return {"MESH_LLM_HOME": f"~no-such-user-here/{root.name}"}


def somebody_elses(root: Path) -> dict[str, str | None]:
    root.mkdir(mode=0o700)
    give_away(root)
    return {"MESH_LLM_HOME": str(root)}


def give_away(path: Path) -> None:
    """To another user, as after `sudo mesh-llm`; where this is no root, at least out of reach."""
    if os.geteuid() == 0:
        os.chown(path, _STRANGER, _STRANGER)
    else:
        path.chmod(0)


HOMES: dict[str, tuple[Callable[[Path], dict[str, str | None]], str]] = {
    "unwritable HOME": (nothing_above, "MESH_LLM_HOME=DIR"),
    "a file": (a_file, "is not a directory"),
    "below a file": (below_a_file, "is not a directory"),
    "no such user": (no_user, "has no user of that name"),
    "somebody else's": (somebody_elses, "MESH_LLM_HOME=DIR"),
}


def environment(root: Path, changes: Mapping[str, str | None]) -> dict[str, str]:
    env = {**NodeOptions(root).environment(), **changes}
    return {name: value for name, value in env.items() if value is not None}


@pytest.mark.parametrize("kind", HOMES)
def test_every_verb_in_every_unusable_home(tmp_path: Path, kind: str) -> None:
    make, said = HOMES[kind]
    env = environment(tmp_path / "home", make(tmp_path / "home"))
    for verb, (status, text) in every_verb(env).items():
        assert "Traceback" not in text, (verb, text)
        if verb in NEED_NO_HOME:
            continue
        assert status == 1, (verb, status, text)
        assert said in text, (verb, text)
        if verb != "doctor":
            assert text.startswith("error: "), (verb, text)
        else:
            assert "FAIL  home" in text
            assert "devices" in text, "the other checks go on"


@pytest.mark.parametrize("name", ["lock", "logs/daemon.log", "daemon.json", "control-token", "key", "logs", "mesh"])
def test_a_file_of_another_user_in_the_home(tmp_path: Path, name: str) -> None:
    root = tmp_path / "home"
    place = root / name
    place.parent.mkdir(parents=True)
    if "." in name or name in {"lock", "control-token", "key"}:
        place.touch(mode=0o600)
    else:
        place.mkdir(mode=0o700)
    give_away(place)
    if name == "control-token":
        (root / "daemon.json").write_text('{"pid": 1, "api_port": 1, "console_port": 1, "started": 0}')
    # These two are written anew: such a node would serve.
    serves = name in {"daemon.json", "control-token"}
    found = every_verb(environment(root, {"MESH_LLM_HOME": str(root)}), NOT_SERVING if serves else EVERY_VERB)
    for verb, (status, text) in found.items():
        assert "Traceback" not in text, (verb, text)
        assert status in {0, 1, 3, 4}, (verb, text)
    if not serves:
        status, text = found["serve"]
        assert status == 1, text
        assert str(place) in text or str(place.parent) in text
        if os.geteuid() == 0:
            assert f"{_STRANGER}" in text
            assert "sudo chown -R" in text
    status, text = found["doctor"]
    assert status == 1 or name == "logs/daemon.log"
    assert "FAIL  home" in text or name == "logs/daemon.log"


NOBODY = """
import os, pwd
def unknown(number):
    raise KeyError(number)
pwd.getpwuid = unknown
os.environ.pop("HOME", None)
"""


def test_a_user_without_home_and_name(tmp_path: Path) -> None:
    """`docker run -u 54321`: no HOME, and no entry in the list of users."""
    env = environment(tmp_path / "home", {"MESH_LLM_HOME": None, "MESH_LLM_MODELS": None, "OLLAMA_MODELS": None})
    env.pop("HF_HOME")
    for verb, (status, text) in every_verb(env, NOBODY + EVERY_VERB, tmp_path).items():
        assert "Traceback" not in text, (verb, text)
        if verb not in NEED_NO_HOME:
            assert status == 1, (verb, status, text)
            assert "MESH_LLM_HOME=DIR" in text, (verb, text)
    # With a home for the node it all works, and nothing is left in a directory called `~`.
    env["MESH_LLM_HOME"] = str(tmp_path / "home")
    for verb, (status, text) in every_verb(env, NOBODY + NOT_SERVING, tmp_path).items():
        assert "Traceback" not in text, (verb, text)
        assert status in ({0, 1} if verb in {"doctor", "discover", "rotate-key", "download"} else {0, 1, 3}), (
            verb,
            text,
        )
        assert "home directory" not in text, (verb, text)
    assert not (tmp_path / "~").exists()


async def test_a_user_without_home_serves(tmp_path: Path, start_node: StartNode) -> None:
    shell = f'cd {tmp_path}; unset HOME MESH_LLM_MODELS OLLAMA_MODELS HF_HOME; exec "$1" -c "$CODE" "${{@:4}}"'
    code = NOBODY + "import sys\nfrom mesh_llm.cli.main import main\nsys.argv[0] = 'mesh-llm'\nmain()"
    node = await start_node("a", models=["tiny"], shell=shell, env={"CODE": code})
    assert (await node.api.get("/health")).status == 200
    assert await node.stop() == 0
    await asyncio.sleep(0)
    assert not (tmp_path / "~").exists()


SECRETS = {"key", "owner-key", "nostr.nsec", "control-token"}
"""Nothing else may stand in for these: a damaged one is said."""


DAMAGES = {"no UTF-8": b'["\xff"]', "an object of no UTF-8": b'{"a":"\xff"}', "zeros": b"\0" * 64, "nothing": b""}


@pytest.mark.parametrize("kind", DAMAGES)
async def test_damaged_files_in_a_home_stop_no_node(tmp_path: Path, start_node: StartNode, kind: str) -> None:
    """As after a power cut, or on a disk that loses bits."""
    node = await start_node("a", models=["tiny"])
    assert (await node.cli("invite", "create"))[0] == 0
    assert (await node.cli("cache", "show"))[0] == 0
    assert await node.stop() == 0
    home = node.options.home
    (mesh,) = (path for path in (home / "mesh").iterdir() if path.is_dir())
    for later in ("trust.json", "publication.json", "gpu.json", "ownership", "daemon.json", "cache/speed.json"):
        (home / later).touch()
    for later in ("peers.json", "revocations"):
        (mesh / later).touch()
    # Without the record of the mesh, and its key, the other files of the mesh would not be read.
    for kept in ({*SECRETS, "current", "mesh-key"}, SECRETS):
        files = [
            path
            for path in sorted(home.rglob("*"))
            if path.is_file() and path.name not in kept and path.suffix not in {".log", ".gguf", ".so"}
        ]
        assert len(files) > 12
        for path in files:
            path.write_bytes(DAMAGES[kind])
        await node.restart()
        assert (await node.cli("status"))[0] == 0
        assert "Traceback" not in node.process.text + node.log()
        assert await node.stop() == 0
