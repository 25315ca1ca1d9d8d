import logging
from pathlib import Path

import structlog

from mesh_llm.daemon.log import DaemonLog


def test_own_words_and_those_of_libraries_go_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "daemon.log"
    before = structlog.get_config()
    log = DaemonLog(path, "info")
    try:
        own = structlog.get_logger("own")
        own.info("started", pid=5)
        own.debug("not for info")
        own.info("gone", reason="bye\n2026 [error] forged\x1b[2J\u202e")
        logging.getLogger("library").warning("beware of %s", "it")
        logging.getLogger("library").info("chatter")
        try:
            raise RuntimeError("a defect")
        except RuntimeError:
            own.exception("it failed", text="odd \udc80 text")
    finally:
        log.close()
    lines = path.read_text().splitlines()
    assert "started pid=5" in lines[0]
    assert "beware of it" in lines[2]
    # Nobody's words begin lines of their own, or move a reader's cursor.
    assert lines[1].endswith("gone reason='bye\ufffd2026 [error] forged\ufffd[2J\ufffd'")
    assert lines[1].isprintable()
    assert "chatter" not in path.read_text()
    assert "it failed" in lines[3]
    assert lines[-1] == "RuntimeError: a defect"
    assert structlog.get_config()["processors"] == before["processors"]
