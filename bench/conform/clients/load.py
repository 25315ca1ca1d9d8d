"""What the programs of load generators share: a tokenizer that needs no download, and how a generator is run."""

# pyright: basic, reportMissingImports=false
# The libraries are in environments of their own.

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

AT_ONCE = 64
REQUESTS = 192
PROMPT_TOKENS, ANSWER_TOKENS = 64, 16
_SECONDS = 240


def write_tokenizer(directory: Path) -> Path:
    """Write a tokenizer with a token for each byte, in the files that Hugging Face's libraries load."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def generate(program: str, *words: str, **variables: str) -> None:
    """Run a generator of this environment. Raises AssertionError with its last line where it fails."""
    path = Path(sys.executable).with_name(program)
    with tempfile.TemporaryDirectory() as home:
        environment = {**os.environ, "HOME": home, "NO_PROXY": "*", **variables}
        ended = subprocess.run(
            [str(path), *words], env=environment, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    lines = (ended.stdout + ended.stderr).strip().splitlines() or [""]
    assert ended.returncode == 0, f"{program} ended with {ended.returncode}: {lines[-1]}"
