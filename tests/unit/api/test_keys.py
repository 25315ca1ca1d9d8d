"""API keys are compared without a leak."""

from mesh_llm.api.auth import KeyRing


def test_any_one_of_the_keys_is_enough():
    ring = KeyRing(["first-key", "second-key"])
    assert ring
    assert ring.accepts([b"second-key"])
    assert ring.accepts([b"wrong", b"first-key"])
    assert not ring.accepts([b"first-ke", b"", b"first-keyy"])
    assert not ring.accepts([])
    assert not KeyRing([])
