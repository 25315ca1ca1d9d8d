"""Configuration files as text: where a key is, and what cannot be read."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh_llm.core.types.errors import MeshError
from mesh_llm.runtime.config_file import (
    SYSTEM_VARIABLE,
    check_secrets,
    parse_config,
    read_config,
    system_path,
    user_path,
)

TEXT = '''# comment with [brackets] and x = 1
port = 9337
name = """
listen = "not a key"
"""
model = [
  "a",  # devices = 1
  "b=c",
]
use_part = 'it''s' # '

[models."qwen 3"]
temperature = 0.5
environment = { A = "x # y" }
[aliases]
"gpt-4o" = "x"
models.x.y = 1
'''.replace("'it''s'", "'its'")


def test_each_key_has_its_line() -> None:
    file = parse_config(Path("c.toml"), TEXT.encode())
    assert [file.line(key) for key in ("port", "name", "model", "use_part", "use-part")] == [2, 3, 6, 10, 10]
    assert file.line("models", "qwen 3") == 12
    assert file.line("models", "qwen 3", "temperature") == 13
    # A key that is not found is at its table.
    assert file.line("models", "qwen 3", "pin") == 12
    assert file.line("aliases", "gpt-4o") == 16
    assert file.line("listen") == file.line("devices") == 0
    assert file.place("port") == "c.toml:2"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a = 1\nb = \n", "c.toml:2: it is not TOML"),
        (b"a = 1\nb", "c.toml:2: it is not TOML"),
        (b"a = 1\n\xff\xfe", "c.toml:2: it is not UTF-8"),
        (b"a = " + b"[" * 5000, "it is not TOML"),
        (b"a = " + b"9" * 5000, "it is not TOML"),
        (b"#" * (1 << 20) + b"##", "longer than 1 MiB"),
        (b"a = 1\na = 2", "it is not TOML"),
    ],
)
def test_what_is_no_file_says_where_and_why(data: bytes, message: str) -> None:
    with pytest.raises(MeshError, match=message) as caught:
        parse_config(Path("c.toml"), data)
    assert caught.value.code == "config_invalid"
    assert caught.value.hint


def test_a_byte_order_mark_does_not_matter() -> None:
    assert parse_config(Path("c.toml"), b"\xef\xbb\xbfport = 1").values == {"port": 1}


def test_where_the_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_LLM_HOME", str(tmp_path))
    monkeypatch.delenv(SYSTEM_VARIABLE, raising=False)
    assert user_path() == tmp_path / "config.toml"
    assert system_path() == Path("/etc/mesh-llm/config.toml")
    assert read_config(user_path()) is None
    monkeypatch.setenv(SYSTEM_VARIABLE, str(tmp_path / "system.toml"))
    assert system_path() == tmp_path / "system.toml"


@pytest.mark.skipif(os.name != "posix", reason="permissions as POSIX has them")
def test_who_may_read_and_write_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_LLM_HOME", str(tmp_path))
    monkeypatch.setenv(SYSTEM_VARIABLE, str(tmp_path / "system.toml"))
    for path, mode, refused in (
        (user_path(), 0o600, False),
        (user_path(), 0o640, True),
        (user_path(), 0o604, True),
        (system_path(), 0o640, False),
        (system_path(), 0o644, True),
    ):
        path.write_text('api-key = "k"')
        path.chmod(mode)
        file = read_config(path)
        assert file is not None
        check_secrets(file, [])
        if not refused:
            check_secrets(file, ["api-key"])
            continue
        with pytest.raises(MeshError, match="other users") as caught:
            check_secrets(file, ["api-key"])
        assert (caught.value.code, "chmod" in caught.value.hint) == ("config_exposed", True)
    path.chmod(0o646)
    with pytest.raises(MeshError, match="may write"):
        read_config(path)


def test_a_directory_in_its_place_is_an_error_and_no_traceback(tmp_path: Path) -> None:
    with pytest.raises(MeshError) as caught:
        read_config(tmp_path)
    assert caught.value.code == "config_unreadable"


@given(st.one_of(st.binary(max_size=200), st.text(alphabet="ab=[]{}\"'#.\\\n ,1-", max_size=80).map(str.encode)))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        file = parse_config(Path("c.toml"), data)
    except MeshError:
        return
    for key in file.values:
        assert 0 <= file.line(key) <= data.count(b"\n") + 1
