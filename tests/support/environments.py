"""Python environments beside that of the tests: they have its packages, and a mesh-llm of their own."""

import importlib.metadata
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

from packaging.requirements import Requirement

_ROOT = Path(__file__).resolve().parents[2]


def new_environment(directory: Path) -> Path:
    """Make an environment that has the packages of this one, but no mesh-llm; returns its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(directory)], check=True)
    python = directory / "bin" / "python"
    # The editable mesh-llm of this environment is a .pth file, which does not count for a directory named by another.
    (_packages(directory) / "packages.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return python


def install_wheel(python: Path, wheel: Path) -> None:
    """Install a wheel alone, without asking any registry."""
    uv = Path(sys.executable).with_name("uv")
    command = [str(uv), "pip", "install", "--quiet", "--offline", "--no-deps", "--python", str(python), str(wheel)]
    subprocess.run(command, check=True)


def make_wheels(directory: Path) -> None:
    """Pack what mesh-llm requires, as it is installed here, into wheels again: installers then need no registry."""
    directory.mkdir()
    wanted, seen = ["mesh-llm"], set[str]()
    while wanted:
        name = wanted.pop()
        if name in seen:
            continue
        seen.add(name)
        found = importlib.metadata.distribution(name)
        wanted += [one.name for one in map(Requirement, found.requires or ()) if one.marker is None or _applies(one)]
        if name != "mesh-llm":
            _pack(found, directory)


def _applies(requirement: Requirement) -> bool:
    return requirement.marker is not None and requirement.marker.evaluate({"extra": ""})


def _pack(found: importlib.metadata.Distribution, directory: Path) -> None:
    """Write one installed distribution as a wheel: its own files, without what the installer added."""
    files = [file for file in found.files or () if ".." not in file.parts and file.suffix != ".pyc"]
    added = {"INSTALLER", "REQUESTED", "direct_url.json", "RECORD", "uv_cache.json"}
    files = [file for file in files if not (file.parts[0].endswith(".dist-info") and file.name in added)]
    tag = next(line[5:].strip() for line in (found.read_text("WHEEL") or "").splitlines() if line.startswith("Tag: "))
    name = found.metadata["Name"].replace("-", "_").replace(".", "_")
    information = next(file.parts[0] for file in files if file.parts[0].endswith(".dist-info"))
    with zipfile.ZipFile(directory / f"{name}-{found.version}-{tag}.whl", "w") as wheel:
        for file in files:
            wheel.write(str(found.locate_file(file)), str(file))
        record = "".join(f"{file},,\n" for file in [*files, f"{information}/RECORD"])
        wheel.writestr(f"{information}/RECORD", record)


def use_checkout(python: Path) -> None:
    """Let an environment import mesh-llm from this checkout."""
    (_packages(python.parents[1]) / "checkout.pth").write_text(f"{_ROOT / 'src'}\n")


def build_wheel(directory: Path, **variables: str) -> Path:
    """Build the wheel of this checkout as `hatch build` does, with more environment variables; returns its path."""
    hatchling = Path(sys.executable).with_name("hatchling")
    command = [str(hatchling), "build", "-t", "wheel", "-d", str(directory)]
    done = subprocess.run(command, cwd=_ROOT, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = directory.glob("*.whl")
    return wheel


def _packages(directory: Path) -> Path:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return directory / "lib" / version / "site-packages"
