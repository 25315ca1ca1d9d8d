"""What the core hears of."""

import pytest

from mesh_llm.net.event_adapter import changed_noticeably
from mesh_llm.net.quic.connection import PathSample


@pytest.mark.parametrize(
    ("told", "seen", "news"),
    [
        (PathSample(1.0, False), PathSample(2.0, False), False),
        (PathSample(1.0, False), PathSample(4.0, False), True),
        (PathSample(40.0, False), PathSample(48.0, False), False),
        (PathSample(40.0, False), PathSample(51.0, False), True),
        (PathSample(40.0, True), PathSample(40.0, False), True),
    ],
)
def test_only_marked_changes_of_a_path_are_news(told: PathSample, seen: PathSample, news: bool):
    assert changed_noticeably(told, seen) is news
