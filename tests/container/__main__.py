"""Execute container/Containerfile in a Debian of its own, then run the node as the image says.

    python -m tests.container [--packages "g++ glslc"] [--keep DIR]

debootstrap makes the base, so `FROM` must be Debian. Each RUN is executed by chroot, with the network of this machine:
it installs packages. The node then runs in a network namespace without a route, on a read-only root, without
capabilities, as the image's user. Needs root; takes minutes, and 3 GB of disk.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.support.containerfile import Stage, only, read

_ROOT = Path(__file__).resolve().parents[2]
_FILE = _ROOT / "container" / "Containerfile"
_SECONDS = 180.0

_ASK = """
import json, urllib.request
body = {"model": "tiny", "max_tokens": 8, "messages": [{"role": "user", "content": "Hello"}]}
request = urllib.request.Request("http://127.0.0.1:9337/v1/chat/completions", json.dumps(body).encode(),
                                 {"content-type": "application/json"})
print(json.load(urllib.request.urlopen(request, timeout=60))["choices"][0]["message"]["content"])
"""


def main() -> int:
    """Build, run, ask, stop; return the exit status."""
    parser = argparse.ArgumentParser(description="Execute the Containerfile in a Debian of its own.")
    parser.add_argument("--packages", default="", help="the build argument PACKAGES")
    parser.add_argument("--keep", type=Path, help="keep the root of the image here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mesh-llm-container-") as work:
        directory = options.keep or Path(work)
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o755)
        built: dict[str, Path] = {}
        stages = read(_FILE, PACKAGES=options.packages)
        for number, stage in enumerate(stages):
            root = directory / (stage.name or "image")
            _say(f"stage {number + 1}: {root.name}")
            _base(stage.base, directory, root)
            _execute(stage, root, built)
            built[stage.name] = root
        _say("the node, as the image starts it")
        _run(stages[-1], directory / "image")
    _say("done")
    return 0


def _say(text: str) -> None:
    print(f"container: {text}", flush=True)


def _base(name: str, directory: Path, root: Path) -> None:
    """Make the file system of `debian:SUITE-slim`; the second time it is a copy of the first."""
    system, _, tag = name.partition(":")
    if system != "debian":
        raise SystemExit(f"{name} is not Debian: nothing here makes it")
    base = directory / "base"
    if not base.is_dir():
        suite = tag.removesuffix("-slim")
        subprocess.run(["debootstrap", "--variant=minbase", suite, str(base)], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cp", "--archive", "--reflink=auto", str(base), str(root)], check=True)


def _execute(stage: Stage, root: Path, built: dict[str, Path]) -> None:
    environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
    place = "/"
    for one in stage.instructions:
        if one.name == "RUN":
            _say(f"RUN {one.text[:100]}")
            _inside(
                root,
                ["/bin/sh", "-c", f"cd {place} && {one.text}"],
                environment | {"DEBIAN_FRONTEND": "noninteractive"},
            )
        elif one.name == "COPY":
            *sources, target = one.words
            _copy(sources, _below(root, place, target), built[one.flags["from"]] if "from" in one.flags else _ROOT)
        elif one.name == "ENV":
            name, _, value = one.text.partition("=")
            environment[name] = value
        elif one.name == "WORKDIR":
            place = one.text
            _below(root, "/", place).mkdir(parents=True, exist_ok=True)


def _below(root: Path, place: str, path: str) -> Path:
    return root / os.path.join(place, path).lstrip("/")  # noqa: PTH118 - joined as the container sees it


def _copy(sources: list[str], target: Path, context: Path) -> None:
    """As COPY does: the content of directories; without what .dockerignore names."""
    ignored = (
        [] if context != _ROOT else [line.removeprefix("**/") for line in (_ROOT / ".dockerignore").read_text().split()]
    )
    for source in sources:
        here = context / source.lstrip("/")
        target.mkdir(parents=True, exist_ok=True)
        exclude = [f"--exclude={pattern if '/' not in pattern else './' + pattern}" for pattern in ignored]
        pack = subprocess.Popen(["tar", "-C", str(here), *exclude, "-cf", "-", "."], stdout=subprocess.PIPE)
        subprocess.run(["tar", "-C", str(target), "-xf", "-"], stdin=pack.stdout, check=True)
        assert pack.stdout is not None
        pack.stdout.close()
        if pack.wait() != 0:
            raise SystemExit(f"{here} could not be copied")


def _inside(root: Path, argv: list[str], environment: dict[str, str]) -> None:
    """Run a command with `root` as its root, /proc and /dev there, and the network of this machine."""
    shutil.copy("/etc/resolv.conf", root / "etc" / "resolv.conf")
    script = 'mount -t proc proc "$0/proc"; mount --rbind /dev "$0/dev"; '
    if (root / _CERTIFICATES).exists():
        # This machine's network may have an authority of its own, which the machine trusts.
        script += f'mount --bind /{_CERTIFICATES} "$0/{_CERTIFICATES}"; mount -o remount,bind,ro "$0/{_CERTIFICATES}"; '
    script += 'exec chroot "$0" "$@"'
    words = [f"{name}={value}" for name, value in environment.items()]
    # What this machine needs to reach a registry, such as a proxy, is needed there too.
    kept = [
        f"{name}={value}" for name, value in os.environ.items() if name.lower().endswith("_proxy") or name in _INDEXES
    ]
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, str(root), "env", "-i"]
    subprocess.run([*command, *words, *kept, *argv], check=True)


_CERTIFICATES = "etc/ssl/certs/ca-certificates.crt"
_INDEXES = (
    "PIP_INDEX_URL",
    "UV_INDEX_URL",
    "UV_DEFAULT_INDEX",
    "PIP_CERT",
    "SSL_CERT_FILE",
    "NODE_EXTRA_CA_CERTS",
    "NPM_CONFIG_REGISTRY",
)


def _run(stage: Stage, root: Path) -> None:
    """Start the node on a read-only root, wait until it is healthy, ask it, and stop it."""
    variables = [one.text for one in only(stage, "ENV")]
    (volume,) = (one.text for one in only(stage, "VOLUME"))
    entry, check = (
        only(stage, "ENTRYPOINT")[0].words,
        json.loads(only(stage, "HEALTHCHECK")[0].text.removeprefix("CMD ")),
    )
    command = [*entry, *only(stage, "CMD")[0].words, "--model", "tiny", "--gpu", "none"]
    uid = next(line.split(":")[2] for line in (root / "etc/passwd").read_text().splitlines() if line[:8] == "mesh-llm")
    script = f"""
set -e
mount --bind {root} {root}
mount -o remount,bind,ro {root}
mount -t proc proc {root}/proc
mount --rbind /dev {root}/dev
mount -t tmpfs -o mode=1777 tmpfs {root}/tmp
mount -t tmpfs -o mode=700,uid={uid},gid={uid} tmpfs {root}{volume}
exec setpriv --reuid={uid} --regid={uid} --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all \\
  env -i {" ".join(variables)} "$@"
"""
    user = f"chroot --userspec={uid}:{uid} {root}"
    # chroot needs a capability that the node must not have: it is entered first.
    script = script.replace("exec setpriv", f"exec chroot {root} setpriv")
    namespaces = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "node"]
    isolated = [sys.executable, str(_ROOT / "tools" / "isolate.py"), "--", *namespaces, *command]
    node = subprocess.Popen(isolated, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert node.stdout is not None
        deadline = time.monotonic() + _SECONDS
        for line in node.stdout:
            print(f"  {line.rstrip()}", flush=True)
            if line.strip() == "ready" or time.monotonic() > deadline:
                break
        pid = _child(node.pid)
        inside = [
            "nsenter",
            "-t",
            str(pid),
            "--mount",
            "--net",
            "sh",
            "-c",
            f'exec {user} env -i {" ".join(variables)} "$@"',
            "x",
        ]
        subprocess.run([*inside, *check], check=True)
        subprocess.run([*inside, "/opt/mesh-llm/bin/python", "-c", _ASK], check=True)
        refused = subprocess.run([*inside, "sh", "-c", f"touch /usr/x; touch {volume}/written"], check=False)
        if refused.returncode != 0 or (root / "usr/x").exists():
            raise SystemExit("the volume cannot be written, or the root can")
    finally:
        node.send_signal(signal.SIGTERM)
        node.wait(60)
    if node.returncode != 0:
        raise SystemExit(f"the node ended with {node.returncode}")


def _child(pid: int) -> int:
    """The process that `isolate.py` runs, which unshare and the shell have become."""
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


if __name__ == "__main__":
    sys.exit(main())
