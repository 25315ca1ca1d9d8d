"""A wheel is unpacked whole and as its RECORD says, or not at all."""

import stat
import zipfile
from pathlib import Path

import pytest
from tests.support.wheel_index import metadata, small_files, wheel_name, write_wheel

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.accelerators import wheel_archive
from mesh_llm.engine.accelerators.wheel_archive import to_fetch, unpack
from mesh_llm.engine.sources.embedded.archive import PACKAGE, VERSION

NOTES = f"{PACKAGE}-{VERSION}.dist-info"


def unpacked(tmp_path: Path, files: dict[str, bytes | Path], record: bytes | None = None) -> tuple[str, ...]:
    into = tmp_path / "into"
    into.mkdir()
    return unpack(write_wheel(tmp_path / wheel_name(), files, record), into)


def refused(tmp_path: Path, files: dict[str, bytes | Path], why: str, record: bytes | None = None) -> None:
    with pytest.raises(MeshError, match=why) as caught:
        unpacked(tmp_path, files, record)
    assert caught.value.code == "wheel_wrong"


def test_every_file_is_there(tmp_path: Path) -> None:
    files = small_files(f"{VERSION}+vulkan", ("nvidia-cublas-cu12>=12.8", 'pytest; extra == "test"'))
    requires = unpacked(tmp_path, files | {f"{PACKAGE}.libs/libx-1.so.2": b"x"})
    assert requires == ("nvidia-cublas-cu12>=12.8", 'pytest; extra == "test"')
    library = tmp_path / "into" / PACKAGE / f"{PACKAGE}.abi3.so"
    assert library.read_bytes() == files[f"{PACKAGE}/{PACKAGE}.abi3.so"]
    assert stat.S_IMODE(library.stat().st_mode) == 0o755
    assert (tmp_path / "into" / f"{PACKAGE}.libs" / "libx-1.so.2").exists()


@pytest.mark.parametrize(
    "name",
    [
        f"{PACKAGE}/../../escaped.py",
        "../escaped.py",
        "/tmp/escaped.py",
        f"{PACKAGE}\\..\\escaped.py",
        f"{PACKAGE}//x.py",
        f"{PACKAGE}/./x.py",
        "C:/x.py",
        f"{PACKAGE}/a\nb.py",
        "mesh_llm/cli/main.py",
        "sitecustomize.py",
        f"{PACKAGE}.pth",
        f"{PACKAGE}-1.data/scripts/x",
        f"{PACKAGE}/{'x' * 500}",
    ],
)
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    refused(tmp_path, {**small_files(), name: b"evil"}, "called|not the engine's|wrong place")
    assert not list((tmp_path / "into").iterdir())
    assert not (tmp_path / "escaped.py").exists()


def test_links_are_refused(tmp_path: Path) -> None:
    path = write_wheel(tmp_path / wheel_name(), small_files())
    with zipfile.ZipFile(path, "a") as wheel:
        link = zipfile.ZipInfo(f"{PACKAGE}/link.so")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        wheel.writestr(link, "/etc/passwd")
    (tmp_path / "into").mkdir()
    with pytest.raises(MeshError, match="not a plain file"):
        unpack(path, tmp_path / "into")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, 99])
@pytest.mark.parametrize("member", [f"{PACKAGE}/{PACKAGE}.abi3.so", f"{NOTES}/RECORD"])
def test_what_wheels_do_not_compress_with_is_refused(tmp_path: Path, method: int, member: str) -> None:
    path = write_wheel(tmp_path / wheel_name(), small_files())
    data = bytearray(path.read_bytes())
    place = data.rindex(member.encode()) - 46
    assert data[place : place + 4] == b"PK\x01\x02"
    data[place + 10 : place + 12] = method.to_bytes(2, "little")
    path.write_bytes(data)
    (tmp_path / "into").mkdir()
    with pytest.raises(MeshError, match="is compressed as wheels are not") as caught:
        unpack(path, tmp_path / "into")
    assert caught.value.code == "wheel_wrong"
    assert not list((tmp_path / "into").iterdir())


def test_a_name_twice_is_refused(tmp_path: Path) -> None:
    path = write_wheel(tmp_path / wheel_name(), small_files())
    with zipfile.ZipFile(path, "a") as wheel, pytest.warns(UserWarning, match="Duplicate"):
        wheel.writestr(f"{PACKAGE}/__init__.py", "evil")
    (tmp_path / "into").mkdir()
    with pytest.raises(MeshError, match="twice"):
        unpack(path, tmp_path / "into")


def test_huge_files_are_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel_archive, "MAX_UNPACKED_BYTES", 99_999)
    refused(tmp_path, small_files(), "it would be larger than 100")
    assert not list((tmp_path / "into").iterdir())


def test_a_size_that_lies_is_refused(tmp_path: Path) -> None:
    path = write_wheel(tmp_path / wheel_name(), small_files())
    data = path.read_bytes()
    # The size in the central directory, which is what counts: almost 4 GB.
    place = data.rindex(f"{PACKAGE}/{PACKAGE}.abi3.so".encode()) - 46
    assert data[place : place + 4] == b"PK\x01\x02"
    path.write_bytes(data[: place + 24] + b"\xfe\xff\xff\xff" + data[place + 28 :])
    (tmp_path / "into").mkdir()
    with pytest.raises(MeshError) as caught:
        unpack(path, tmp_path / "into")
    assert caught.value.code in {"wheel_wrong", "disk_full"}


def test_many_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel_archive, "MAX_FILES", 3)
    refused(tmp_path, small_files(), "it has 4 files")


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (b"", "is not in its RECORD"),
        (b"xllamacpp/__init__.py,md5=aa,0\n", "is not in its RECORD"),
        (f"{PACKAGE}/__init__.py,sha256={'A' * 43},0\n".encode(), "is not what its RECORD says"),
        (b"a,sha256=x,many\n", "RECORD cannot be read"),
        (b'"' + b"x" * 200_000, "RECORD cannot be read"),
    ],
)
def test_what_its_record_does_not_say_is_refused(tmp_path: Path, record: bytes, why: str) -> None:
    refused(tmp_path, small_files(), why, record)


@pytest.mark.parametrize("version", ["2026.10.11548", f"{VERSION}.post1", "", "nonsense"])
def test_another_release_inside_is_refused(tmp_path: Path, version: str) -> None:
    refused(tmp_path, small_files(version), "is needed")


def test_another_package_inside_is_refused(tmp_path: Path) -> None:
    text = metadata().replace(PACKAGE.encode(), b"other")
    refused(tmp_path, {**small_files(), f"{NOTES}/METADATA": text}, "it contains other")


def test_a_wheel_without_library_or_notes_is_refused(tmp_path: Path) -> None:
    files = small_files()
    del files[f"{PACKAGE}/{PACKAGE}.abi3.so"]
    refused(tmp_path, files, "no library of the engine")


def test_a_wheel_without_metadata_is_refused(tmp_path: Path) -> None:
    files = small_files()
    del files[f"{NOTES}/METADATA"]
    refused(tmp_path, files, "it has no .*METADATA")


@pytest.mark.parametrize("cut", [1, 100, 50_000, 100_500])
def test_a_damaged_file_is_refused(tmp_path: Path, cut: int) -> None:
    path = write_wheel(tmp_path / wheel_name(), small_files())
    path.write_bytes(path.read_bytes()[:-cut])
    (tmp_path / "into").mkdir()
    with pytest.raises(MeshError) as caught:
        unpack(path, tmp_path / "into")
    assert caught.value.code == "wheel_wrong"


def test_a_file_that_begins_before_the_archive_is_refused(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path / wheel_name(), small_files())
    content = bytearray(wheel.read_bytes())
    # In the end record (22 bytes): where the list of files begins. Larger than true, so that all offsets get negative.
    content[-6:-2] = (int.from_bytes(content[-6:-2], "little") + (1 << 20)).to_bytes(4, "little")
    wheel.write_bytes(content)
    (tmp_path / "into").mkdir()
    with pytest.raises(MeshError, match="would begin before") as caught:
        unpack(wheel, tmp_path / "into")
    assert caught.value.code == "wheel_wrong"


def test_only_nvidias_libraries_are_fetched() -> None:
    requires = ["nvidia-cublas-cu12>=12.8", "NVIDIA_cuda.runtime", 'gguf; extra == "all"', "msgspec>=0.1"]
    assert to_fetch("w.whl", requires) == ("nvidia-cublas-cu12>=12.8", "NVIDIA_cuda.runtime")


@pytest.mark.parametrize(
    "one", ["no-such-package", "msgspec>=999", "nvidia-x @ https://a.example/x.whl", "not a requirement !!"]
)
def test_other_requirements_must_be_installed(one: str) -> None:
    with pytest.raises(MeshError) as caught:
        to_fetch("w.whl", [one])
    assert caught.value.code == "wheel_wrong"
