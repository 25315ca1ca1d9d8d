"""Code that took over an RPC server can reach nothing, and nobody else can reach the server."""

import asyncio
import contextlib
import itertools
import json
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.integration.engine_fixtures import CACHE, embedded, rpc_embedded, supervisor

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.confinement import launcher, policy
from mesh_llm.engine.confinement.policy import RpcPolicy
from mesh_llm.engine.probe import started_rpc_server
from mesh_llm.engine.process import Command, child_environment
from mesh_llm.engine.sources.embedded import plugin
from mesh_llm.engine.sources.embedded.plugin import RPC_VERSION
from mesh_llm.engine.sources.embedded.source import EmbeddedSource
from mesh_llm.engine.spec import RpcWorkerSpec
from mesh_llm.engine.supervisor import Exit, Supervisor
from mesh_llm.runtime.local_socket import PrivateDirectory
from mesh_llm.runtime.network import connect_to, is_other_users
from mesh_llm.split.worker.rpc_client import RpcClient

__all__ = ["embedded", "rpc_embedded", "supervisor"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="seccomp and Landlock are Linux's")

STAND_IN = Path(__file__).parents[1] / "support" / "taken_over.py"
SECRETS = {"HF_TOKEN": "a", "MESH_LLM_API_KEY": "b", "AWS_SECRET_ACCESS_KEY": "c", "EDITOR": "d", "OPENAI_API_KEY": "e"}
LANDLOCK = launcher.landlock_version() > 0


def allowed(kind: str) -> list[int]:
    """The numbers of the allowed calls, and of those with checked arguments."""
    at = 0 if platform.machine() == "x86_64" else 1
    more = {} if kind == "cpu" else launcher.GPU_CALLS
    pairs = (launcher.CPU_CALLS | launcher.CHECKED_CALLS | more).values()
    return [number for pair in pairs if (number := pair[at]) is not None]


@pytest.fixture
def private() -> Any:
    directory = PrivateDirectory()
    yield directory.path
    directory.close()


def taken_over(
    kind: str, private: Path, secret: Path, monkeypatch: pytest.MonkeyPatch, *options: str
) -> dict[str, Any]:
    """What the stand-in could do; `options`: further options of the launcher."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    secret.write_text("the node's key")
    with secret.open() as open_file, socket.create_server(("127.0.0.1", 0)) as listener:
        os.set_inheritable(open_file.fileno(), True)
        port = listener.getsockname()[1]
        spec = RpcWorkerSpec(socket=private / "rpc.sock", port=1)
        words = (str(STAND_IN), "1", str(secret), str(os.getpid()), str(port), json.dumps(allowed(kind)))
        readable = policy.python_directories(STAND_IN.parent)
        starting = RpcPolicy(cache=CACHE).command((sys.executable, *words), {}, spec, kind, readable)
        command = asyncio.run(starting)
        at = command.argv.index("--")
        with subprocess.Popen(
            (*command.argv[:at], *options, *command.argv[at:]),
            env=child_environment(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as child:
            try:
                with connected(str(spec.socket), child) as client:
                    client.sendall(b"x")
                    out, _ = child.communicate(timeout=30)
            finally:
                child.kill()
    return json.loads(out)


def connected(path: str, child: subprocess.Popen[bytes]) -> socket.socket:
    """A connection, once it listens."""
    while True:
        client = socket.socket(socket.AF_UNIX)
        try:
            client.connect(path)
        except OSError:
            client.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(0.02)
            assert child.returncode is None, "it has ended"
        else:
            return client


def test_a_taken_over_cpu_rpc_server_reaches_nothing(
    private: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "key"
    tried = taken_over("cpu", private, secret, monkeypatch)
    refused = dict.fromkeys(tried["serving"], "EPERM") | {"a process by clone3": "ENOSYS"}
    assert tried["serving"] == refused
    # Threads that existed before are confined too.
    assert tried["before"] == refused
    assert tried["rest"] == {}
    assert secret.read_text() == "the node's key"


@pytest.mark.skipif(not LANDLOCK, reason="this kernel has no Landlock")
@pytest.mark.parametrize("kind", ["gpu", "software"])
def test_a_taken_over_gpu_rpc_server_reads_programs_and_nothing_else(
    private: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    tried = taken_over(kind, private, tmp_path / "key", monkeypatch)
    by_landlock = ("read the node's key", "write to it", "make a file", "its own memory as a file")
    refused = dict.fromkeys(tried["serving"], "EPERM") | dict.fromkeys(by_landlock, "EACCES")
    refused |= {"a process by clone3": "ENOSYS", "its parent's environment": "EACCES"}
    if kind == "software":
        # Its driver compiles into memory.
        code = ("executable memory", "writable and executable memory", "memory made executable")
        refused |= dict.fromkeys(code, "done")
    assert tried["serving"] == refused
    assert tried["before"] == refused
    assert tried["rest"] == {}


@pytest.mark.skipif(not LANDLOCK, reason="this kernel has no Landlock")
@pytest.mark.parametrize(("kept", "outcome"), [("home", "EACCES"), ("other", "done")])
def test_a_home_inside_a_readable_directory_is_not_readable(
    private: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str, outcome: str
) -> None:
    # Like a service's home in /opt, which the rules for GPUs make readable.
    secret = tmp_path / "home" / "key"
    secret.parent.mkdir()
    (tmp_path / "link").symlink_to(secret.parent)
    options = ("--read", str(tmp_path), "--keep", str(tmp_path / kept))
    tried = taken_over("gpu", private, secret, monkeypatch, *options)
    assert tried["serving"]["read the node's key"] == outcome
    assert tried["serving"]["write to it"] == "EACCES"


def test_everything_beside_a_private_directory_is_readable(tmp_path: Path) -> None:
    for name in ("a/lib", "a/service/home/mesh", "a/service/lib", "b"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "a" / "link").symlink_to(tmp_path / "a" / "service" / "home")
    kept = [str(tmp_path / "a" / "service" / "home"), "/home/of/the/user"]
    assert sorted(launcher.around(str(tmp_path / "a"), kept)) == [
        str(tmp_path / "a" / "lib"), str(tmp_path / "a" / "service" / "lib")
    ]  # fmt: skip
    assert launcher.around(str(tmp_path / "b"), kept) == [str(tmp_path / "b")]
    assert launcher.around(str(tmp_path / "nothing"), [str(tmp_path / "nothing" / "home")]) == []


def test_it_has_no_secret_in_its_environment_and_no_open_file(
    private: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    around = taken_over("cpu", private, tmp_path / "key", monkeypatch)["surroundings"]
    assert SECRETS.keys().isdisjoint(around["environment"])
    assert set(around["files"]) <= {"/dev/null", "pipe", "socket", "anon_inode"}
    assert around["no_new_privs"] == 1
    assert around["core"] == 0
    assert around["open_files"] <= 256


async def test_all_threads_of_the_real_server_are_confined_and_no_memory_is_writable_and_executable(
    supervisor: Supervisor, rpc_embedded: EmbeddedSource
) -> None:
    worker = await supervisor.launch_rpc_worker(rpc_embedded, RpcWorkerSpec(threads=4), "w")
    assert worker.info is not None
    threads, maps = await asyncio.to_thread(seen_of, worker.pid)
    assert threads
    assert all("Seccomp:\t2" in status and "NoNewPrivs:\t1" in status for status in threads)
    assert not [line for line in maps if "rwx" in line.split()[1]]
    # If memory runs out, the kernel kills it first.
    assert await asyncio.to_thread(Path(f"/proc/{worker.pid}/oom_score_adj").read_text) == "1000\n"
    assert (await rpc_embedded.info()).confinement.startswith("seccomp")


@pytest.mark.skipif(not LANDLOCK, reason="this kernel has no Landlock")
async def test_the_real_server_works_under_the_rules_for_gpus(rpc_embedded: EmbeddedSource) -> None:
    built = plugin.find(CACHE)
    assert built is not None

    async def worker(spec: RpcWorkerSpec) -> Command:
        return await plugin.worker_command(built.path, spec, RpcPolicy(cache=CACHE), launcher.GPU)

    async with started_rpc_server(worker, RpcWorkerSpec(threads=2)) as answered:
        client = await RpcClient.connect(answered.address)
        await client.hello()
        (device,) = await client.devices()
        client.abort()
    assert answered.version == RPC_VERSION
    assert device.total > 0


def seen_of(pid: int) -> tuple[list[str], list[str]]:
    """The status of each of its threads, and its memory mappings."""
    threads = [(task / "status").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    return threads, Path(f"/proc/{pid}/maps").read_text().splitlines()


def as_nobody(check: str, *arguments: str) -> str:
    """The output of a program that runs as another user of this machine."""
    script = f"import os, socket, sys\nos.setgid(65534); os.setuid(65534)\n{check}"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script, *arguments], capture_output=True, text=True, timeout=30, check=False
    )
    if "Operation not permitted" in done.stderr and "os.setuid" in done.stderr:
        pytest.skip("this test needs the right to become another user")
    return done.stdout.strip() or done.stderr


REACH = """
client = socket.socket(socket.AF_UNIX)
client.settimeout(5)
try:
    client.connect(sys.argv[1])
    print("connected")
except OSError as error:
    print(type(error).__name__)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="this test becomes another user")
async def test_another_user_cannot_reach_an_rpc_server_even_after_the_host_has_gone(
    supervisor: Supervisor, rpc_embedded: EmbeddedSource
) -> None:
    worker = await supervisor.launch_rpc_worker(rpc_embedded, RpcWorkerSpec(threads=1), "w")
    assert worker.socket is not None
    stream = await connect_to(f"unix:{worker.socket}", 5)
    stream.abort()
    assert await asyncio.to_thread(as_nobody, REACH, str(worker.socket)) == "PermissionError"
    assert "LISTEN" not in await asyncio.to_thread(listening_ports, worker.pid)


SEND = """
client = socket.socket()
client.connect(("127.0.0.1", int(sys.argv[1])))
client.sendall(b"x")
client.close() if sys.argv[2] == "closed" else client.recv(1)
print("sent")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="this test becomes another user")
@pytest.mark.parametrize("state", ["open", "closed"])
async def test_connections_of_another_user_to_a_tunnels_port_are_detected(state: str) -> None:
    seen: asyncio.Queue[bool] = asyncio.Queue()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # After it was closed, its user cannot be found out.
        await reader.read() if state == "closed" else await reader.read(1)
        seen.put_nowait(is_other_users(writer.get_extra_info("peername")))
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    assert await asyncio.to_thread(as_nobody, SEND, str(port), state) == "sent"
    assert await asyncio.wait_for(seen.get(), 10)
    server.close()
    await server.wait_closed()


def listening_ports(pid: int) -> list[str]:
    return [one.status for one in psutil.Process(pid).net_connections("inet")]


async def test_the_rules_for_gpus_never_open_the_users_home(private: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    rules = RpcPolicy(cache=home / "cache")
    spec = RpcWorkerSpec(socket=private / "rpc.sock", port=1)
    readable = ("/", str(Path.home()), str(tmp_path), "relative", "/usr/lib")
    await asyncio.to_thread(policy.provide_library, rules.cache)
    command = await rules.command(("/bin/true",), {}, spec, "gpu", readable)
    opened = [value for name, value in itertools.pairwise(command.argv) if name == "--read"]
    assert "/usr/lib" in opened
    assert not {"/", str(Path.home()), str(tmp_path), "relative"} & set(opened)


async def test_a_server_that_cannot_be_confined_is_not_started(
    private: Path, rpc_embedded: EmbeddedSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "has_seccomp", lambda: False)
    spec = RpcWorkerSpec(socket=private / "rpc.sock")
    with pytest.raises(MeshError) as caught:
        await rpc_embedded.rpc_worker(spec)
    assert caught.value.code == policy.UNCONFINED
    assert "--lend-unconfined" in caught.value.hint
    info = await rpc_embedded.info()
    assert info.rpc_version == ""
    assert info.not_lent in info.problems
    told_to = EmbeddedSource.find(CACHE, unconfined=True)
    assert told_to is not None
    info = await told_to.info()
    assert info.rpc_version
    assert info.confinement == policy.NOT_CONFINED
    # Its socket is still private.
    assert (await told_to.rpc_worker(spec)).address == f"unix:{spec.socket}"


def nothing(_: Path) -> None:
    """It was not compiled."""


async def test_without_a_compiler_no_server_is_started(
    private: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "find_library", nothing)
    monkeypatch.setenv("CXX", "/no/such/compiler")
    spec = RpcWorkerSpec(socket=private / "rpc.sock", port=4711)
    with pytest.raises(MeshError) as caught:
        await RpcPolicy(cache=tmp_path).command(("/bin/true",), {}, spec, "cpu", ())
    assert caught.value.code == policy.UNCONFINED
    assert "no C++ compiler" in caught.value.message
    command = await RpcPolicy(cache=tmp_path, unconfined=True).command(("/bin/true",), {}, spec, "cpu", ())
    assert command.address == "127.0.0.1:4711"


async def test_a_server_that_loads_no_library_is_not_used(supervisor: Supervisor, tmp_path: Path) -> None:
    """Like a statically linked program: it would answer without any confinement."""
    script = tmp_path / "server.py"
    script.write_text(_ANSWERS)
    place = tmp_path / "s.sock"
    command = Command(
        argv=(sys.executable, str(script), str(place)),
        readiness=(await _command_of(tmp_path)).readiness,
        address=f"unix:{place}",
        confined=True,
    )
    engine = await supervisor.launch(command, "static")
    async with asyncio.timeout(20):
        outcome = await engine.ready()
    assert isinstance(outcome, Exit)
    assert "is not confined" in outcome.reason


async def _command_of(cache: Path) -> Command:
    spec = RpcWorkerSpec(socket=cache / "x.sock")
    return await RpcPolicy(cache=CACHE).command(("/bin/true",), {}, spec, "cpu", ())


_ANSWERS = """
import socket, struct, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen(1)
while True:
    client, _ = listener.accept()
    client.recv(33)
    client.sendall(struct.pack("<Q", 28) + bytes((8, 0, 0, 0)) + bytes(24))
    client.close()
"""
