from mesh_llm.models.hub.progress import Meter, Progress

MB = 10**6


def test_speed_and_time_left_are_of_what_comes_now() -> None:
    now = 0.0
    meter = Meter(lambda: now)

    def say(phase: str, done: int, fetched: int = 0) -> str:
        progress = Progress(phase=phase, done_bytes=done * MB, total_bytes=500 * MB, fetched_bytes=fetched * MB)
        return meter.text(progress)

    assert say("fetching", 0) == "0 of 500.0 MB"
    now = 2.0
    assert say("fetching", 300, 20) == "300.0 MB of 500.0 MB, 10.0 MB/s, 20s left"
    assert say("waiting", 300) == "300.0 MB of 500.0 MB; another process fetches it"
    assert say("checking", 100) == "checked 100.0 MB of 500.0 MB"
    now = 3.0
    assert say("checking", 500) == "checked 500.0 MB of 500.0 MB, 400.0 MB/s"
