from pathlib import Path

from mesh_llm.engine.devices import amd_devices

GIB = 2**30


def card(sysfs: Path, name: str, **files: str) -> None:
    device = sysfs / name / "device"
    device.mkdir(parents=True)
    for file, text in files.items():
        (device / file).write_text(f"{text}\n")


def test_reads_what_the_driver_says(tmp_path: Path) -> None:
    card(tmp_path, "card0", vendor="0x8086")
    card(
        tmp_path,
        "card1",
        vendor="0x1002",
        device="0x744c",
        mem_info_vram_total=str(24 * GIB),
        mem_info_vram_used=str(GIB),
    )
    card(tmp_path, "card1-DP-1", vendor="0x1002")
    card(
        tmp_path,
        "card10",
        vendor="0x1002",
        product_name="Instinct MI300X",
        mem_info_vram_total=str(192 * GIB),
        mem_info_vram_used="0",
    )
    # Graphics of a processor: a small carve-out of main memory.
    card(tmp_path, "card2", vendor="0x1002", mem_info_vram_total=str(GIB // 2), mem_info_vram_used="0")
    first, second = amd_devices(tmp_path)
    assert (first.id, first.name, first.memory_total, first.memory_free) == (
        "ROCm0",
        "AMD GPU 0x744c",
        24 * GIB,
        23 * GIB,
    )
    assert (second.id, second.name, second.memory_free) == ("ROCm1", "Instinct MI300X", 192 * GIB)


def test_no_gpu_is_no_error(tmp_path: Path) -> None:
    assert amd_devices(tmp_path / "nothing") == ()
