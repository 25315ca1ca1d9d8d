"""Random and changed listings: decoders return a bounded value, and changed listings are refused."""

import json
import random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from tests.unit.wire.mesh.test_certificates import NOW
from tests.unit.wire.test_discovery import AUTHOR, posting
from tests.unit.wire.toy_keys import verify

from mesh_llm.core.listing.content import MAX_LISTED_MODELS
from mesh_llm.wire.codec import Malformed
from mesh_llm.wire.discovery import Posting, check_posting, decode_posting, encode_posting
from mesh_llm.wire.mesh.invites import Invite

CONTENT = encode_posting(posting())
FIELDS: dict[str, Any] = json.loads(CONTENT)
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=80),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def judged(content: str) -> Posting | Malformed:
    read = decode_posting(content)
    if isinstance(read, Posting):
        assert isinstance(check_posting(read, AUTHOR, now=NOW, verify=verify), Invite | Malformed)
        listing = read.listing
        assert max(len(listing.serving), len(listing.wanted), len(listing.on_disk)) <= MAX_LISTED_MODELS
        assert 0.0 <= listing.load <= 1.0
        texts = [listing.name, listing.region, listing.version, *(model.name for model in listing.serving)]
        assert not any(ord(char) < 32 or 127 <= ord(char) < 160 for text in texts for char in text)
    return read


@given(st.text(max_size=500))
def test_any_text(text: str) -> None:
    judged(text)


@given(st.dictionaries(st.sampled_from(sorted(FIELDS)), JUNK, min_size=1, max_size=4))
def test_any_value_in_any_field(values: dict[str, Any]) -> None:
    judged(json.dumps({**FIELDS, **values}))


@given(st.integers())
def test_a_listing_with_a_changed_invite_or_proof_is_refused(seed: int) -> None:
    chance = random.Random(seed)
    field = chance.choice(["token", "proof", "mesh"])
    text = FIELDS[field]
    place = chance.randrange(len(text))
    changed = text[:place] + chance.choice("0123456789abcdef") + text[place + 1 :]
    if changed == text:
        return
    read = judged(json.dumps({**FIELDS, field: changed}))
    if isinstance(read, Posting):
        assert isinstance(check_posting(read, AUTHOR, now=NOW, verify=verify), Malformed)
