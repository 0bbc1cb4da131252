"""How cost grows: seconds against parameters, tokens, harmful prompts, rank, matrices and cells, and a 70B estimate.

python -m benchmarks.scaling [--seconds 240]                 measure; writes benchmarks/scaling.json
python -m benchmarks.scaling --page docs/scaling.md          fill the page's blocks from it, measuring nothing
python -m benchmarks.scaling --estimate                      print the estimate of Llama-2-70B on 8 GPUs

Random Llama-shaped models in fp32 are trained by the trainer of benchmarks/steps.py, CWAC set up with stand-ins. One
size is varied at a time. `Watch` times whole steps, and the hooks that hold the projection and L_safety's forward pass
are timed inside them. An exponent is the slope of log seconds on log size, by least squares over the points' medians,
with Student's 95 % interval over points: with four or five of them it is wide, and it knows nothing of curvature, for
which the slope between the two largest points stands beside it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cache
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from analysis.tables import markdown
from benchmarks import runner, steps, sweep
from benchmarks.large import Budget, Watch
from benchmarks.runner import Skipped, clock, entry
from cwac.core import config, paths
from cwac.methods.base import Sizes
from experiments import cost

OUT, H100 = Path("benchmarks/scaling.json"), Path("benchmarks/h100.json")
WARM_UP = 2
"""First steps of a trainer that are left out."""
KINDS = {
    "sft": ["method=sft"],
    "cwac": ["method=cwac"],
    # what trains is the same as in SFT, so that the number of matrices changes nothing but the projection
    "every matrix": ["method=cwac_closed", "method.weight.freeze_others=false"],
}
STEPS = {"sft": "step of sft", "cwac": "step of cwac", "every matrix": "step of cwac on every matrix"}
PARTS = {"cwac": "projection, down_proj", "every matrix": "projection, every matrix"}
SAFETY = "L_safety, forward"
CELL = "cell of a finished sweep"


@dataclass(frozen=True)
class Point:
    """Sizes of one measurement; the defaults are those that stay where another one is varied."""

    hidden: int = 256
    ffn: int = 688
    """43/16 of `hidden`, as in Llama-2-7B."""
    layers: int = 8
    tokens: int = 128
    """Of the one row of a batch; a quarter of them carry a label."""
    prompts: int = 4
    """Harmful ones, of 32 tokens."""
    rank: int = 64
    """Of V at down_proj; the other inputs, which are narrower, have as large a share of theirs."""
    constrained: int = 8
    """Blocks whose matrices are constrained: one down_proj each, or seven matrices."""


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    base: Point = Point()
    repeats: int = 5
    series: dict[str, tuple[dict, ...]] = field(
        default_factory=lambda: {
            "parameters": tuple({"hidden": h, "ffn": h * 43 // 16} for h in (256, 384, 640, 1024)),
            "tokens": tuple({"tokens": n} for n in (64, 128, 256, 512, 1024)),
            "prompts": tuple({"prompts": n} for n in (1, 4, 16, 64)),
            "rank": tuple({"rank": n} for n in (32, 64, 128, 256, 512)),
            "matrices": tuple({"constrained": n} for n in (1, 2, 4, 8)),
        }
    )
    cells: tuple[int, ...] = (4, 8, 16, 32)


SMALL = Plan()
TINY = Plan(
    Point(hidden=64, ffn=172, layers=4, tokens=16, rank=8, constrained=4),
    repeats=2,
    series={
        "parameters": tuple({"hidden": h, "ffn": h * 43 // 16} for h in (64, 128, 192)),
        "prompts": ({"prompts": 1}, {"prompts": 4}),
    },
    cells=(1,),
)
PLANS = {"small": SMALL, "tiny": TINY}
VARIED = {"prompts": ("cwac",), "rank": ("cwac", "every matrix"), "matrices": ("cwac", "every matrix")}
"""Kinds of step that depend on a series; every kind does on the others."""
SHARES = {"parameters": 3, "tokens": 2}
"""Parts of the time that a series has, whose greatest points take long; the others have one."""


def measure(plan: Plan, budget: Budget) -> Iterator[dict | Skipped]:
    """A row for each point, then for each exponent; a series has its part of the seconds left."""
    points: list[dict] = []
    series: dict[str, tuple[tuple, Callable]] = {
        name: (changes, lambda change, name=name: step_points(replace(plan.base, **change), name, plan.repeats))
        for name, changes in plan.series.items()
    }
    series["cells"] = (plan.cells, cell_point)
    for done, (name, (changes, act)) in enumerate(series.items()):
        ahead = sum(SHARES.get(later, 1) for later in [*series][done:])
        end = time.monotonic() + budget.left() * SHARES.get(name, 1) / ahead
        took, size, first = 0.0, 0.0, {}
        for change in changes:
            # sizes grow by 2 to 4 a point, and setting up, which does not, is part of what a point takes
            if time.monotonic() + 2.5 * took > end:
                yield Skipped(f"{name} beyond {size:g}", f"{max(0, end - time.monotonic()):.0f} s left")
                break
            began = time.monotonic()
            for kind, x, seconds in act(change):
                size = x
                first.setdefault(kind, (x, float(np.median(seconds))))
                points.append(point_row(name, kind, x, seconds, first[kind]))
                yield points[-1]
            took = time.monotonic() - began
    yield from fits(points)


def step_points(point: Point, series: str, repeats: int) -> Iterator[tuple[str, float, np.ndarray]]:
    """(what, size, seconds of each step) of every kind of step that depends on the series, and of its parts."""
    for kind in VARIED.get(series, KINDS):
        with tempfile.TemporaryDirectory() as folder:
            row = cost.Row(point.tokens, point.tokens // 4, Sizes(prompt_tokens=32, rank_share=point.rank / point.ffn))
            trainer = steps.trainer(configured(point, kind), row, WARM_UP + repeats, folder)
            x = {
                "parameters": sum(p.numel() for p in trainer.model.parameters()),
                "tokens": point.tokens,
                "prompts": point.prompts,
                "rank": point.rank,
                "matrices": point.constrained * (7 if kind == "every matrix" else 1),
            }[series]
            inside = {}
            if kind in PARTS:
                inside[PARTS[kind]] = timed_hook(trainer.method, "after_step")
            if kind == "cwac":
                inside[SAFETY] = timed_hook(trainer.method, "penalty")
            watch = Watch(lambda _step: None)
            trainer.add_callback(watch)
            trainer.train()
        yield STEPS[kind], x, np.array(watch.seconds[WARM_UP:])
        yield from ((name, x, np.array(seconds[WARM_UP:])) for name, seconds in inside.items())


def configured(point: Point, kind: str):
    """The run's configuration on a random Llama of these sizes."""
    heads = point.hidden // 64
    architecture = {
        "model_type": "llama",
        "vocab_size": 1024,
        "hidden_size": point.hidden,
        "intermediate_size": point.ffn,
        "num_hidden_layers": point.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
    }
    given = ["model=smollm2", "task=sst2", "train.per_device_train_batch_size=1", as_override(architecture)]
    if kind != "sft":
        given.append(f"method.activation.n_prompts={point.prompts}")
    if point.constrained < point.layers and kind != "sft":
        given.append(f"method.weight.layers={[*range(point.constrained)]}")
    return config.compose([*given, *KINDS[kind]])


def as_override(architecture: dict) -> str:
    return "model.shape={" + ", ".join(f"{key}: {value}" for key, value in architecture.items()) + "}"


def timed_hook(method, name: str) -> list[float]:
    """Where the seconds of every later call of a method's hook stand."""
    given, now, seconds = getattr(method, name), clock(), []

    def hook(*args):
        began = now()
        result = given(*args)
        seconds.append(now() - began)
        return result

    setattr(method, name, hook)
    return seconds


def cell_point(cells: int) -> Iterator[tuple[str, float, np.ndarray]]:
    (row,) = sweep.measure(cells, seconds=1.0)
    yield CELL, cells, np.array([row["ratio"]])


def point_row(series: str, kind: str, x: float, seconds: np.ndarray, first: tuple[float, float]) -> dict:
    """A row whose ratio is the growth since the smallest point of the series."""
    return entry(f"{kind}: {series} {x:g}", f"the same at {first[0]:g}", seconds / first[1]) | {
        "series": series,
        "kind": kind,
        "x": x,
        "seconds": round(float(np.median(seconds)), 6),
        "range": [round(float(seconds.min()), 6), round(float(seconds.max()), 6)],
        "repeats": len(seconds),
    }


def fits(points: list[dict]) -> Iterator[dict]:
    """A row for the exponent of each (kind, series) that has three points or more."""
    for series, kind in dict.fromkeys((p["series"], p["kind"]) for p in points):
        chosen = [p for p in points if (p["series"], p["kind"]) == (series, kind)]
        if len(chosen) < 3:
            continue
        exponent, half, last = fit([p["x"] for p in chosen], [p["seconds"] for p in chosen])
        yield entry(f"exponent of {kind} in {series}", "seconds ~ size^exponent", exponent) | {
            "spread": [round(exponent - half, 4), round(exponent + half, 4)],
            "series": series,
            "kind": kind,
            "points": len(chosen),
            "last": round(last, 4),
        }


def fit(x, seconds) -> tuple[float, float, float]:
    """Slope of log seconds on log x, half its 95 % t-interval over three or more points, slope of the last two."""
    x, y = np.log(x), np.log(seconds)
    line = stats.linregress(x, y)
    half = stats.t.ppf(0.975, len(x) - 2) * line.stderr
    return float(line.slope), float(half), float((y[-1] - y[-2]) / (x[-1] - x[-2]))


# --- the page --------------------------------------------------------------------------------------------
def measured_block(rows: list[dict]) -> str:
    """Exponents and points, with the machine that they are from."""
    points, slopes = [r for r in rows if "x" in r], [r for r in rows if "points" in r]
    if not points:
        return "Not measured yet: `python -m benchmarks.scaling`."
    series, kinds = (list(dict.fromkeys(p[key] for p in points)) for key in ("series", "kind"))
    found = {(r["kind"], r["series"]): r for r in slopes}
    cells = [
        [
            kind,
            *(
                "{ratio:.2f} [{spread[0]:.2f}, {spread[1]:.2f}] ({last:.2f})".format(**found[kind, s])
                if (kind, s) in found
                else "-"
                for s in series
            ),
        ]
        for kind in kinds
    ]
    few = ", ".join(
        f"{s} {max(r['points'] for r in slopes if r['series'] == s)}"
        for s in dict.fromkeys(r["series"] for r in slopes)
    )
    lines = [
        "{card}, one thread, fp32, torch {torch}; {date}, commit {commit}.".format(**points[0]),
        "",
        "**Exponents**, 95 % t-interval over points, in brackets the slope of the two largest. "
        f"Points: {few or 'too few for any'}.",
        "",
        markdown(["seconds of", *series], cells, width=1000),
        "",
        "**Points**: median seconds, least and greatest of the repeats in brackets.",
    ]
    for name in series:
        mine = [p for p in points if p["series"] == name]
        shown = [
            [
                p["kind"],
                f"{p['x']:,}",
                "{seconds:.4g} [{range[0]:.4g}, {range[1]:.4g}]".format(**p),
                str(p["repeats"]),
                f"{p['ratio']:.3g}",
            ]
            for p in sorted(mine, key=lambda p: kinds.index(p["kind"]))
        ]
        header = ["what", name, "seconds", "repeats", "growth since the first"]
        lines += ["", markdown(header, shown, width=1000)]
    return "\n".join(lines)


def h100_block(rows: list[dict]) -> str:
    """The same quantities on another machine, at 7B, and the exponents that its two ranks give."""
    shown, slopes = [], []
    for name in ("cwac (down_proj", "cwac_closed"):
        pair = []
        for share in ("0.093", "0.5"):
            step, alone = (at(rows, f"{what} {name}", f"rank {share}") for what in ("step of", "projection alone,"))
            pair.append(alone)
            label = f"{name.split(' (')[0]}, rank {re.search(r'[(]([0-9]+) of', alone['name'])[1]}"
            shown.append(
                [
                    label,
                    f"{step['rival_seconds']:.3f}",
                    f"{step['seconds']:.3f}",
                    f"{step['ratio']:.2f}",
                    f"{alone['seconds']:.3f}",
                ]
            )
        slope = np.log(pair[1]["seconds"] / pair[0]["seconds"]) / np.log(5504 / 1024)
        slopes.append(f"{name.split(' (')[0]} {slope:.2f}")
    header = ["4 x 512 tokens", "SFT step, s", "CWAC step, s", "ratio", "projection alone, s"]
    return "\n".join(
        [
            f"{rows[0]['card']}, bf16 with fp32 masters where projected, torch {rows[0]['torch']} "
            "(`benchmarks/h100.json`):",
            "",
            markdown(header, shown, width=1000),
            "",
            f"The projection's exponent in rank there, from these two ranks alone: {', '.join(slopes)}.",
        ]
    )


def at(rows: list[dict], *parts: str) -> dict:
    """The first row that is named so."""
    return next(row for row in rows if row["name"].startswith(parts[0]) and all(p in row["name"] for p in parts))


# --- 70B -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Target:
    """A model on several GPUs; Llama-2-70B's sizes are those of arXiv:2307.09288 and its config.json on the hub."""

    hidden: int = 8192
    ffn: int = 28672
    layers: int = 80
    heads: int = 64
    kv_heads: int = 8
    vocab: int = 32000
    gpus: int = 8
    gb: float = 80.0
    ranks: tuple[int, ...] = (1024, 14336)
    """The H100 row's, and half of d_ffn."""

    def override(self, layers: int) -> str:
        return as_override(
            {
                "model_type": "llama",
                "vocab_size": self.vocab,
                "hidden_size": self.hidden,
                "intermediate_size": self.ffn,
                "num_hidden_layers": layers,
                "num_attention_heads": self.heads,
                "num_key_value_heads": self.kv_heads,
            }
        )

    @property
    def block(self) -> int:
        """Parameters of one block: q and o, k and v, gate, up and down, two norms."""
        kv = self.hidden * self.kv_heads // self.heads
        return self.hidden * (2 * self.hidden + 2 * kv + 3 * self.ffn + 2)

    @property
    def root(self) -> int:
        """Parameters outside the blocks: embeddings, head, last norm."""
        return self.hidden * (2 * self.vocab + 1)

    @property
    def parameters(self) -> int:
        return self.layers * self.block + self.root


LLAMA70 = Target()
LLAMA7 = Target(4096, 11008, 32, 32, 32)
LORA = "model.lora={r: 8, alpha: 16, target_modules: all-linear}"
OPTIONS: dict[str, tuple[list[str], int, bool]] = {
    "full, AdamW": (["train.optim=adamw_torch_fused"], 4, True),
    "full, AdamW in 8 bits": ([], 4, True),
    "LoRA on bf16": ([LORA, "model.dtype=bfloat16"], 2, True),
    "LoRA on 4 bits, DDP": ([LORA, "model.dtype=bfloat16", "model.load_in_4bit=true"], 2, False),
}
"""Name -> (overrides of conf/train/large.yaml, bytes of a frozen or gathered parameter, whether FSDP2 shards it)."""
ROOM = 0.9
"""Share of a card that may be planned with: the CUDA context and fragmentation are not counted."""
NVLINK = 450e9
"""Bytes a second and direction between H100s (NVIDIA's data sheet: 900 GB/s both ways)."""


@cache
def counted(target: Target, *given: str) -> tuple[dict[str, float], float]:
    """Bytes by part and FLOPs of a step of 1 x 512 tokens, 128 of them labels, by experiments/cost.py.

    Every part grows by the same amount a block, so 8 and 16 blocks are estimated and the rest is added (all 80 on fake
    tensors, which take four times as long, give activations 0.05 GB larger with LoRA and the same otherwise). The heap
    that freed gradients leave is a CPU's matter and left out.
    """
    found = []
    for layers in (8, 16):
        cfg = config.compose(["model=llama2", "task=gsm8k", target.override(layers), *given])
        row = cost.Row(512, 128, Sizes(prompt_tokens=32, rank_share=target.ranks[0] / target.ffn))
        found.append(cost.estimate(cfg, cost.shape(cfg), row))
    few, more = found

    def whole(a: float, b: float) -> float:
        return b + (target.layers - 16) / 8 * (b - a)

    parts = {name: whole(few.parts.get(name, 0.0), more.parts.get(name, 0.0)) for name in few.parts | more.parts}
    parts.pop("heap that freed gradients leave", None)
    return parts, whole(few.flops, more.flops)


def memory(target: Target, option: str, rank: int, parts: dict[str, float]) -> dict[str, float]:
    """GB of one GPU by part, from the parts of the whole model, for V of that rank at every down_proj.

    FSDP2 divides weights, gradients, optimizer state and A's rows; V, the SAE and the activations are each rank's own.
    Beside its shards a GPU holds two gathered blocks and one block's gradients before they are reduced, and embeddings
    and head (they are the root, which stays gathered) with theirs.
    """
    given, width, sharded = OPTIONS[option]
    n = target.gpus if sharded else 1
    lora = LORA in given
    found = {"weights": 0.0, "gradients": 0.0, "optimizer": 0.0, "activations": 0.0, "SAE": 0.0}
    for part, size in parts.items():
        if part.startswith("weights ("):
            found["weights"] += size / n
        elif part in ("gradients", "optimizer state"):
            found[part.split()[0]] += size / n
        elif part == "SAE":
            found["SAE"] += size
        elif part != "V and A of the constraint":
            found["activations"] += size
    found["gathered"] = width * ((2 if lora else 3) * target.block + (1 if lora else 2) * target.root) * sharded
    found["V"] = 4.0 * target.layers * target.ffn * rank
    found["A"] = 4.0 * target.layers * (8 if lora else target.hidden) * rank / n  # the adapter's A has r = 8 rows
    found["total"] = sum(found.values())
    return {name: size / 1e9 for name, size in found.items()}


def growth(fitted: dict[tuple[str, str], dict], kind: str, series: str, ratio: float) -> np.ndarray:
    """[middle, low, high] of ratio^exponent; exponent 1 where none was measured."""
    row = fitted.get((kind, series), {"ratio": 1.0, "spread": [1.0, 1.0]})
    at_ends = sorted(ratio**e for e in row["spread"])
    return np.array([ratio ** row["ratio"], *at_ends])


def estimate_block(rows: list[dict], h100: list[dict], target: Target) -> str:
    """What the target needs: memory of a GPU by option, seconds of a step, subspaces and SAE."""
    shown, begin, room = [], [], ROOM * target.gb

    def fits(option: str, gpus: int, parts: dict[str, float]) -> bool:
        return memory(replace(target, gpus=gpus), option, target.ranks[0], parts)["total"] <= room

    def verdict(gb: float) -> str:
        return "yes" if gb <= room else "NO"

    for option, (given, *_) in OPTIONS.items():
        parts, _ = counted(target, "method=cwac", *given)
        for rank in target.ranks:
            found = memory(target, option, rank, parts)
            shown.append([option, rank, *(f"{size:.1f}" for size in found.values()), verdict(found["total"])])
        held = found["V"] + found["A"]
        most = max(0.0, (room - found["total"] + held) * rank / held)
        weights = sum(size for part, size in parts.items() if part.startswith("weights (")) / 1e9
        # fit_subspace keeps X [tokens, d_ffn] of every layer in fp32 where tokens < d_ffn
        tokens = max(0.0, (room - weights) * 1e9 / (4 * target.ffn * target.layers))
        enough = (n for n in range(8, 513, 8) if fits(option, n, parts))
        begin.append([option, str(next(enough)), f"{most:,.0f}", f"{weights:.0f}", verdict(weights), f"{tokens:,.0f}"])
    header = ["GB a GPU", "rank", *found, f"within {room:.0f}"]
    lines = [
        f"{target.parameters:,} parameters, {target.gpus} GPUs of {target.gb:g} GB, {ROOM:.0%} of which are planned "
        "with; a GPU takes 1 x 512 tokens, 128 of them labels. A GB is 10^9 bytes.",
        "",
        markdown(header, shown, key=2, width=1000),
        "",
        f"Each 1,000 of rank cost {4e-6 * target.layers * target.ffn:.1f} GB of V on every GPU. "
        "**Before the training** each process puts the whole model on its own GPU (`cwac/training/context.py`), since "
        "the SAE, the targets and V are fitted before it is sharded:",
        "",
        markdown(
            [
                "option",
                f"GPUs the training takes at rank {target.ranks[0]}",
                f"greatest rank on {target.gpus}",
                "whole weights, GB",
                "fit one GPU",
                "anchor tokens that fit_subspace can hold beside them",
            ],
            begin,
            width=1000,
        ),
        "",
        *times(rows, h100, target),
    ]
    return "\n".join(lines)


def times(rows: list[dict], h100: list[dict], target: Target) -> list[str]:
    """Lines on the seconds of a full-parameter step, of the subspaces and of the SAE."""
    fitted = {(r["kind"], r["series"]): r for r in rows if "points" in r}
    small, n = LLAMA7, target.gpus
    step = at(h100, "step of cwac (down_proj", "rank 0.093")["rival_seconds"]
    alone = at(h100, "projection alone, cwac (down_proj", "rank 0.093")["seconds"]
    safety = at(h100, "L_safety alone", "cwac (down_proj")["seconds"]
    flops = counted(target, "method=sft")[1] / counted(small, "method=sft")[1]
    size = target.parameters / small.parameters
    matrix = target.hidden * target.ffn / (small.hidden * small.ffn)
    count = target.layers / small.layers
    # each GPU has its own 4 x 512 tokens, projects its own rows, and takes one of the four harmful prompts
    sft = step * growth(fitted, STEPS["sft"], "parameters", size)
    tables = [["SFT step", step, sft, step * flops]]
    penalty = safety * growth(fitted, SAFETY, "parameters", size) * growth(fitted, SAFETY, "prompts", 1 / 4)
    tables.append(["L_safety, with its backward pass", safety, penalty, safety * flops / 4])
    for rank in target.ranks:
        name, ratio = PARTS["cwac"], rank / 1024
        scaled = growth(fitted, name, "parameters", matrix) * growth(fitted, name, "matrices", count)
        scaled = alone * scaled * growth(fitted, name, "rank", ratio) / n
        exact = alone * matrix * count * ratio / n
        tables.append([f"projection, rank {rank}", alone if ratio == 1 else None, scaled, exact])
        whole = sft + penalty + scaled
        tables.append([f"CWAC step, rank {rank}", None, whole, step * flops + safety * flops / 4 + exact])
    shown = [
        [name, "-" if was is None else f"{was:.3f}", "{:.2f} [{:.2f}, {:.2f}]".format(*grown), f"{exact:.2f}"]
        for name, was, grown, exact in tables
    ]
    sent = 3 * 4 * target.parameters * (n - 1) / n / NVLINK
    corrected = at(h100, "constraint of one matrix, correction in TF32", "rank 1024")["ratio"]
    one = at(h100, "subspaces of 32 layers by fit_subspace")["seconds"]
    spaces = target.layers * one * target.ffn / small.ffn
    sae = {way: at(h100, "SAE training, 1e+08 tokens (extrapolated)", way)["ratio"] for way in (", fp32,", ", TF32,")}
    read, host = at(h100, "residuals of 1e+08 tokens")["ratio"], at(h100, "1e+08 tokens drawn from the host")["ratio"]
    wide, slots = (target.hidden / small.hidden) ** 2, (target.layers // 2 + 1) / (small.layers // 2 + 1)
    measured = "the exponents above" if fitted else "exponents of 1, since none is measured yet"
    return [
        f"**Seconds of a full-parameter step**, extrapolated from one H100 at 7B by {measured} (in brackets both "
        "ends of all their intervals), beside the same by counted FLOPs; each GPU with 4 x 512 tokens of its own:",
        "",
        markdown(
            ["seconds", "H100, 7B", f"{target.parameters / 1e9:.0f}B by exponents", "by FLOPs"], shown, width=1000
        ),
        "",
        f"- Not in it: gathering weights twice and reducing gradients in fp32, {sent:.1f} s at NVLink's nominal "
        "450 GB/s if nothing overlaps, half in bf16.",
        f"- The H100's projection was timed in fp32; with its correction in TF32, as it now runs, one matrix takes "
        f"{corrected:.2f} of that.",
        f"- Subspaces, {target.layers} layers of d {target.ffn}, 8,000 tokens: {spaces:.0f} s at most on one GPU, by "
        f"the H100's {one:.2f} s a layer times d (the decomposition is of tokens x tokens and stays), if it had room.",
        f"- SAE, 100 M tokens, d {target.hidden}, M {8 * target.hidden}: {sae[', fp32,'] * wide:.1f} h in fp32, "
        f"{sae[', TF32,'] * wide:.1f} h in TF32 (d M grows by {wide:g}); reading the model {read * flops:.1f} h in "
        f"bf16 by FLOPs; drawing from the host's memory {host * slots * target.hidden / small.hidden:.0f} h "
        f"({target.layers // 2 + 1} slots for {small.layers // 2 + 1}, twice as wide).",
    ]


def fill(page: Path, blocks: dict[str, str]) -> None:
    """Replace what stands between `<!-- scaling:NAME -->` and `<!-- /scaling:NAME -->`."""
    text = page.read_text(encoding="utf-8")
    for name, block in blocks.items():
        pattern = re.compile(rf"(<!-- scaling:{name} -->\n).*?(<!-- /scaling:{name} -->)", re.S)
        text = pattern.sub(lambda found, block=block: f"{found[1]}{block}\n{found[2]}", text)
    page.write_text(text, encoding="utf-8")


def machine() -> dict:
    """What every row carries."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    if card == "CPU" and (info := Path("/proc/cpuinfo")).exists():
        named = re.search(r"model name\s*: (.*)", info.read_text())
        card = f"CPU, {named[1].strip()}" if named else card
    asked = ["git", "rev-parse", "--short=10", "HEAD"]
    commit = subprocess.run(asked, cwd=paths.PACKAGE.parent, capture_output=True, text=True).stdout.strip()
    return {"card": card, "torch": torch.__version__, "date": str(date.today()), "commit": commit or "unknown"}


def run(plan: Plan, seconds: float, out: Path) -> int:
    """Measure, write each row at once into a new file, print the table; the exit status of `runner.report`."""
    budget, rows, skipped, about = Budget(seconds), [], [], machine()
    out.unlink(missing_ok=True)  # rows of another run would be fitted together with these
    for item in measure(plan, budget):
        if isinstance(item, Skipped):
            skipped.append(item)
            continue
        rows.append(item | about)
        runner.save([rows[-1]], out)
        print(f"{item['name']}: {item.get('seconds', item['ratio'])}", file=sys.stderr, flush=True)
    return runner.report(rows, skipped)


@config.command
def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, 2 for bad input."""
    parser = config.Parser(prog="python -m benchmarks.scaling", description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=PLANS, default="small", help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=240.0, help="of the whole measurement (%(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="written; read by the other two (%(default)s)")
    parser.add_argument("--page", type=Path, help="fill this page's blocks instead of measuring")
    parser.add_argument("--estimate", action="store_true", help="print the estimate of 70B instead of measuring")
    args = parser.parse_args(argv)
    if not (args.page or args.estimate):
        return runner.quietly(lambda: run(PLANS[args.shape], args.seconds, args.out))
    rows, h100 = (json.loads(p.read_text()) if p.exists() else [] for p in (args.out, H100))
    estimate = runner.quietly(lambda: estimate_block(rows, h100, LLAMA70))
    if args.estimate:
        print(estimate)
    if args.page:
        fill(args.page, {"measured": measured_block(rows), "h100": h100_block(h100), "llama70": estimate})
    return 0


if __name__ == "__main__":
    sys.exit(main())
