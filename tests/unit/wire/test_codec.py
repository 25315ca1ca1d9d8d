import re

from mesh_llm.core.types.ids import NodeId
from mesh_llm.wire.codec import fingerprint, fingerprint_letters


def test_a_fingerprint_is_three_groups_of_four_unambiguous_letters():
    found = {fingerprint(NodeId(f"{number:064x}")) for number in range(200)}
    assert len(found) == 200
    assert all(re.fullmatch(r"([0-9a-hjkmnp-tv-z]{4}-){2}[0-9a-hjkmnp-tv-z]{4}", text) for text in found)


def test_a_fingerprint_never_changes():
    assert fingerprint(NodeId("ab" * 32)) == "4698-4b63-517z"


def test_typed_fingerprints_are_normalized():
    assert fingerprint_letters(" 4698-4B63 517Z ") == "46984b63517z"
    assert fingerprint_letters("OIL") == "011"
    assert len(fingerprint_letters("x" * 10_000)) < 100
