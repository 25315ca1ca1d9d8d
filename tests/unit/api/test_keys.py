"""API keys: gathered from three places, compared without a leak."""

from pathlib import Path

import pytest

from mesh_llm.api.keys import KeyRing, collect_keys
from mesh_llm.core.errors import MeshError


def test_keys_come_from_options_environment_and_file(tmp_path: Path):
    file = tmp_path / "keys"
    file.write_text("# team\nkey-of-file-1\n\n  key-of-file-2  \nkey-of-option\n")
    assert collect_keys(["key-of-option"], "key-of-env-1, key-of-env-2,", file) == (
        "key-of-option",
        "key-of-env-1",
        "key-of-env-2",
        "key-of-file-1",
        "key-of-file-2",
    )
    assert collect_keys([]) == ()


@pytest.mark.parametrize("key", ["", "short", "with space in it", "line\nbreak-in-it", "schlüssel-mit-ü", "x" * 513])
def test_what_no_header_could_carry_is_no_key(key: str):
    with pytest.raises(MeshError) as caught:
        collect_keys([key])
    assert caught.value.code == "bad_api_key"


def test_a_key_file_that_cannot_be_read_is_told(tmp_path: Path):
    with pytest.raises(MeshError) as caught:
        collect_keys([], None, tmp_path / "none")
    assert caught.value.code == "api_key_file"


def test_any_one_of_the_keys_is_enough():
    ring = KeyRing(["first-key", "second-key"])
    assert ring
    assert ring.accepts([b"second-key"])
    assert ring.accepts([b"wrong", b"first-key"])
    assert not ring.accepts([b"first-ke", b"", b"first-keyy"])
    assert not ring.accepts([])
    assert not KeyRing([])
