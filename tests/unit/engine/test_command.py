import sys

import pytest

from mesh_llm.engine.process import Command, child_environment, listening_port, python_module


def test_children_do_not_see_what_would_change_them_or_is_secret() -> None:
    parent = {
        "PATH": "/bin",
        "LLAMA_ARG_HOST": "0.0.0.0",
        "LLAMA_API_KEY": "k",
        "MESH_LLM_API_KEY": "k",
        "HF_TOKEN": "t",
        "GGML_RPC_DEBUG": "1",
        "CUDA_VISIBLE_DEVICES": "1",
    }
    seen = child_environment(Command(argv=("x",), env={"EXTRA": "1"}), parent)
    assert seen == {
        "PATH": "/bin",
        "CUDA_VISIBLE_DEVICES": "1",
        "GGML_NO_BACKTRACE": "1",
        "PYTHONUNBUFFERED": "1",
        "EXTRA": "1",
    }


@pytest.mark.parametrize(
    ("line", "port"),
    [
        (b"0.00.101.220 I srv  llama_server: listening on http://127.0.0.1:41234", 41234),
        (b"main: server is listening on http://127.0.0.1:8080 - starting the main loop", 8080),
        (b"main: HTTP server is listening, hostname: 127.0.0.1, port: 8081, http threads: 15", 8081),
        (b"listening on http://0.0.0.0:8080", None),
        (b"listening on http://127.0.0.1:808012", None),
        (b"loading model", None),
    ],
)
def test_finds_the_port_in_a_servers_output(line: bytes, port: int | None) -> None:
    assert listening_port(line) == port


def test_modules_run_from_where_this_package_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    argv, env = python_module("mesh_llm.x", "arg")
    assert argv == (sys.executable, "-P", "-m", "mesh_llm.x", "arg")
    root, _, rest = env["PYTHONPATH"].partition(":")
    assert rest == "/elsewhere"
    assert sys.modules["mesh_llm"].__file__ == f"{root}/mesh_llm/__init__.py"
