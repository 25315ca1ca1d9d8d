"""Builds the pinned engine's rpc-server with sanitizers: `python -m tools.build_sanitized DIR`; three CPU-minutes.

ggml's processor backend and RPC server with AddressSanitizer and UndefinedBehaviorSanitizer, for tests/oracle: as
`DIR/wheel/runner` with the kernels that the wheel has (AVX2 and no more), as `DIR/generic/runner` with those in plain
C, and as `DIR/wheel/rpc-server`, the whole program. Built again only where the source or tools/sanitized changed.
Where it cannot be built (another system or processor than Linux on x86-64), it says so and ends well: its tests are
passed over there.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from tools.engine_source import archive

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.sources.embedded.archive import VERSION, extract

_HERE = Path(__file__).parent / "sanitized"
_NICE = 10
_NEEDED = ("/ggml/", "/tools/rpc/")

_WHEEL: dict[str, str] = {}
_OFF = ("GGML_SSE42", "GGML_AVX", "GGML_AVX2", "GGML_BMI2", "GGML_FMA", "GGML_F16C")
_GENERIC: dict[str, str] = dict.fromkeys(_OFF, "OFF")
_VARIANTS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "wheel": (_WHEEL, ("runner", "rpc-server")),
    "generic": (_GENERIC, ("runner",)),
}


def source(work: Path) -> Path:
    """Ggml of the pinned release, unpacked once."""
    unpacked = work / f"source-{VERSION}"
    if not unpacked.exists():
        work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".source-", dir=work) as name:
            with tarfile.open(archive()) as tar:
                members = [member for member in tar if any(part in member.name for part in _NEEDED)]
                extract(tar, Path(name) / "tree", members)
            (Path(name) / "tree").rename(unpacked)
    found = [path.parents[1] for path in unpacked.glob("**/ggml/src/CMakeLists.txt")]
    if not found:
        raise SystemExit("the archive holds no ggml")
    return found[0]


def build(ggml: Path, target: Path, variant: str, jobs: int) -> None:
    """Configure where that was not done, and compile what is not up to date."""
    options, programs = _VARIANTS[variant]
    settings = {"GGML_SOURCE": str(ggml), "GGML_NATIVE": "OFF", "BUILD_SHARED_LIBS": "OFF", **options}
    given = [f"-D{name}={value}" for name, value in settings.items()]
    compile_ = ("nice", "-n", str(_NICE), "cmake", "--build", target, "--parallel", str(jobs), "--target", *programs)
    for command in (("cmake", "-S", _HERE, "-B", target, *given), compile_):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the programs go, one folder for each variant")
    parser.add_argument("--source", type=Path, help="an unpacked llama.cpp of the pinned release; nothing is fetched")
    parser.add_argument("--system-packages", action="store_true", help="install what is missing of compiler and cmake")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    if platform.machine().lower() not in {"x86_64", "amd64"} or sys.platform != "linux":
        print("The sanitised rpc-server is for Linux on x86-64. Its tests are passed over here.")
        return 0
    if options.system_packages:
        done = subprocess.run(["bash", _HERE.parent / "system_packages.sh", "sanitized"], check=False)
        if done.returncode:
            return done.returncode
    if shutil.which("cmake") is None:
        print("cmake is missing. On Debian and Ubuntu: apt-get install cmake", file=sys.stderr)
        return 1
    directory: Path = options.directory.resolve()
    try:
        ggml = options.source.resolve() / "ggml" if options.source else source(directory / "work")
        for variant in _VARIANTS:
            build(ggml, directory / variant, variant, options.jobs)
    except MeshError as error:
        print(f"{error.message} {error.hint}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"the build failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
