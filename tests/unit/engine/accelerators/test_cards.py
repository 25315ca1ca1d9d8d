"""The GPUs that the kernel lists."""

from pathlib import Path

import pytest

from mesh_llm.engine.accelerators import cards
from mesh_llm.engine.accelerators.cards import Card, Vendor


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cards, "_asked_nvidia", list[Card])
    return tmp_path


def add(sysfs: Path, name: str, vendor: str, device: str, module: str = "", product: str = "") -> None:
    place = sysfs / "class" / "drm" / name / "device"
    place.mkdir(parents=True)
    (place / "vendor").write_text(f"{vendor}\n")
    (place / "device").write_text(f"{device}\n")
    if product:
        (place / "product_name").write_text(f"{product}\n")
    if module:
        (sysfs / "module" / module).mkdir(parents=True, exist_ok=True)
        (place / "driver").symlink_to(sysfs / "module" / module)


def add_amd_node(sysfs: Path, number: int, device: int, version: int) -> None:
    place = sysfs / "class" / "kfd" / "kfd" / "topology" / "nodes" / str(number)
    place.mkdir(parents=True)
    (place / "properties").write_text(f"cpu_cores_count 0\ngfx_target_version {version}\ndevice_id {device}\n")


def test_a_machine_without_a_card_has_none(sysfs: Path) -> None:
    assert cards.find_cards(sysfs) == ()


@pytest.mark.parametrize(
    ("version", "architecture"), [(110000, "gfx1100"), (90010, "gfx90a"), (100300, "gfx1030"), (90402, "gfx942")]
)
def test_amd_cards_have_the_architecture_that_a_compiler_needs(sysfs: Path, version: int, architecture: str) -> None:
    add(sysfs, "card0", "0x1002", "0x744c", "amdgpu", "Radeon RX 7900 XTX")
    add(sysfs, "card0-DP-1", "0x1002", "0x744c", "amdgpu")
    add_amd_node(sysfs, 0, 0, 0)
    add_amd_node(sysfs, 1, 0x744C, version)
    (card,) = cards.find_cards(sysfs)
    assert card == Card(
        vendor=Vendor.AMD, name="Radeon RX 7900 XTX", architecture=architecture, driver="amdgpu", cuda=(0, 0)
    )


def test_a_card_without_a_driver_is_listed(sysfs: Path) -> None:
    add(sysfs, "card10", "0x8086", "0x56a0", "xe")
    add(sysfs, "card2", "0x10de", "0x2684")
    add(sysfs, "card3", "0x1af4", "0x1050", "virtio-pci")
    first, second = cards.find_cards(sysfs)
    assert (first.vendor, first.name, first.driver) == (Vendor.NVIDIA, "NVIDIA GPU 0x2684", "")
    assert (second.vendor, second.driver) == (Vendor.INTEL, "xe")


def test_what_the_driver_lists_is_not_listed_twice(sysfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Card(vendor=Vendor.NVIDIA, name="RTX 4090", architecture="89", driver="NVIDIA 580", cuda=(13, 0))
    monkeypatch.setattr(cards, "_asked_nvidia", lambda: [asked])
    add(sysfs, "card0", "0x10de", "0x2684", "nvidia")
    add(sysfs, "card1", "0x8086", "0x56a0", "xe")
    found = cards.find_cards(sysfs)
    assert found[0] == asked
    assert [card.vendor for card in found] == [Vendor.NVIDIA, Vendor.INTEL]


def test_a_device_file_that_is_not_there_is_not_closed(tmp_path: Path) -> None:
    (tmp_path / "dri").mkdir()
    (tmp_path / "dri" / "renderD128").write_bytes(b"")
    assert cards.render_nodes_closed(tmp_path) == ()
