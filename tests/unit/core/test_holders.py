import msgspec
from tests.support.core_values import facts, member

from mesh_llm.core.placement.controller import holders, shared_models, whence
from mesh_llm.core.types.ids import ModelName

MINE = msgspec.structs.replace(facts("m"), fingerprint="ab" * 16)
OTHER = msgspec.structs.replace(facts("m"), fingerprint="cd" * 16)


def test_only_who_has_the_very_file_and_gives_it():
    near = member(2, on_disk=(MINE,), shares=True, rtt_ms=1.0)
    far = member(3, on_disk=(MINE,), shares=True, rtt_ms=40.0)
    doubted = member(4, on_disk=(MINE,), shares=True, suspect=True)
    mean = member(5, on_disk=(MINE,))
    different = member(6, on_disk=(OTHER,), shares=True)
    members = (doubted, far, mean, different, near)
    assert holders(members, ModelName("m"), MINE.fingerprint) == [near, far, doubted]
    assert holders(members, ModelName("m"), "") == []
    assert holders(members, ModelName("other"), MINE.fingerprint) == []
    assert shared_models((mean,)) == set()
    assert shared_models((mean, near)) == {"m"}


def test_whence_for_people():
    source = msgspec.structs.replace(MINE, source="hf:o/r:m.gguf")
    names = [member(number, name=f"n{number}") for number in range(2, 6)]
    assert whence([], source) == "hf:o/r:m.gguf"
    assert whence(names[:1], source) == "n2"
    assert whence(names[:2], source) == "n2 and n3"
    assert whence(names, source) == "n2, n3 and 2 more"
