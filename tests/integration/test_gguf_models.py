"""Real llama.cpp runs the generated models, and writes what was foretold."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.gguf_models import PRESETS
from tests.support.gguf_vocabulary import build_vocabulary
from tests.support.gguf_weights import foretell

PROGRAM = Path(__file__).with_name("engine_completion.py")


def complete(model: Path, prompt: list[int], count: int) -> dict[str, Any]:
    command = [sys.executable, str(PROGRAM), str(model), str(count)]
    done = subprocess.run(command, input=json.dumps(prompt), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("preset", ["small", "small-draft", "small-heads"])
@pytest.mark.parametrize("length", [16, 700])
def test_greedy_output_is_what_was_foretold_and_never_close(
    random_model: Callable[[str], Path], preset: str, length: int
) -> None:
    vocabulary = build_vocabulary()
    prompt = np.random.default_rng(length).integers(0, 256, length).tolist()
    written = complete(random_model(preset), prompt, 200)
    assert written["tokens"] == foretell(PRESETS[preset], vocabulary, prompt, 200)
    assert written["finish"] == "length"
    assert written["closest"] > 3
