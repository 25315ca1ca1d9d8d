"""guidellm, a generator of load: 64 clients at once, each with a request after the other."""

# pyright: basic, reportMissingImports=false
# The libraries are in an environment of their own.

import json
import tempfile
from pathlib import Path

from cases import KEY, MODEL, URL, case, run_all
from load import ANSWER_TOKENS, AT_ONCE, PROMPT_TOKENS, REQUESTS, generate, write_tokenizer


def load(path: str, *, stream: bool) -> None:
    """Ask; fails where a request is refused or ends early."""
    with tempfile.TemporaryDirectory() as directory:
        tokenizer, results = write_tokenizer(Path(directory) / "tokenizer"), Path(directory) / "results.json"
        backend = f"kind=openai_http,target={URL},model={MODEL},api_key={KEY},request_format={path}"
        generate(
            "guidellm", "run", "--disable-console",
            "--backend", f"{backend},stream={str(stream).lower()}",
            "--profile", f"kind=concurrent,streams={AT_ONCE}",
            "--constraint", f"kind=max_requests,count={REQUESTS}",
            "--tokenizer", f"kind=huggingface_auto,model={tokenizer}",
            "--data", f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={ANSWER_TOKENS}",
            "--output", f"kind=json,path={results}",
            HF_HUB_OFFLINE="1",
        )  # fmt: skip
        totals = json.loads(results.read_text())["benchmarks"][0]["metrics"]["request_totals"]
    assert totals["errored"] == 0, f"{totals['errored']} of {totals['total']} failed"
    assert totals["successful"] >= REQUESTS, f"{totals['successful']} of {REQUESTS} were answered"


@case(f"chat.completions, {AT_ONCE} streams at once")
def _() -> None:
    load("/v1/chat/completions", stream=True)


@case(f"chat.completions, {AT_ONCE} at once")
def _() -> None:
    load("/v1/chat/completions", stream=False)


@case(f"completions, {AT_ONCE} streams at once")
def _() -> None:
    load("/v1/completions", stream=True)


run_all()
