"""aiperf, a generator of load: 64 clients at once, each with a request after the other."""

# pyright: basic, reportMissingImports=false
# The libraries are in an environment of their own.

import json
import tempfile
from pathlib import Path

from cases import KEY, MODEL, URL, case, run_all
from load import ANSWER_TOKENS, AT_ONCE, PROMPT_TOKENS, REQUESTS, generate, write_tokenizer


def load(*words: str) -> None:
    """Ask; fails where a request is refused or ends early."""
    with tempfile.TemporaryDirectory() as directory:
        tokenizer, results = write_tokenizer(Path(directory) / "tokenizer"), Path(directory) / "results"
        generate(
            "aiperf", "profile", "--model", MODEL, "--url", URL, "--api-key", KEY, *words,
            "--tokenizer", str(tokenizer), "--concurrency", str(AT_ONCE), "--request-count", str(REQUESTS),
            "--isl", str(PROMPT_TOKENS), "--osl", str(ANSWER_TOKENS), "--artifact-dir", str(results),
            "--no-server-metrics", "--no-gpu-telemetry", "--ui", "none",
        )  # fmt: skip
        told = json.loads(next(results.rglob("*aiperf.json")).read_text())
    errors = (told.get("error_request_count") or {}).get("avg", 0)
    assert not errors, f"{errors:.0f} of {REQUESTS} failed"
    assert told["request_count"]["avg"] >= REQUESTS, f"{told['request_count']['avg']:.0f} of {REQUESTS} were answered"


@case(f"chat.completions, {AT_ONCE} streams at once")
def _() -> None:
    load("--endpoint-type", "chat", "--streaming")


@case(f"chat.completions, {AT_ONCE} at once")
def _() -> None:
    load("--endpoint-type", "chat")


@case(f"responses, {AT_ONCE} streams at once")
def _() -> None:
    load("--endpoint-type", "responses", "--streaming")


run_all()
