import re

from mesh_llm.core.types.ids import NodeId
from mesh_llm.wire.mesh.frames import fingerprint, normal


def test_it_is_three_groups_of_four_letters_that_nobody_confuses():
    found = {fingerprint(NodeId(f"{number:064x}")) for number in range(200)}
    assert len(found) == 200
    assert all(re.fullmatch(r"([0-9a-hjkmnp-tv-z]{4}-){2}[0-9a-hjkmnp-tv-z]{4}", text) for text in found)


def test_it_is_the_same_everywhere_and_for_ever():
    assert fingerprint(NodeId("ab" * 32)) == "4698-4b63-517z"


def test_what_people_type_is_understood():
    assert normal(" 4698-4B63 517Z ") == "46984b63517z"
    assert normal("OIL") == "011"
    assert len(normal("x" * 10_000)) < 100
