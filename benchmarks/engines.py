"""`eval.engine=vllm` against `eval.engine=hf`: the same prompts, the same greedy answers.

CWAC_VLLM_PYTHON=<an interpreter with vLLM> python -m benchmarks.engines [--prompts 64 --repeats 3] [overrides, e.g.
"eval.vllm.options={max_model_len: 512}"]

On SmolLM2-135M itself. By the clock on the wall, since vLLM works in processes of its own: on a machine that does
nothing else. On a CPU both have one thread. vLLM's start, once an evaluation, is a row by itself.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import runner
from benchmarks.evaluation import conversations, questions
from benchmarks.runner import Skipped, entry, timed
from cwac.core import config
from cwac.core.errors import UserError
from cwac.evaluation.vllm_engine import VllmEngine
from cwac.models.generate import generate
from cwac.models.layers import device
from cwac.models.loading import load

NAME = "generation by vLLM"


def measure(
    prompts: int = 64, tokens: int = 64, repeats: int = 3, overrides: Sequence[str] = ()
) -> Iterator[dict | Skipped]:
    """Seconds of the same prompts by both engines in turn; vLLM's start; how many texts differ."""
    cfg = config.compose(["model=smollm2", *overrides])
    requests = conversations(questions()[:prompts])
    try:
        loaded = load(cfg.model, Path(cfg.paths.artifacts), cfg.seed)
        model, tokenizer = loaded.model.to(device()), loaded.tokenizer
        settings: dict[str, Any] = {"max_new_tokens": tokens, "description": None}
        ratios, differing, ours = [], 0, 0.0
        python = os.environ.get("CWAC_VLLM_PYTHON", cfg.eval.vllm.python)
        options = {"dtype": "float32", **(cfg.eval.vllm.options or {})}
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0")  # a core, as ours has
        begun = time.perf_counter()
        with VllmEngine(model, tokenizer, python, options) as vllm:
            start = time.perf_counter() - begun
            for _ in range(repeats):
                theirs, texts = timed(lambda: vllm.generate(requests, **settings), time.perf_counter)
                together = partial(generate, model, tokenizer, requests, batch_size=len(requests), **settings)
                ours, mine = timed(together, time.perf_counter)
                ratios.append(theirs / ours)
                differing += sum(a != b for a, b in zip(texts, mine, strict=True))
    except UserError as error:
        yield Skipped(NAME, str(error))
        return
    yield entry(f"{NAME}, {len(requests)} prompts, {tokens} new tokens", "eval.engine=hf, one batch", np.array(ratios))
    yield entry("vLLM's start", "eval.engine=hf's answers", start / ours)
    yield entry(f"texts that differ from eval.engine=hf's, of {repeats * len(requests)}", "none", float(differing))


if __name__ == "__main__":
    sys.exit(runner.main(measure))
