"""The system call filters of RPC servers."""

import errno
import re
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest

from mesh_llm.engine.confinement.launcher import CHECKED_CALLS, CPU, CPU_CALLS, GPU, GPU_CALLS, filter_program

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
HEADERS = {"x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "/usr/include/asm-generic/unistd.h"}
ALLOWED, PID = 0, 4242
READ, WRITE, EXECUTE, PRIVATE, ANONYMOUS = 1, 2, 4, 2, 0x20


def decide(program: bytes, architecture: int, number: int, arguments: Sequence[int] = ()) -> int:
    """What the kernel's classic BPF would answer: 0 for allowed, else the error (seccomp(2), bpf_common.h)."""
    words = [*arguments, *(0,) * (6 - len(arguments))]
    data = struct.pack("=IIQ6Q", number, architecture, 0, *(word & (1 << 64) - 1 for word in words))
    loaded, at = 0, 0
    while True:
        code, yes, no, operand = struct.unpack_from("=HBBI", program, 8 * at)
        at += 1
        if code == 0x20:
            (loaded,) = struct.unpack_from("=I", data, operand)
        elif code == 0x06:
            assert operand == 0x7FFF0000 or operand >> 16 == 0x0005
            return operand & 0xFFFF if operand >> 16 == 0x0005 else ALLOWED
        else:
            taken = {0x15: loaded == operand, 0x35: loaded >= operand, 0x45: loaded & operand != 0}[code]
            at += yes if taken else no


@pytest.fixture(params=ARCHITECTURES)
def machine(request: pytest.FixtureRequest) -> str:
    return request.param


def number(name: str, machine: str) -> int:
    found = (CPU_CALLS | GPU_CALLS | CHECKED_CALLS)[name][list(ARCHITECTURES).index(machine)]
    assert found is not None
    return found


@pytest.mark.parametrize("kind", [CPU, GPU])
def test_what_is_on_the_list_is_allowed_and_nothing_else(machine: str, kind: str) -> None:
    program = filter_program(kind, PID, machine)
    at = list(ARCHITECTURES).index(machine)
    listed = {pair[at] for pair in (CPU_CALLS | (GPU_CALLS if kind == GPU else {})).values()} - {None}
    looked_at = {pair[at] for pair in CHECKED_CALLS.values()}
    for call in range(1200):
        if call not in looked_at:
            expected = ALLOWED if call in listed else errno.EPERM
            assert decide(program, ARCHITECTURES[machine], call) == expected, call
        # Another table of calls on the same processor: x32, or 32-bit programs.
        assert decide(program, ARCHITECTURES[machine], 0x40000000 | call) == errno.EPERM
        assert decide(program, 0x40000003, call) == errno.EPERM


@pytest.mark.parametrize("kind", [CPU, GPU])
def test_what_depends_on_arguments(machine: str, kind: str) -> None:
    program = filter_program(kind, PID, machine)

    def of(name: str, *arguments: int) -> int:
        return decide(program, ARCHITECTURES[machine], number(name, machine), arguments)

    assert of("clone3", 0x10000) == errno.ENOSYS
    assert of("clone", 0x003D0F00) == ALLOWED
    assert of("clone", 17) == errno.EPERM
    assert of("tgkill", PID, PID, 6) == ALLOWED
    assert of("tgkill", PID + 1, PID + 1, 9) == errno.EPERM
    assert of("prctl", 15, 1) == ALLOWED
    assert of("prctl", 4, 1) == errno.EPERM
    assert of("mprotect", 0, 4096, READ | WRITE) == ALLOWED
    assert of("mprotect", 0, 4096, READ | EXECUTE) == errno.EPERM
    assert of("mmap", 0, 4096, READ | WRITE, PRIVATE | ANONYMOUS) == ALLOWED
    assert of("mmap", 0, 4096, READ | EXECUTE, PRIVATE | ANONYMOUS) == errno.EPERM
    assert of("mmap", 0, 4096, READ | WRITE | EXECUTE, PRIVATE) == errno.EPERM
    # A driver loads libraries late; a processor's worker has no file to map.
    from_file = ALLOWED if kind == GPU else errno.EPERM
    assert of("mmap", 0, 4096, READ | EXECUTE, PRIVATE) == from_file
    assert of("mmap", 0, 4096, READ | WRITE, PRIVATE) == from_file
    assert of("prlimit64", 0, 7, 0) == from_file
    assert of("prlimit64", 0, 7, 1 << 40) == errno.EPERM
    assert of("prlimit64", 0, 7, 8) == errno.EPERM


def test_the_numbers_are_those_of_the_kernels_headers(machine: str) -> None:
    header = Path(HEADERS[machine])
    if not header.is_file():
        pytest.skip("the kernel's headers are not installed")
    known: dict[str, int] = {}
    for found in re.finditer(r"#define __NR(?:3264)?_(\w+) (\d+)", header.read_text()):
        known.setdefault(found[1], int(found[2]))
    at = list(ARCHITECTURES).index(machine)
    for name, pair in (CPU_CALLS | GPU_CALLS | CHECKED_CALLS).items():
        # AArch64's table calls it by another name.
        real = "fstatat" if name == "newfstatat" and machine == "aarch64" else name
        assert pair[at] == known.get(real), name


def test_a_processor_without_a_table_has_no_filter() -> None:
    with pytest.raises(KeyError):
        filter_program(CPU, PID, "riscv64")
