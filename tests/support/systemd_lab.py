"""A systemd of its own for a test: the real program as the first process of new namespaces, on a root of its own.

    with SystemdLab(tmp_path) as lab:
        lab.run("systemctl", "start", "mesh-llm")

It sees /usr, this checkout and its Python as they are, read-only; /etc is a copy, and /var is empty. The network is the
test's own, so the test reaches what the services listen on. Needs root, systemd, and a control group to write to.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

_ROOT = Path(__file__).resolve().parents[2]
_INIT = Path("/usr/lib/systemd/systemd")
_CGROUPS = Path("/sys/fs/cgroup")
_TEMPORARY = ("/tmp", "/var/tmp")
_SECONDS = 30.0
_PAUSE = 0.2

_SCRIPT = r"""
set -e
root=$1; shift
mount -t tmpfs -o mode=755 tmpfs "$root"
mkdir -p "$root"/{usr,etc,var/lib,var/log,run,tmp,dev/shm,dev/pts,proc,sys,root,home}
for name in bin sbin lib lib64; do ln -s "usr/$name" "$root/$name"; done
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
for place in /usr "$@"; do
  mkdir -p "$root$place"
  mount --rbind "$place" "$root$place"
  mount -o remount,bind,ro "$root$place"
done
cp -a /etc/. "$root/etc/"
rm -rf "$root"/etc/systemd/system/* "$root"/etc/systemd/user/*
for name in null zero random urandom full tty; do
  touch "$root/dev/$name"; mount --bind "/dev/$name" "$root/dev/$name"
done
ln -s /proc/self/fd "$root/dev/fd"
touch "$root/dev/console"
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
printf '[Unit]\nWants=systemd-journald.socket systemd-journald.service\n' >"$root/etc/systemd/system/lab.target"
echo 0123456789abcdef0123456789abcdef >"$root/etc/machine-id"
exec env -i container=lab PATH=/usr/sbin:/usr/bin LC_ALL=C.UTF-8 \
  chroot "$root" /lib/systemd/systemd --system --unit=lab.target --log-target=console
"""


def why_not() -> str:
    """Why there can be no lab here; empty if there can."""
    if sys.platform != "linux" or not _INIT.exists():
        return "there is no systemd here"
    if os.geteuid() != 0:
        return "a systemd of its own needs root"
    if any(_ROOT.is_relative_to(place) for place in _TEMPORARY):
        return "a service of the machine does not see a checkout among temporary files"
    return "" if _hierarchies() else "there is no control group to write to"


def _hierarchies() -> list[Path]:
    """Where systemd keeps its groups: version 2 alone, or beside version 1."""
    named = [path for path in (_CGROUPS / "systemd", _CGROUPS / "unified") if path.is_dir()]
    return [path for path in named or [_CGROUPS] if os.access(path / "cgroup.procs", os.W_OK)]


class SystemdLab:
    """One running systemd. Use it with `with`."""

    def __init__(self, directory: Path) -> None:
        """`directory`: an empty one; the root of the lab is mounted there, in a namespace of its own."""
        self.root = directory
        self._log = directory.with_suffix(".log")
        self._groups = [path / f"lab-{os.getpid()}-{directory.name}" for path in _hierarchies()]
        self._process: subprocess.Popen[bytes] | None = None
        self._init = 0

    def __enter__(self) -> Self:
        places = {_ROOT, *(Path(place).resolve() for place in (sys.base_prefix, sys.prefix))}
        shown = [str(place) for place in places if not place.is_relative_to("/usr") and not _inside(place, places)]
        for group in self._groups:
            group.mkdir()
        enter = "".join(f"echo $$ > {group}/cgroup.procs; " for group in self._groups)
        command = f'{enter}exec unshare -m -p -u -i -C -f --kill-child --propagation private bash -c "$0" lab "$@"'
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["bash", "-c", command, _SCRIPT, str(self.root), *shown], stdout=subprocess.DEVNULL, stderr=log
            )
        try:
            self._wait_for_start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, *argv: str, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a program in the lab, as root."""
        environment = [f"{name}={value}" for name, value in variables.items()]
        command = ["nsenter", "-t", str(self._init), "-m", "-p", "-C", "chroot", str(self.root), "env", "-i"]
        words = ["PATH=/usr/sbin:/usr/bin", "LC_ALL=C.UTF-8", "HOME=/root", *environment, *argv]
        done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        return done

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", unit, f"--property={name}", "--value").stdout.strip()

    def until(self, unit: str, name: str, wanted: str, seconds: float = _SECONDS) -> None:
        """Wait until a property of a unit has `wanted` in it. systemd has no way to wait for it but D-Bus."""
        deadline = time.monotonic() + seconds
        while wanted not in (found := self.show(unit, name)):
            assert time.monotonic() < deadline, f"{unit}: {name} is {found}, not {wanted}\n{self.journal(unit)}"
            with contextlib.suppress(subprocess.TimeoutExpired):
                assert self._process is not None
                raise AssertionError(f"systemd has ended: {self._process.wait(_PAUSE)}")

    def journal(self, unit: str) -> str:
        """What a unit printed, with the priority of each line."""
        fields = "--output-fields=PRIORITY,MESSAGE"
        return self.run("journalctl", "-u", unit, "-o", "export", fields, "--no-pager", check=False).stdout

    def pid(self, unit: str) -> int:
        """A unit's main process, as this test sees it."""
        inside = self.show(unit, "MainPID")
        for path in Path("/proc").glob("[0-9]*/status"):
            try:
                numbers = [line.split() for line in path.read_text().splitlines() if line.startswith("NSpid:")]
            except OSError:
                continue
            if numbers and numbers[0][-1] == inside and len(numbers[0]) > 2 and self._is_below(int(path.parent.name)):
                return int(path.parent.name)
        raise AssertionError(f"{unit} has no process {inside}")

    def close(self) -> None:
        """End it with all that it started. Idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        # The end of the first process ends all others of its namespace.
        with contextlib.suppress(ProcessLookupError):
            if self._init:
                os.kill(self._init, signal.SIGKILL)
        process.kill()
        process.wait()
        for group in self._groups:
            _remove(group)

    def _is_below(self, pid: int) -> bool:
        return Path(f"/proc/{pid}/ns/pid").readlink() == Path(f"/proc/{self._init}/ns/pid").readlink()

    def _wait_for_start(self) -> None:
        deadline = time.monotonic() + _SECONDS
        assert self._process is not None
        while True:
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, "systemd has not started"
            children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
            if not children:
                continue
            self._init = int(children[0])
            try:
                started = Path(f"/proc/{self._init}/comm").read_text().strip() == "systemd"
            except OSError:
                continue
            if started and self.run("systemctl", "is-active", "lab.target", check=False).returncode == 0:
                return


def _inside(place: Path, others: set[Path]) -> bool:
    return any(other != place and place.is_relative_to(other) for other in others)


def _remove(group: Path) -> None:
    """Remove a control group with those in it, once their processes have ended."""
    deadline = time.monotonic() + _SECONDS
    for directory, _, _ in os.walk(group, topdown=False):
        while True:
            try:
                Path(directory).rmdir()
                break
            except OSError:
                if time.monotonic() > deadline:
                    return
