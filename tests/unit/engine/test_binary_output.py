from mesh_llm.engine.sources.base import DeviceKind
from mesh_llm.engine.sources.binaries import parse_devices, parse_flags, parse_version

NEW_VERSION = """ggml_cuda_init: found 1 CUDA devices:
version: 0.26.0 (build 6871, commit 9a9a2cc)
built with GNU 13.3.0 for Linux x86_64
"""
OLD_VERSION = """version: 4567 (a1b2c3d4)
built with cc (Debian 12.2.0-14) 12.2.0 for x86_64-linux-gnu
"""
DEVICES = """load_backend: loaded CUDA backend from /opt/llama/libggml-cuda.so
Available devices:
  CUDA0: NVIDIA GeForce RTX 4090 (24217 MiB, 23816 MiB free)
  Vulkan0: AMD Radeon RX 7900 XTX (RADV NAVI31) (24560 MiB, 24500 MiB free)
  BLAS: Accelerate (0 MiB, 0 MiB free)
"""
HELP = """-m,    --model FNAME                    model path to load
-c,    --ctx-size N                     size of the prompt context
-md,   --model-draft FNAME              draft model (see --spec-type)
--rpc SERVERS                           comma-separated list of RPC servers (host:port)
-fit,  --fit [on|off]                   whether to adjust unset arguments
"""


def test_versions_of_both_forms() -> None:
    new, old = parse_version(NEW_VERSION), parse_version(OLD_VERSION)
    assert (new.version, new.build) == ("b6871", "commit 9a9a2cc, GNU 13.3.0 for Linux x86_64")
    assert (old.version, old.build) == (
        "b4567",
        "commit a1b2c3d4, cc (Debian 12.2.0-14) 12.2.0 for x86_64-linux-gnu",
    )
    assert parse_version("no such thing").version == ""


def test_devices_with_brackets_in_their_names() -> None:
    cuda, vulkan, blas = parse_devices(DEVICES)
    assert (cuda.id, cuda.name, cuda.kind) == ("CUDA0", "NVIDIA GeForce RTX 4090", DeviceKind.GPU)
    assert (cuda.memory_total, cuda.memory_free) == (24217 * 2**20, 23816 * 2**20)
    assert vulkan.name == "AMD Radeon RX 7900 XTX (RADV NAVI31)"
    assert not blas.holds_models


def test_no_devices() -> None:
    assert parse_devices("Available devices:\n  (none)\n") == ()


def test_flags() -> None:
    flags = parse_flags(HELP)
    assert {"-m", "--model", "--rpc", "--fit", "-md", "--spec-type"} <= flags
    assert "--cache-ram" not in flags
