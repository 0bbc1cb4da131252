"""What the semantic judge takes for 1,000 answers on one core.

python -m benchmarks.judge [--answers 100 --repeats 3] [overrides, e.g. artifacts=...]

Requests are the project's own harmless questions, and answers are made of them, cut to as many tokens as an evaluation
generates (64), or to as many as the judge reads (256): only their length matters here.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np

from benchmarks import runner
from benchmarks.evaluation import questions
from benchmarks.runner import Skipped, entry, timed
from cwac.core.config import instantiate
from cwac.core.errors import UserError
from cwac.evaluation.semantic_judge import MAX_TOKENS
from experiments.judge import configure

BAR_SECONDS = 30


def measure(answers: int = 100, repeats: int = 3, overrides: Sequence[str] = ()) -> Iterator[dict | Skipped]:
    """Seconds of one thread for 1,000 answers of 64 and of 256 tokens, as shares of 30 s.

    answers: how many are judged in each repeat, each to a request of its own; the time is linear in them. Raises
    UserError for more requests than there are.
    """
    asked, text = questions(), " ".join(questions())
    if not 1 <= answers * repeats <= len(asked):
        raise UserError(f"--answers {answers} --repeats {repeats}: at most {len(asked)} requests in all")
    for tokens, bar in ((64, 1.0), (MAX_TOKENS, None)):
        name = f"semantic judge, 1,000 answers of {tokens} tokens, one core"
        try:
            judge = instantiate(configure("semantic", overrides))  # anew: it keeps the requests that it has read
        except UserError as error:
            yield Skipped(name, str(error), barred=bar is not None)
            return
        ids = judge.encoder.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        shares = []
        for i in range(0, answers * repeats, answers):
            starts = [7 * k % (len(ids) - tokens) for k in range(i, i + answers)]
            given = [judge.encoder.tokenizer.decode(ids[at : at + tokens - 2]) for at in starts]
            seconds, _ = timed(lambda p=asked[i : i + answers], g=given, j=judge: j.judge(p, g), time.process_time)
            shares.append(seconds / answers * 1000 / BAR_SECONDS)
        yield entry(name, "30 s", np.array(shares), bar)


if __name__ == "__main__":
    sys.exit(runner.main(measure))
