"""A home that others may write to: they could put another key, or another plugin, in the place of the user's own."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesh_llm.core.types.errors import MeshError
from mesh_llm.runtime.home import Home


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def test_who_takes_a_home_lets_nobody_else_write_into_it(tmp_path: Path) -> None:
    root = tmp_path / "home"
    root.mkdir(0o777)
    (root / "mesh").mkdir(0o777)
    (root / "cache").mkdir(0o775)
    home = Home(root)
    lock = home.lock()
    (home.logs).mkdir()
    for directory in (root, home.mesh, home.cache, home.logs):
        assert not stat.S_IMODE(directory.stat().st_mode) & 0o022
    # Who may read is the user's own decision.
    assert stat.S_IMODE(root.stat().st_mode) == 0o755
    lock.release()


def test_guests_run_beside_the_node_that_owns_the_home_and_places_are_used_again(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    own, lock = home.enter(guest=False)
    first, one = home.enter(guest=True)
    second, other = home.enter(guest=True)
    assert (own.is_guest, first.is_guest) == (False, True)
    assert [place.root for place in home.guests()] == [first.root, second.root]
    # Its files are its own, and what can be made again is shared.
    mine = {own.control_token, own.run, own.logs, own.nostr_key, own.own_cache}
    for place in (first, second):
        assert not mine & {place.control_token, place.run, place.logs, place.nostr_key, place.own_cache}
        assert (place.cache, place.shared) == (own.cache, home.root)
        assert not stat.S_IMODE(place.root.stat().st_mode) & 0o077
    assert not stat.S_IMODE(first.root.parent.stat().st_mode) & 0o022
    with pytest.raises(MeshError, match="is held by"):
        home.enter(guest=False)
    one.release()
    again, third = home.enter(guest=True)
    assert again.root == first.root
    for each in (lock, other, third):
        each.release()


def test_a_guest_needs_no_lock_on_the_home_and_leaves_it_to_others(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    _, guest = home.enter(guest=True)
    _, lock = home.enter(guest=False)
    guest.release()
    lock.release()


def test_so_many_guests_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh_llm.runtime.home._MOST_GUESTS", 2)
    home = Home(tmp_path / "home")
    locks = [home.enter(guest=True)[1] for _ in range(2)]
    with pytest.raises(MeshError) as full:
        home.enter(guest=True)
    assert full.value.code == "home_full"
    for lock in locks:
        lock.release()
