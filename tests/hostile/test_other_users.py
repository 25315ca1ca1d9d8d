"""Another user of the machine learns only that a node is here, and can change nothing."""

import asyncio
import contextlib
import importlib
import json
import socket
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.support.fixtures import StartNode
from tests.support.http import HttpClient
from tests.support.node import NodeProcess
from tests.support.other_user import as_nobody
from tests.support.process import words_of

pytestmark = pytest.mark.timeout(180)

# Another user may not be able to read this interpreter's files: load what it needs before.
importlib.import_module("encodings.idna")

PATHS = ("/", "/api/status", "/api/events", "/api/logs/daemon", "/api/invites", "/api/session", "/v1/models")
SPLIT = {"scope": "split", "lifetime_seconds": 3600}


def prowl(ports: list[int], home: str) -> str:
    """What another user can find out: all answers of the node's ports, and the readable part of its home."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    found: list[str] = []
    for port in ports:
        for path in (
            "/",
            "/api/status",
            "/api/events",
            "/api/logs/daemon",
            "/api/invites",
            "/api/session",
            "/v1/models",
        ):
            try:
                with opener.open(f"http://127.0.0.1:{port}{path}", timeout=3) as answer:
                    found.append(f"{answer.status} {port}{path} {all_of(answer)}")
            except urllib.error.HTTPError as error:
                found.append(f"{error.code} {port}{path} {error.read().decode()}")
        body = json.dumps(SPLIT).encode()
        for path in ("/api/invites", "/api/sign-in-links", "/api/session", "/api/stop"):
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}{path}", body, {"content-type": "application/json"}, method="POST"
            )
            try:
                with opener.open(request, timeout=10) as answer:
                    found.append(f"{answer.status} {port}{path} {answer.read().decode()}")
            except urllib.error.HTTPError as error:
                found.append(f"{error.code} {port}{path} {error.read().decode()}")
    for file in ("control-token", "daemon.json", "key", "logs/daemon.log"):
        try:
            found.append(f"200 {file} {Path(home, file).read_text()}")
        except OSError as error:
            found.append(f"{type(error).__name__} {file}")
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(f"{home}/run/console.sock")
        found.append("200 the socket")
    except OSError as error:
        found.append(f"{type(error).__name__} the socket")
    return "\n".join(found)


def all_of(answer: Any) -> str:
    """An answer's text; of an endless stream, what came before it was silent for a while."""
    pieces: list[bytes] = []
    try:
        while piece := answer.read1(100_000):
            pieces.append(piece)
    except TimeoutError:
        pass
    return b"".join(pieces).decode()


@pytest.mark.parametrize("headless", [True, False])
async def test_another_user_sees_no_secret_and_makes_no_invite(start_node: StartNode, *, headless: bool) -> None:
    words = ["--headless"] if headless else []
    # The attack as first found: despite a key on the API, the console's status contained the invite.
    node = await start_node("a", models=["tiny"], arguments=words, env={"MESH_LLM_API_KEY": "sesame"})
    status = await node.status()
    before = (await node.console.get("/api/invites")).expect().json()
    home, console, api = str(node.options.home), node.console.port, node.api.port
    token = read(node, "control-token")
    found = await asyncio.to_thread(as_nobody, lambda: prowl([console, api], home))
    for secret in (status["token"], token, "sesame", home, status["node_id"]):
        assert secret not in found
    let_through = [line for line in found.splitlines() if line.startswith("2")]
    page = [] if headless else [f"200 {console}/ <!doctype html>"]
    assert [line[: len(known)] for line, known in zip(let_through, page, strict=True)] == page
    assert (await node.console.get("/api/invites")).expect().json() == before
    assert (await node.status())["ready"]


async def test_no_command_line_of_a_node_holds_a_secret(start_node: StartNode, tmp_path: Path) -> None:
    host = await start_node("a", models=["tiny"])
    invites = tmp_path / "invites"
    invites.write_text(await host.invite())
    node = await start_node(
        "b", models=["tiny"], arguments=["--join-file", str(invites)], env={"MESH_LLM_API_KEY": "sesame"}
    )
    secrets = [invites.read_text(), "sesame", *(read(node, name) for name in ("control-token", "key"))]
    process = psutil.Process(node.process.pid)
    assert await host.status()
    for each in (process, *process.children(recursive=True)):
        words = " ".join(words_of(each))
        assert not [secret for secret in secrets if secret in words]
    # An engine that was taken over can read neither an API key nor an invite there.
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            assert not {"MESH_LLM_API_KEY", "MESH_LLM_JOIN"} & child.environ().keys()


def read(node: NodeProcess, name: str) -> str:
    return (node.options.home / name).read_text().strip()


async def test_a_stale_daemon_json_leads_to_no_other_homes_node(start_node: StartNode) -> None:
    """The home's node died, and another home's node uses its ports: `status` showed that one, with its invite."""
    dead = await start_node("a", models=["tiny"])
    stale = (dead.options.home / "daemon.json").read_bytes()
    await dead.kill()
    other = await start_node("b", models=["tiny"], arguments=["--name", "stranger"])
    invite = await other.invite()
    record = {**json.loads(stale), "pid": other.process.pid, "console_port": other.console.port}
    (dead.options.home / "daemon.json").write_text(json.dumps(record))
    for words in (["status"], ["stop"], ["invite", "create"], ["console", "--no-browser"], ["chat", "tiny"]):
        code, text = await dead.cli(*words)
        assert (code, "No node is running" in text) == (3, True), text
        assert "stranger" not in text
        assert invite not in text
    code, text = await dead.cli("doctor")
    assert "a node runs here" not in text
    assert (await other.status())["ready"]


async def test_a_sign_in_link_works_once(start_node: StartNode) -> None:
    node = await start_node("a", models=["tiny"])
    code, text = await node.cli("console", "--json")
    assert code == 0, text
    link = json.loads(text)
    (url,) = link["urls"]
    assert url == f"http://127.0.0.1:{node.console.port}/#sign-in={link['code']}"
    browser = HttpClient(node.console.port)
    # Loading the page, as link previews do, does not use up the link.
    (await browser.get("/")).expect()
    (await browser.get("/")).expect()
    signed_in = (await browser.post("/api/session", {"code": link["code"]})).expect(201)
    (await browser.post("/api/session", {"code": link["code"]})).expect(401)
    headers = {"cookie": signed_in.headers["set-cookie"].split(";")[0], "x-mesh-llm-session": signed_in.json()["key"]}
    user = HttpClient(node.console.port, headers=headers)
    assert (await user.get("/api/status")).expect().json()["ready"]
    code, text = await node.cli("console", "--sign-out")
    assert (code, text) == (0, "Ended 1 session.\n")
    (await user.get("/api/status")).expect(401)
    code, text = await node.cli("console", "--no-browser")
    assert (code, f"http://127.0.0.1:{node.console.port}/#sign-in=" in text) == (0, True)
    # The start printed into a pipe: an address, but no code that a log would keep.
    assert "#sign-in=" not in node.process.text
    assert "sign in: mesh-llm console" in node.process.text


async def test_the_browser_gets_the_link_in_a_file_and_not_on_its_command_line(
    start_node: StartNode, tmp_path: Path
) -> None:
    record = tmp_path / "argv"
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$@" > {record}.new && mv {record}.new {record}\n')
    browser.chmod(0o755)
    node = await start_node("a", models=["tiny"], env={"DISPLAY": ":99", "BROWSER": f"{browser} %s"})
    code, text = await node.cli("console")
    assert (code, "Opening the console in your browser" in text) == (0, True), text
    link = next(word for word in text.split() if "#sign-in=" in word)
    way_in = node.options.home / "run" / "console.html"
    assert record.read_text() == f"{way_in.as_uri()}\n"
    assert way_in.stat().st_mode & 0o777 == 0o600
    assert link in way_in.read_text()
    # At the other end of ssh a browser would open on the wrong screen.
    record.unlink()
    remote = NodeProcess(replace(node.options, env={**node.options.env, "SSH_CONNECTION": "x"}), node.process)
    code, text = await remote.cli("console")
    assert (code, text.startswith("Open:"), record.exists()) == (0, True, False), text
    await node.stop()
    assert not way_in.exists()
