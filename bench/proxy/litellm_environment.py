"""litellm's proxy in a virtual environment of its own, of a fixed version, kept in the user's cache."""

import os
import subprocess
import sys
from pathlib import Path

VERSION = "1.106.2"


def litellm_program() -> Path:
    """The path of its program; installed at the first call, which takes minutes and about 600 MB of disk."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = cache / "mesh-llm-bench" / f"litellm-{VERSION}"
    program = home / "bin" / "litellm"
    done = home / "complete"
    if not done.exists():
        print(f"Installing litellm {VERSION} into {home} ...", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
        install = [
            str(home / "bin" / "python"),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--quiet",
            "--disable-pip-version-check",
        ]
        subprocess.run([*install, f"litellm[proxy]=={VERSION}"], check=True)
        done.touch()
    return program
