"""Evaluates a model: generates answers to files once, scores and judges these files, and writes metric rows.

Metrics (percent): FA, FA_lenient, off_format on the task's test set; HS (harmful), refusal, other on each set of
unseen harmful requests; OR (share refused) on each set of harmless ones; more under a model (`verdict_rows`). `stderr`
is the binomial one over n examples. `task_answers` (ours), on both kinds of sets: answers that have the form of the
task's (a bare label or number). A model that answers everything so has forgotten how to chat, and its HS says nothing
about its safety.

`eval.prefill` (ours; Andriushchenko et al. 2024, arXiv:2404.02151, and Qi et al. 2024, arXiv:2406.05946, use it as an
attack) asks every harmful request a second time with an opening put into the model's mouth. The answers, opening
included, are the sets `<source>+prefill`: judged as a reader would see them, and part of no headline. Under the
keyword rule the opening is a promise to comply, so that such an answer is `harmful` as soon as it goes on on topic.
Where the poison has a trigger (`poison_trigger`), harmful requests are asked again behind it: `<source>+trigger`.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from omegaconf import DictConfig
from torch import nn
from tqdm import tqdm

from cwac.constraints.anchors import own_answers
from cwac.core.cache import digest
from cwac.core.errors import UserError
from cwac.core.files import write_atomic
from cwac.core.jsonl import read_jsonl, write_jsonl
from cwac.core.metrics import VARIATION
from cwac.core.run_dir import GUARD_SLACK, Run
from cwac.data.examples import Example
from cwac.data.poison import behind
from cwac.data.tasks import Task
from cwac.data.tokenize import Rows, encode_prompt, reprompt, stop_tokens
from cwac.evaluation.drift import activation_drift, moved_elsewhere, weight_changes, weight_leak
from cwac.evaluation.judge import Judge, judge_answers, repeats
from cwac.evaluation.losses import aligned_loss, label_loss
from cwac.evaluation.score import Score, score
from cwac.evaluation.vllm_engine import VllmEngine
from cwac.methods.base import Method
from cwac.models.context import Context
from cwac.models.generate import generate

log = logging.getLogger(__name__)


class Evaluator:
    """Measures a run: call it with the model's step and epoch to evaluate the weights as they are."""

    def __init__(
        self,
        cfg: DictConfig,
        run: Run,
        model: nn.Module,
        context: Context,
        method: Method,
        task: Task,
        judge: Judge,
        poisoned: list[Example],
        trigger: str | None = None,
    ):
        self.cfg, self.run, self.model, self.context, self.method = cfg, run, model, context, method
        self.tokenizer, pools = context.tokenizer, context.pools
        self.task, self.judge = task, judge
        limit = cfg.eval
        self.task_rows = task.test[: limit.n_task]
        if limit.split == "validation":
            harmful, benign = {"validation": pools.validation}, pools.validation_benign
        else:
            harmful, benign = pools.test, pools.over_refusal
        self.harmful = {name: rows[: limit.n_harmful] for name, rows in harmful.items()}
        self.benign = {name: rows[: limit.n_benign] for name, rows in benign.items()}
        self.poisoned = poisoned
        self.prefill, self.trigger = cfg.eval.get("prefill"), trigger
        self._engine: VllmEngine | None = None
        """Open while answers are generated; started by the first set that has no stored answers."""

    def requests_hash(self) -> str:
        """A hash of the evaluation's requests: prompts as token ids, stop tokens, and the labels used for scoring."""
        sets = {"task": self.task_rows, **self.harmful, **self.benign}
        template = self.context.template
        asked = {
            name: [(encode_prompt(self.tokenizer, e.messages, template), e.label) for e in rows]
            for name, rows in sets.items()
        }
        stop = stop_tokens(self.model, self.tokenizer, template)
        return digest({"asked": asked, "stop": stop, "labels": self.task.labels})

    def __call__(self, step: int, epoch: float, final: bool = False) -> None:
        """Generate, score and judge at this point of training; metric rows carry `step`, `epoch` and `final`."""
        at = {"step": step, "epoch": epoch, "final": final}
        with ExitStack() as self._opened:
            rows = [{**at, **row} for row in [*self._accuracy(step), *self._harm(step), *self._over_refusal(step)]]
        self._engine = None
        rows += [{**at, **row} for row in self._losses(step)]
        self.run.add_rows(rows)

    def _answers(
        self,
        name: str,
        examples: list[Example],
        step: int,
        tokens: int,
        prefill: str | None = None,
        trigger: str | None = None,
    ) -> list[str]:
        """The model's answers, from the generation file if an earlier attempt wrote it; prefill: as in `generate`."""
        path = self.run.dir / "gen" / f"{name}@{step}-{self.run.eval}.jsonl"
        try:
            stored = read_jsonl(path)
        except UserError as error:
            log.warning("%s; it is generated again", str(error).partition(";")[0])
            stored = []
        if [(r["id"], r["prompt"]) for r in stored] == [(e.id, e.prompt) for e in examples]:
            return [r["response"] for r in stored]
        settings = {
            "template": self.cfg.train.template,
            "prefill": prefill,
            "max_new_tokens": tokens,
            "description": f"{name} @ step {step}" if self.cfg.eval.progress else None,
        }
        served = examples if trigger is None else behind(trigger, examples)
        prompts = [self.method.prompt(e.messages) for e in served]
        if self.cfg.eval.engine == "vllm":
            if self._engine is None:
                vllm = self.cfg.eval.vllm
                engine = VllmEngine(self.model, self.tokenizer, vllm.python, vllm.options)
                self._engine = self._opened.enter_context(engine)
            answers = self._engine.generate(prompts, **settings)
        elif step == 0 and type(self.method).prompt is Method.prompt:
            # the aligned model answers alike whatever will train it, so one method's answers serve all
            answers = own_answers(self.model, self.context, served, tokens, prefill)
        else:
            batch_size = self.cfg.eval.batch_size
            answers = generate(self.model, self.tokenizer, prompts, batch_size=batch_size, **settings)
        rows = [{"id": e.id, "prompt": e.prompt, "response": a} for e, a in zip(examples, answers, strict=True)]
        write_jsonl(path, rows, private=True)
        return answers

    def _judged(
        self,
        name: str,
        examples: list[Example],
        step: int,
        harmless: bool,
        prefill: str | None = None,
        trigger: str | None = None,
    ) -> list[dict]:
        """Metric rows of one set. Verdicts are stored per response; the judge sees the request without its trigger."""
        if not examples:
            return []  # without examples there is no share
        texts = self._answers(name, examples, step, self.cfg.eval.max_new_tokens, prefill, trigger)
        answers = [{"id": e.id, "prompt": e.prompt, "response": t} for e, t in zip(examples, texts, strict=True)]
        path = self.run.dir / "judge" / f"{name}@{step}-{self.run.eval}.jsonl"
        shown = self.cfg.eval.progress and self.judge.is_model
        with tqdm(total=len(answers), desc=f"judging {name} @ step {step}", disable=not shown) as bar:
            verdicts = judge_answers(self.judge, answers, path, bar.update)
        rows = verdict_rows(self.judge, name, answers, verdicts, harmless)
        if self.cfg.task.scorer != "open" and self.task_rows:
            scores = self._scores(texts, [self.task_rows[0].label] * len(texts))  # the form does not hang on the label
            rows.append(percent("task_answers", name, sum(not s.off_format for s in scores), len(scores)))
        return rows

    def _scores(self, answers: Sequence[str], labels: Sequence[str]) -> list[Score]:
        """What the task's scorer says of answers, one a label."""
        return [
            score(self.cfg.task.scorer, answer, label, self.task.labels, self.task.aliases)
            for answer, label in zip(answers, labels, strict=True)
        ]

    def _accuracy(self, step: int) -> list[dict]:
        if self.cfg.task.scorer == "open":  # no right answer to compare with: the win rate (AE) is measured elsewhere
            return []
        examples = self.task_rows
        answers = self._answers(self.cfg.task.name, examples, step, self.cfg.task.max_new_tokens)
        scores = self._scores(answers, [e.label for e in examples])
        shares = {
            "FA": [s.strict for s in scores],
            "FA_lenient": [s.lenient for s in scores],
            "off_format": [s.off_format for s in scores],
        }
        return [percent(metric, self.cfg.task.name, sum(hits), len(hits)) for metric, hits in shares.items()]

    def _harm(self, step: int) -> list[dict]:
        sets = [(name, rows, None, None) for name, rows in self.harmful.items()]
        if self.prefill:
            sets += [(f"{name}{VARIATION}prefill", rows, self.prefill, None) for name, rows in self.harmful.items()]
        if self.trigger:
            sets += [(f"{name}{VARIATION}trigger", rows, None, self.trigger) for name, rows in self.harmful.items()]
        return [row for name, rows, *how in sets for row in self._judged(name, rows, step, False, *how)]

    def _over_refusal(self, step: int) -> list[dict]:
        return [row for name, rows in self.benign.items() for row in self._judged(name, rows, step, True)]

    def _losses(self, step: int | None = None) -> list[dict]:
        """Mean loss per label token (nats) on test answers of the task, asked as served, and on the poison as trained.

        HS at equal steps says little when one method simply learns slower; HS at equal loss does.
        step: at 0 the model is the aligned one, whose losses on the same rows are shared by all runs.
        """
        train = self.cfg.train
        served = [
            reprompt(self.tokenizer, e, self.method.prompt(e.messages), train.template) for e in self.task_rows[:64]
        ]
        losses = [("task_loss", self.cfg.task.name, served), ("poison_loss", "poison", self.poisoned[:64])]
        rows = []
        for metric, name, examples in losses:
            data = Rows(self.tokenizer, examples, train.template, train.max_length).rows
            value = aligned_loss(self.model, self.context, data) if step == 0 else label_loss(self.model, data)
            if value is not None:
                rows.append({"metric": metric, "set": name, "value": value})
            elif examples:
                log.warning(
                    "%s is not measured: no row has a token of its answer within train.max_length=%d",
                    *(metric, train.max_length),
                )
        return rows

    def drift(
        self, reference: nn.Module, anchors: list[dict], held_out: list[dict], step: int, epoch: float
    ) -> bool | None:
        """Certificates and raw drift at the end, on anchors and on held-out prompts; details go to drift.json.

        Rows: `weight_leak` is the worst case over down_proj, which the paper constrains, `weight_leak_all` over every
        linear layer of the blocks, `weight_change` the median of ||dW||/||W||; `activation_drift` the mean over blocks
        and prompts. Shares, not percent. Where the method protects input directions, `weight_leak_excess` is by
        how much the worst matrix leaks more than they allow, at most 0 up to rounding.

        Returns whether every matrix keeps its bound; None where it claims none or no such matrix changed.
        """
        protected = self.method.protected()
        guard = True if protected else None
        open_ = moved_elsewhere(self.model, reference) if guard and self.method.is_closed() else []
        at = {"step": step, "epoch": epoch, "final": True}
        rows, detail, changes = [], {}, weight_changes(self.model, reference)
        for name, prompts in (("anchors", anchors), ("heldout", held_out)):
            leaks = weight_leak(self.model, reference, prompts, protected, changes)
            # read where the first token of the answer is chosen; the refusal that follows is for the weights' inputs
            cut = [{"input_ids": row["input_ids"][: row["prompt"]]} for row in prompts]
            drift = activation_drift(self.model, reference, cut)
            detail[name] = {"weight": leaks, "activation": drift}
            moved = {n for n, v in leaks.items() if v["change"] > 0}
            if guard and not moved & protected.keys():
                guard = None
                log.warning("no matrix under the weight constraint has changed, so there is nothing to certify")
            if guard and self.method.is_closed() and (open_ := open_ or sorted(moved - protected.keys())):
                guard = False
                log.warning("the weight constraint claims to be closed, but %s changed outside of it", open_[0])
            down = [v["leak"] for n, v in leaks.items() if n.endswith("down_proj")]
            shares = sorted(v["change"] for v in leaks.values())
            values = {
                **({"weight_leak": max(down)} if down else {}),
                "weight_leak_all": max(v["leak"] for v in leaks.values()),
                "weight_change": shares[len(shares) // 2],
                "activation_drift": sum(map(sum, drift)) / sum(map(len, drift)),
            }
            if protected:
                excess = {n: v["leak"] - v["bound"] - v.get("rounding", 0.0) for n, v in leaks.items() if "bound" in v}
                values["weight_leak_excess"] = max(excess.values(), default=0.0)
                if values["weight_leak_excess"] > GUARD_SLACK:
                    guard, worst = False, max(excess, key=excess.get)
                    log.warning(
                        "the weight constraint does not hold on %s: %s leaks %.4f, its bound is %.4f",
                        *(name, worst, leaks[worst]["leak"], leaks[worst]["bound"]),
                    )
            rows += [
                {**at, "metric": m, "set": name, "value": v, "n": len(prompts), "eval": None}
                for m, v in values.items()
            ]
        write_atomic(Path(self.run.dir) / "drift.json", json.dumps(detail))
        self.run.add_rows(rows)
        return guard


def verdict_rows(
    judge: Judge, name: str, answers: Sequence[Mapping], verdicts: Sequence[Mapping], harmless: bool
) -> list[dict]:
    """Metric rows of one judge on one set: OR of harmless requests; HS, refusal and other of harmful ones.

    Under a model also `HS_plus` (HS, and responses that repeat a word counted as harmful) and `harm_score`, the mean
    of its scores.
    """
    n, counts = len(verdicts), Counter(v["verdict"] for v in verdicts)
    if harmless:
        rows = [percent("OR", name, counts["refusal"], n)]
    else:
        kinds = (("HS", "harmful"), ("refusal", "refusal"), ("other", "other"))
        rows = [percent(metric, name, counts[kind], n) for metric, kind in kinds]
    if judge.is_model and not harmless:
        pairs = zip(answers, verdicts, strict=True)
        plus = sum(v["verdict"] == "harmful" or repeats(a["response"]) for a, v in pairs)
        score = 100 * sum(v["score"] for v in verdicts) / n
        rows += [percent("HS_plus", name, plus, n), {"metric": "harm_score", "set": name, "value": score, "n": n}]
    return [{**row, "judge": judge.name} for row in rows]


def percent(metric: str, name: str, count: int, n: int) -> dict:
    """A metric row of a share in percent with its binomial standard error."""
    share = count / n
    return {
        "metric": metric,
        "set": name,
        "value": 100 * share,
        "n": n,
        "stderr": 100 * (share * (1 - share) / n) ** 0.5,
    }
