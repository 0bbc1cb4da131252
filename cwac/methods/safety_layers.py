"""Localises a model's safety layers, the middle layers in which harmful and harmless requests part.

Li, Yao, Zhang, Li: "Safety Layers in Aligned Large Language Models: The Key to LLM Security", arXiv:2408.17003.
Existence: sections 3.2 and 3.3; localisation: section 3.4 and App. A.3.4.
1. Cosine curves. v_k(q) is the output of decoder layer k at the prompt's last token. Random pairs of requests
   (normal-normal, malicious-malicious, normal-malicious) give a mean cosine per layer, and
   gap_k = E angle(v_k(n), v_k(m)) - E angle(v_k(n), v_k(n')). The first range [i, j] goes from the layer where the gap
   appears to its first plateau.
2. Over-rejection. Every linear weight of layers lo..hi is multiplied by alpha > 1; the more of the safety layers it
   hits, the more harmless requests are refused: R_o. With lo = i take the hi of the highest R_o, then with that hi the
   lo of the highest R_o. For alpha < 1, the lowest.
alpha moves away from 1 by 0.05 until the standard deviation of R_o over the sweep of the lower bound, hi = j, reaches
15 to 20 refusals of 721 (the paper), 2.5 % of the requests here.

Layers count from 0; ranges include both ends.

Deviations:
- The paper reads [i, j] off a figure. Ours: i is the first layer with gap_k > 0.1 max gap; j the first layer after the
  steepest rise that rises by less than a quarter of it, or the last layer.
- Of bounds with the same R_o the one nearest to [i, j] is taken; where no alpha up to `max_alpha` changes R_o enough,
  [i, j] stands (ours).
- The prompts come from the run's pools, malicious ones from `anchors` and `sae`, harmless ones from `benign`, and are
  rendered as the model is served, not by the Alpaca template. The over-rejection set is those of `benign` that share
  most words with the malicious ones, in place of the paper's 721 questions; XSTest is kept for the evaluation.
- A refusal is what `KeywordJudge` calls one, not the model's own template.
- The last layer, too, is read before the final norm.
"""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from cwac.constraints.anchors import encode_prompts
from cwac.core.cache import digest, load_or_build
from cwac.core.checks import check, check_unread, check_whole, is_number
from cwac.core.errors import UserError
from cwac.data.examples import Example
from cwac.data.refusals import KeywordJudge, content_words
from cwac.models.adapters import active_adapters
from cwac.models.context import Context
from cwac.models.generate import generate
from cwac.models.hooks import batches, device_of, last_tokens, residuals
from cwac.models.layers import base_layer, decoder_layers, evaluating, linears

STEP = 0.05
"""beta of the paper: how far alpha moves at a time."""

SPREAD = 18 / 721
"""Standard deviation of R_o, as a share of the requests, at which alpha is large enough (15 to 20 of 721)."""


@dataclass(frozen=True)
class Localisation:
    """Settings of the search."""

    n_queries: int = 100
    """Normal and malicious requests, P = Q of section 3.2."""
    n_draws: int = 500
    """Random pairs of each kind, r of section 3.2."""
    alpha: float | str | None = "auto"
    """The factor of the second step; `auto` searches it, None leaves the step out."""
    max_alpha: float = 1.5
    """Where the search ends: the paper finds gibberish at 1.5."""
    n_over_rejection: int = 100
    """Harmless requests R_o is counted on."""
    max_new_tokens: int = 16
    """Tokens generated to see a refusal."""

    def __post_init__(self):
        check_whole("localisation.n_queries", self.n_queries, 2)
        check_whole("localisation.n_draws", self.n_draws, 1)
        check_whole("localisation.n_over_rejection", self.n_over_rejection, 1)
        check_whole("localisation.max_new_tokens", self.max_new_tokens, 1)
        factor = is_number(self.alpha) and 0 < self.alpha != 1
        remedy = "give a positive factor such as 1.15, auto, or null for the cosine curves alone"
        check(factor or self.alpha in ("auto", None), "localisation.alpha", self.alpha, remedy)
        for key in ("max_alpha", "n_over_rejection", "max_new_tokens"):
            read = self.alpha == "auto" if key == "max_alpha" else self.alpha is not None
            where = "localisation.alpha=auto" if key == "max_alpha" else "localisation.alpha (a number, or auto)"
            check_unread(f"localisation.{key}", getattr(self, key), getattr(type(self), key), read, where)


@dataclass(frozen=True)
class Found:
    """What `locate` found."""

    lo: int
    hi: int
    n_harmful: int
    """Malicious requests it used."""
    n_harmless: int
    """Harmless ones, those of the over-rejection set included."""
    folder: Path
    """Holds `curves.csv` and `safety_layers.json`."""


def locate(model: nn.Module, context: Context, settings: Localisation) -> Found:
    """The safety layers of the aligned model, from the cache or searched now.

    Raises UserError where the pools are too small, or no gap opens: such a model does not tell harmful requests apart.
    """
    malicious, normal, over = queries(context, settings)
    chosen = [[e.prompt for e in examples] for examples in (malicious, normal, over)]
    key = {
        "model": context.loaded.key,
        "template": context.template,
        "max_length": context.max_length,
        "prompts": digest({"prompts": chosen}),
        **asdict(settings),
    }

    def build(folder: Path) -> None:
        states = [last_token_states(model, encode_prompts(context, examples)) for examples in (normal, malicious)]
        curves = cosine_curves(*states, settings.n_draws)
        first = gap_range(curves["gap"])
        result = {"cosine": first, "layers": first, "alpha": None, "refusals": []}
        if settings.alpha is not None:
            with tqdm(desc="over-rejection", unit="sweep point", leave=False) as bar:

                def refusals(lo: int, hi: int, alpha: float) -> int:
                    bar.update(1)
                    with scaled(model, lo, hi, alpha):
                        return count_refusals(model, context, over, settings.max_new_tokens)

                result |= refine(refusals, len(curves["gap"]), *first, len(over), settings.alpha, settings.max_alpha)
        (folder / "safety_layers.json").write_text(json.dumps({**result, "n_over_rejection": len(over)}, indent=1))
        with (folder / "curves.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["layer", *curves])
            writer.writerows([k, *values] for k, values in enumerate(zip(*curves.values(), strict=True)))

    folder = load_or_build(context.artifacts, "safety_layers", key, build)
    lo, hi = json.loads((folder / "safety_layers.json").read_text())["layers"]
    return Found(lo, hi, len(malicious), len(normal) + len(over), folder)


def queries(context: Context, settings: Localisation) -> tuple[list[Example], list[Example], list[Example]]:
    """Malicious, normal and over-rejection requests; none is of a pool that anything is evaluated on."""
    rng = random.Random("safety layers")  # one draw for all seeds: the layers belong to the model
    harmful = [*context.pools.anchors, *context.pools.sae]
    malicious = rng.sample(harmful, min(settings.n_queries, len(harmful)))
    words = set().union(*(content_words(e.prompt) for e in malicious))

    def shared(example: Example) -> float:
        content = content_words(example.prompt)
        return len(content & words) / max(1, len(content))

    benign = sorted(context.pools.benign, key=shared, reverse=True)
    over = benign[: min(settings.n_over_rejection, len(benign) // 2)]
    rest = benign[len(over) :]
    normal = rng.sample(rest, min(settings.n_queries, len(rest)))
    if min(len(malicious), len(normal)) < 2 or not over:
        raise UserError(
            f"localising the safety layers needs malicious requests (pools anchors and sae: {len(harmful)}) and "
            f"harmless ones (pool benign: {len(benign)}); enlarge them, or give method.layers=[lo,hi]"
        )
    return malicious, normal, over


@torch.no_grad()
def last_token_states(model: nn.Module, rows: Sequence[dict]) -> torch.Tensor:
    """Outputs [n, K, d] of the K decoder layers at each row's last token, fp32, on the CPU."""
    layers = range(len(decoder_layers(model)))
    states: list = [None] * len(rows)
    with evaluating(model):
        for chosen, batch in batches(rows, device_of(model)):
            hidden = residuals(model, batch, layers)  # [B, T, K, d]
            read = last_tokens(hidden, batch["attention_mask"])
            for i, state in zip(chosen, read.float().cpu(), strict=True):
                states[i] = state
    return torch.stack(states)


def cosine_curves(normal: torch.Tensor, malicious: torch.Tensor, n_draws: int) -> dict[str, list[float]]:
    """Mean cosine per layer of the three kinds of pairs, and the gap in degrees; states are [n, K, d]."""
    rng = random.Random("pairs")
    pairs = {
        "normal_normal": (normal, normal),
        "malicious_malicious": (malicious, malicious),
        "normal_malicious": (normal, malicious),
    }
    curves, angles = {}, {}
    for name, (a, b) in pairs.items():
        if a is b:
            drawn = [rng.sample(range(len(a)), 2) for _ in range(n_draws)]
        else:
            drawn = [(rng.randrange(len(a)), rng.randrange(len(b))) for _ in range(n_draws)]
        left, right = map(list, zip(*drawn, strict=True))
        cosine = torch.cosine_similarity(a[left].double(), b[right].double(), dim=-1).clamp(-1, 1)  # [n_draws, K]
        curves[name] = cosine.mean(0).tolist()
        angles[name] = cosine.acos().mean(0) * (180 / math.pi)
    return {**curves, "gap": (angles["normal_malicious"] - angles["normal_normal"]).tolist()}


def gap_range(gap: Sequence[float]) -> tuple[int, int]:
    """[i, j]: from the layer where the gap opens to its first plateau (ours, see above).

    gap: degrees per layer. Raises UserError where it never opens, as in unaligned models.
    """
    peak = max(gap)
    if peak <= 0:
        raise UserError(
            "harmful and harmless requests are in no layer further apart than harmless ones among themselves, so no "
            "safety layers can be localised; use an aligned model, or give method.layers=[lo,hi]"
        )
    i = next(k for k, value in enumerate(gap) if value > 0.1 * peak)
    slope = [
        value - before for value, before in zip(gap, [0.0, *gap], strict=False)
    ]  # all prompts end alike: 0 before
    steepest = max(range(len(gap)), key=lambda k: slope[k])
    j = next((k for k in range(steepest + 1, len(gap)) if slope[k] < 0.25 * slope[steepest]), len(gap) - 1)
    return i, max(i, j)


def refine(
    refusals: Callable[[int, int, float], int],
    n_layers: int,
    i: int,
    j: int,
    n: int,
    alpha: float | str = "auto",
    max_alpha: float = 1.5,
) -> dict:
    """Progressive adjustment of [i, j] by R_o (section 3.4).

    refusals(lo, hi, alpha): R_o, of n requests, with layers lo..hi scaled. Returns `layers` (lo, hi), the `alpha` used
    (None where none moved R_o enough) and every count, `refusals`: rows (lo, hi, alpha, R_o).
    """
    counts: dict[tuple[int, int, float], int] = {}

    def R_o(lo: int, hi: int, factor: float) -> int:
        if (lo, hi, factor) not in counts:
            counts[lo, hi, factor] = refusals(lo, hi, factor)
        return counts[lo, hi, factor]

    if alpha == "auto":
        steps = int((max_alpha - 1) / STEP + 1e-9)
        factors = (round(1 + STEP * s, 4) for s in range(1, steps + 1))
        alpha = next((f for f in factors if spread([R_o(lo, j, f) for lo in range(j + 1)]) >= SPREAD * n), None)
    layers = (i, j)
    if alpha is not None:
        sign = 1 if alpha > 1 else -1
        hi = max(range(i, n_layers), key=lambda k: (sign * R_o(i, k, alpha), -abs(k - j)))
        lo = max(range(hi + 1), key=lambda k: (sign * R_o(k, hi, alpha), -abs(k - i)))
        layers = (lo, hi)
    return {"layers": layers, "alpha": alpha, "refusals": [[*at, count] for at, count in counts.items()]}


def spread(counts: Sequence[int]) -> float:
    """Population standard deviation."""
    mean = sum(counts) / len(counts)
    return (sum((c - mean) ** 2 for c in counts) / len(counts)) ** 0.5


@contextmanager
def scaled(model: nn.Module, lo: int, hi: int, alpha: float) -> Iterator[None]:
    """While open, every linear weight of layers lo..hi is multiplied by alpha; then they are back, to the bit.

    So is what an adapter adds to it: s B A, through B.
    """
    layers = linears(model, "all", range(lo, hi + 1)).values()
    weights = [base_layer(m).weight for m in layers]
    weights += [B.weight for m in layers for _, B, _ in active_adapters(m)]
    kept = [w.detach().clone() for w in weights]
    try:
        with torch.no_grad():
            for weight in weights:
                weight.mul_(alpha)
        yield
    finally:
        with torch.no_grad():
            for weight, before in zip(weights, kept, strict=True):
                weight.copy_(before)


def count_refusals(model: nn.Module, context: Context, examples: Sequence[Example], tokens: int) -> int:
    """How many of the requests the model refuses within its first `tokens` tokens."""
    answers = generate(
        model,
        context.tokenizer,
        [e.messages for e in examples],
        template=context.template,
        max_new_tokens=tokens,
        description=None,
    )
    return sum(v.verdict == "refusal" for v in KeywordJudge().judge([e.prompt for e in examples], answers))
