"""Python environments beside that of the tests: they have its packages, and a mesh-llm of their own."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

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
