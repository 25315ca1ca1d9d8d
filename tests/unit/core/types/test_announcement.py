import msgspec
from tests.support.core_values import member, serving

from mesh_llm.core.types.announcement import Announcement, ListingPolicy, only_load_differs, without_load


def test_only_load_is_load():
    word = member(1, serving("m")).announcement
    load = {"demand": {"m": 2.0}, "clients": 7, "sequence": 99}
    busy = (msgspec.structs.replace(word.serving[0], in_flight=3, tokens_per_second=9.0),)
    assert only_load_differs(word, msgspec.structs.replace(word, serving=busy, **load))
    # The wish to be listed is no load: others wait for it.
    assert not only_load_differs(word, msgspec.structs.replace(word, publicity=ListingPolicy(name="lab")))
    other = (msgspec.structs.replace(word.serving[0], embeddings=False),)
    assert not only_load_differs(word, msgspec.structs.replace(word, serving=other))
    untouched = set(Announcement.__struct_fields__) - {"serving", "demand", "clients"}
    changed = without_load(msgspec.structs.replace(word, name="other", publicity=ListingPolicy(name="lab")))
    assert {name for name in untouched if getattr(changed, name) != getattr(without_load(word), name)} == {
        "name",
        "publicity",
    }
