"""`python -m tools.train_tiny`: trains both models and writes their files."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from tools.train_tiny import export, recipe, vocabulary
from tools.train_tiny.distil import distillation
from tools.train_tiny.files import DRAFT_FILE, PACKAGE_DATA, TINY_FILE
from tools.train_tiny.initial import look_back
from tools.train_tiny.llama import Llama
from tools.train_tiny.loop import train
from tools.train_tiny.tokenizer import Tokenizer


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tools.train_tiny", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=PACKAGE_DATA, help="folder for the two files (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=recipe.SEED, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="processor cores to use (default: %(default)s)")
    parser.add_argument("--weights", type=Path, help="where to keep tiny's unquantised weights, to train a draft later")
    parser.add_argument("--draft-only", action="store_true", help="take tiny from --weights, and train only the draft")
    arguments = parser.parse_args()
    if arguments.draft_only and arguments.weights is None:
        parser.error("--draft-only needs --weights")

    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    started, cpu_started = time.monotonic(), time.process_time()
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokenizer = vocabulary.build(arguments.seed)
    _say(f"vocabulary of {len(tokenizer)} tokens")

    if arguments.draft_only:
        tiny = Llama(recipe.tiny_shape(len(tokenizer)))
        tiny.load_state_dict(torch.load(arguments.weights, weights_only=True))
    else:
        tiny = _train_tiny(tokenizer, arguments.seed)
        if arguments.weights is not None:
            torch.save(tiny.state_dict(), arguments.weights)
        export.write(tiny, tokenizer, arguments.out / TINY_FILE, "tiny", recipe.TINY_DESCRIPTION)
    draft = _train_draft(tokenizer, tiny, arguments.seed)
    export.write(draft, tokenizer, arguments.out / DRAFT_FILE, "tiny-draft", recipe.DRAFT_DESCRIPTION)

    spent, cpu_spent = time.monotonic() - started, time.process_time() - cpu_started
    _say(f"done in {spent / 60:.1f} minutes, {cpu_spent / 60:.1f} minutes of processor time")


def _train_tiny(tokenizer: Tokenizer, seed: int) -> Llama:
    torch.manual_seed(seed)
    model = Llama(recipe.tiny_shape(len(tokenizer)))
    look_back(model)
    _say(f"tiny: {model.parameter_count():,} weights")
    train(model, tokenizer, recipe.TINY_SCHEDULE, seed + 1000, report=_say)
    return model


def _train_draft(tokenizer: Tokenizer, tiny: Llama, seed: int) -> Llama:
    torch.manual_seed(seed + 1)
    model = Llama(recipe.draft_shape(len(tokenizer)))
    look_back(model)
    _say(f"draft: {model.parameter_count():,} weights")
    train(model, tokenizer, recipe.DRAFT_SCHEDULE, seed + 2000, report=_say)
    train(model, tokenizer, recipe.DISTILLATION_SCHEDULE, seed + 3000, distillation(tiny), report=_say)
    return model


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
