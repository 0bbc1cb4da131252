"""Fits the routed autoencoder on a model's residuals, and measures it on held-out text.

Recipe: RouteSAE (arXiv:2503.08200), AuxK from Gao et al. (arXiv:2406.04093); deviations: see the package.
"""

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from types import NoneType
from typing import Any, get_args

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cwac.constraints.sae.autoencoder import RoutedSAE, middle_block_hash, tokens_at_once
from cwac.constraints.sae.pretrained import PretrainedSAE
from cwac.core import renamed
from cwac.core.checks import is_number, require_number
from cwac.core.errors import UserError
from cwac.core.identity import text_content
from cwac.models.hooks import (
    Row,
    batches,
    bos_ids,
    device_of,
    keep_mask,
    layers_of,
    normalize,
    packs,
    residuals,
    shared_prefix,
)
from cwac.models.layers import evaluating

log = logging.getLogger(__name__)


NUMBERS = {
    "m": (1, None, True),
    "k": (1, None, True),
    "tokens": (1, None, True),
    "cached_tokens": (1, None, True),
    "batch": (1, None, True),
    "harmful_share": (0, 1, False),
    "lr": (0, None, False),
    "warmup": (0, 1, False),
    "decay": (0, 1, False),
    "auxk": (0, None, False),
    "dead_after": (1, None, True),
    "renorm_every": (1, None, True),
    "max_repeats": (0, None, False),
    "buffer_gib": (0, None, False),
}
"""Field of `SAEConfig` -> lowest, highest, whole number or not."""


@dataclass
class SAEConfig:
    """Settings of `fit_sae`; k and the harmful share are the paper's, layers, m and router RouteSAE's."""

    layers: str | list[int] = "auto"
    """Decoder blocks whose output is read, counted from 0; `auto` for the middle half (RouteSAE)."""
    m: int | None = None
    """Latents; None is 8d (RouteSAE)."""
    k: int | None = None
    """Active latents; None is 64 (paper), d // 8 below d = 512 (ours: 64 of 128 would not be sparse)."""
    router: str = "hard"
    """`hard` (RouteSAE), `soft`, `uniform`, or `layer:l` with l one of `layers`; see `RoutedSAE`."""
    fallback: bool = True
    """Refit with `uniform` if the hard router collapses: it then reads > 70 % of the harmful prompts' last
    tokens at one layer, or has < half of the greatest usage entropy (ours: it seeks what is easy to rebuild)."""
    tokens: int = 400_000
    """Tokens the SAE is trained on, repeats included (the paper: about 100 M)."""
    cached_tokens: int | None = None
    """Distinct tokens run through the model, once; None streams anew what `buffer_gib` cannot hold."""
    batch: int = 1024
    harmful_share: float = 0.7
    """Share of harmful tokens in each batch (section 5.1 of the paper)."""
    lr: float | None = None
    """Adam's; None is 2e-3 up to 1k steps, 5e-4 (RouteSAE) from 10k, log-linear between (ours)."""
    warmup: float = 0.05
    decay: float = 0.2
    """Share of the steps at the end in which the rate falls linearly to 0 (RouteSAE)."""
    clip: float | None = 1.0
    auxk: float = 1 / 32
    """Weight of the AuxK loss; 0 is off."""
    dead_after: int | None = None
    """Tokens without firing after which a latent is dead; None is 1 % of `tokens`, at least 16 batches."""
    center: bool = True
    """Start b_pre at the data mean; otherwise at 0, with torch's default encoder scale (RouteSAE)."""
    renorm_every: int = 1
    """Steps between renormalisations of the decoder rows; at 1 their gradient is projected as well."""
    schedule: str = "ours"
    """How the rate warms up and falls and when decoder rows are renormalised: `ours`, or `routesae` as in the official
    code (see `rate`): its first step has a rate of 0, and the first renormalisation comes after it."""
    corpus: str | None = None
    """General text in place of the pool `benign`, harmless instructions with answers (ours; the paper has
    OpenWebText2): a file `.txt` or `.jsonl`, a folder, or an id of the hub, streamed (`cwac.data.web_text`)."""
    corpus_text: str = "text"
    """The corpus's column that holds the text."""
    corpus_config: str | None = None
    """The configuration of a corpus of the hub."""
    max_repeats: float | None = 10.0
    """A warning is given where a corpus's distinct tokens are trained on more often than this; None accepts it."""
    buffer_gib: float = 2.0
    backend: str = "auto"
    seed: int = 0
    pretrained: str | list[str] | None = None
    """Autoencoders that others have trained, instead of fitting one (`cwac.constraints.sae.pretrained.find`): a
    folder, a hub id, or sae-lens' <release>/<id>; a list for several layers. Of the other fields only `layers` is read
    then."""

    def __post_init__(self) -> None:
        several = isinstance(self.pretrained, list | tuple)
        names = self.pretrained if several else [self.pretrained]
        named = bool(names) and all(isinstance(name, str) and name for name in names)
        if self.pretrained is not None and not named:
            raise UserError(
                f"model.sae.pretrained={self.pretrained}: give a folder, a hub id, a list of these, or null to fit one"
            )
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name in NUMBERS and not (value is None and NoneType in get_args(each.type)):
                low, high, whole = NUMBERS[each.name]
                require_number(f"model.sae.{each.name}", value, low, high, whole=whole)
                if whole:
                    setattr(self, each.name, int(value))  # 256.0 is a whole number, and no size of a tensor
        listed = isinstance(self.layers, list | tuple) and all(type(i) is int and i >= 0 for i in self.layers)
        if self.layers != "auto" and not (listed and self.layers):
            raise UserError(f"model.sae.layers={self.layers}: give auto, or a list of decoder blocks such as [1,2]")
        for key in ("fallback", "center"):
            if not isinstance(getattr(self, key), bool):
                raise UserError(f"model.sae.{key}={getattr(self, key)}: give true or false")
        for key in ("router", "corpus", "corpus_text", "corpus_config"):
            value = getattr(self, key)
            if not isinstance(value, str) and not (value is None and key in ("corpus", "corpus_config")):
                raise UserError(f"model.sae.{key}={value}: give a text, or leave it out")
        if self.clip is not None and not (is_number(self.clip) and self.clip >= 0):
            raise UserError(f"model.sae.clip={self.clip}: give a norm of at least 0, or null to clip nothing")
        if self.tokens < self.batch:
            raise UserError(
                f"model.sae.tokens={self.tokens}: must be at least one batch, model.sae.batch={self.batch}"
            )
        if self.backend not in ("auto", "csr", "dense"):
            raise UserError(f"model.sae.backend={self.backend!r}: use auto, csr or dense")
        if self.schedule not in ("ours", "routesae"):
            raise UserError(f"model.sae.schedule={self.schedule!r}: use ours or routesae")
        if self.schedule == "routesae" and self.warmup + self.decay >= 1:
            raise UserError(
                f"model.sae.warmup={self.warmup} and model.sae.decay={self.decay}: model.sae.schedule=routesae "
                "divides by the share of the steps between them; give shares with a sum below 1"
            )
        for key in ("corpus_text", "corpus_config"):
            if self.corpus is None and getattr(self, key) != getattr(type(self), key):
                raise UserError(f"model.sae.{key}={getattr(self, key)}: only model.sae.corpus has one; give that too")

    def key(self) -> dict[str, Any]:
        """What identifies an autoencoder with these settings as an artifact; a pretrained one is none."""
        settings = {k: v for k, v in asdict(self).items() if k not in ("max_repeats", "pretrained")}
        # at their defaults these stay out of the key: artifacts that are older than they are still found
        for name in ("schedule", "corpus", "corpus_text", "corpus_config"):
            if settings[name] == getattr(type(self), name):
                del settings[name]
        if self.corpus is not None:
            settings["corpus"] = text_content(self.corpus)
        return renamed.hashed_group("model.sae", settings)

    def width(self, d: int) -> int:
        """Latents m for residuals of dimension d."""
        return self.m or 8 * d

    def latents(self, d: int) -> int:
        """Active latents k for residuals of dimension d."""
        return self.k or (64 if d >= 512 else max(4, d // 8))

    def learning_rate(self, steps: int) -> float:
        if self.lr is not None:
            return self.lr
        share = min(1.0, max(0.0, math.log10(max(1, steps) / 1000)))
        return 2e-3 * (5e-4 / 2e-3) ** share


def rate(step: int, steps: int, cfg: SAEConfig) -> float:
    """The learning rate at a step counted from 0, as a share of its greatest value.

    `ours`: (step + 1) / W during the W warm-up steps, 1, and (steps - step) / D during the last D. `routesae`, from
    `LinearWarmupLR` in utils.py of swei2001/RouteSAEs at 9a5fd28, with W = steps / 20 and D = steps / 5: step / W, 1,
    and then (steps - W - step) / (steps - W - D), which begins at about 1/5 and is 0 for the last W steps.
    """
    if cfg.schedule == "ours":
        warm, tail = max(1, int(cfg.warmup * steps)), max(1, int(cfg.decay * steps))
        return min(1.0, (step + 1) / warm, (steps - step) / tail if cfg.decay else 1.0)
    warm, tail = int(cfg.warmup * steps), int(cfg.decay * steps)
    if step < warm:
        return step / warm
    if step < steps - tail:
        return 1.0
    return max(0.0, (steps - warm - step) / (steps - warm - tail))


def renormalises(step: int, cfg: SAEConfig) -> bool:
    """Whether decoder rows are scaled to length 1 after this step, counted from 0."""
    return (step + (cfg.schedule == "ours")) % cfg.renorm_every == 0


class TokenBuffer:
    """Shuffled normalised residuals of one corpus, [L_r, d] in fp16 each, in draws of any size.

    A corpus that fits `capacity` tokens goes through the model once and is drawn in fresh
    permutations; so is the first part of a larger one if `once`. Otherwise it is streamed, the buffer
    being refilled whenever half of it is used up. LayerNorm bounds |x| by sqrt(d), so fp16 is safe.
    """

    def __init__(self, model, rows: Sequence[Row], layers, capacity: int, once: bool, generator, label: str):
        if not rows:
            raise UserError(f"the SAE's {label} corpus is empty: give it rows, or change sae.harmful_share")
        # of web text, whose rows are no list, a part tells what all share
        self.skip = shared_prefix(rows if isinstance(rows, list) else rows[:4096])
        self.model, self.rows, self.layers = model, rows, layers
        self.capacity, self.generator, self.label = capacity, generator, label
        self.seconds, self.tokens_read, self.whole = 0.0, 0, False
        self._stream, self._left, self._at = self._activations(), [], 0
        self._fill()
        self.whole = self.whole or once

    def _activations(self) -> Iterator[Tensor]:
        device, bos = device_of(self.model), bos_ids(self.model)
        order = torch.randperm(len(self.rows), generator=self.generator).tolist()
        for start in range(0, len(order), 256):  # groups in random order, by length within a group
            for _, batch in batches([self.rows[i] for i in order[start : start + 256]], device):
                with torch.no_grad(), evaluating(self.model):
                    r = residuals(self.model, batch, self.layers)
                keep = keep_mask(batch["input_ids"], batch["attention_mask"], r, bos, self.skip)
                yield normalize(r[keep])[0].half().cpu()

    def _fill(self) -> None:
        began, first = time.perf_counter(), self.tokens_read == 0
        parts, size = self._left, sum(len(p) for p in self._left)
        with tqdm(total=self.capacity, initial=size, desc=f"activations ({self.label})", unit="tok") as bar:
            while size < self.capacity:
                part = next(self._stream, None)
                if part is None:
                    if not self.tokens_read:
                        raise UserError(f"the SAE's {self.label} corpus has no token beyond the first of each row")
                    self.whole = first
                    if first:
                        break
                    self._stream = self._activations()
                    continue
                parts.append(part)
                size += len(part)
                self.tokens_read += len(part)
                bar.update(len(part))
        self._tokens = torch.cat(parts)
        self._order, self._at = torch.randperm(len(self._tokens), generator=self.generator), 0
        self.seconds += time.perf_counter() - began

    def draw(self, n: int) -> Tensor:
        """The next n tokens, [n, L_r, d] fp32."""
        parts: list[Tensor] = []
        while n:
            if not self.whole and 2 * (len(self._order) - self._at) < self.capacity:
                self._left = [self._tokens[self._order[self._at :]]]
                self._fill()
            if self._at == len(self._order):
                self._order, self._at = torch.randperm(len(self._tokens), generator=self.generator), 0
            take = self._order[self._at : self._at + n]
            parts.append(self._tokens[take])
            self._at += len(take)
            n -= len(take)
        return torch.cat(parts).float()


def train_sae(
    sae: RoutedSAE, draw: Callable[[int], Tensor], cfg: SAEConfig, device: torch.device | None = None
) -> dict[str, float]:
    """Train `sae` in place on draws x [n, L_r, d]; returns loss, FVU, dead share and seconds.

    Loss: mean over tokens of |u - u_hat|^2 / |u|^2 (RouteSAE) + auxk * AuxK. Deterministic in cfg.seed on CPU.
    """
    device = device or torch.device("cpu")
    generator = torch.Generator().manual_seed(cfg.seed)
    steps = max(1, cfg.tokens // cfg.batch)
    dead_after = cfg.dead_after or max(cfg.tokens // 100, 16 * cfg.batch)
    sae.to(device).requires_grad_(True)
    sae.initialise_router_(generator)
    with torch.no_grad():
        first = sae.training_input(draw(max(cfg.batch, 8192)).to(device), generator)
        # without centring the recipe is RouteSAE's, whose encoder rows have torch's default norm
        sae.initialise_(first, generator, center=cfg.center, scale=None if cfg.center else 3**-0.5)
    optimizer = torch.optim.Adam(sae.parameters(), lr=cfg.learning_rate(steps), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps, cfg))
    idle = torch.zeros(sae.m, dtype=torch.long, device=device)  # tokens since each latent last fired
    began, losses, fvus = time.perf_counter(), [], []
    with tqdm(range(steps), desc="sparse autoencoder", unit="step") as bar:
        for step in bar:
            u = sae.training_input(draw(cfg.batch).to(device), generator)
            u_hat, values, indices = sae(u, cfg.backend)
            error = u - u_hat
            loss = (error.pow(2).sum(-1) / u.pow(2).sum(-1)).mean()
            idle += len(u)
            idle[indices[values > 0]] = 0
            dead = (idle >= dead_after).nonzero().flatten()
            total = loss
            if cfg.auxk and len(dead) > 0.01 * sae.m:
                total = loss + cfg.auxk * auxiliary_loss(sae, u.detach(), error.detach(), dead)
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            if cfg.renorm_every == 1:  # keep the step tangent to the unit sphere
                rows = sae.w_dec.detach()
                along = torch.linalg.vecdot(sae.w_dec.grad, rows).unsqueeze(1)
                sae.w_dec.grad.addcmul_(along, rows, value=-1)
            if cfg.clip:  # a factor of one is not multiplied in: it would pass over every gradient
                norm = nn.utils.get_total_norm([p.grad for p in sae.parameters() if p.grad is not None])
                if norm + 1e-6 > cfg.clip:
                    nn.utils.clip_grads_with_norm_(sae.parameters(), cfg.clip, norm)
            optimizer.step()
            schedule.step()
            if renormalises(step, cfg) or step + 1 == steps:
                sae.unit_rows_()
            losses.append(loss.item())
            with torch.no_grad():
                fvus.append((error.pow(2).sum() / (u - u.mean(0)).pow(2).sum()).item())
            if step % 20 == 0:
                bar.set_postfix(fvu=f"{fvus[-1]:.3f}", dead=f"{len(dead) / sae.m:.2f}")
    sae.requires_grad_(False)
    last = max(1, steps // 20)
    return {
        "steps": steps,
        "loss": sum(losses[-last:]) / last,
        "train_fvu": sum(fvus[-last:]) / last,
        "train_dead_share": len(dead) / sae.m,
        "seconds_sae": time.perf_counter() - began,
    }


def auxiliary_loss(sae: RoutedSAE, u: Tensor, error: Tensor, dead: Tensor) -> Tensor:
    """AuxK: how much of the residual error [N, d] the best d/2 dead latents leave, relative to its size.

    u and error come detached and b_pre stays fixed, so only the dead latents' own rows get a gradient.
    """
    pre = nn.functional.linear(u - sae.b_pre.detach(), sae.w_enc[dead], sae.b_enc[dead])
    values, indices = pre.topk(min(sae.d // 2, len(dead)), dim=-1)
    z = torch.zeros_like(pre).scatter(1, indices, values.relu())
    return (error - z @ sae.w_dec[dead]).pow(2).sum() / error.pow(2).sum()


def fit_sae(
    model: nn.Module, rows: Sequence[Row], harmful_rows: Sequence[Row] | None = None, cfg: SAEConfig | None = None
) -> tuple[RoutedSAE, dict[str, Any]]:
    """Fit an SAE on the residuals of the frozen `model`; returns it frozen, with a report.

    rows: encoded general text, `{"input_ids": [...]}`; with `harmful_rows`, each batch takes
    cfg.harmful_share of its tokens from those (the paper's 30/70 mix), else `rows` are used as they are.
    Raises UserError for an empty corpus or layers outside the model.
    """
    cfg = cfg or SAEConfig()
    layers = layers_of(model, cfg.layers)
    if not rows and not harmful_rows:
        raise UserError("the SAE has no text to be fitted on: give it general rows or harmful prompts")
    with torch.no_grad():
        d = residuals(model, next(batches((rows or harmful_rows)[:1], device_of(model)))[1], layers).shape[-1]
    k = cfg.latents(d)
    info = {"model_fingerprint": middle_block_hash(model), "config": cfg.key()}
    sae = RoutedSAE(d, cfg.width(d), k, layers, cfg.router, info)
    generator = torch.Generator().manual_seed(cfg.seed)
    device = device_of(model)
    share = 0.0 if harmful_rows is None else cfg.harmful_share
    memory = int(cfg.buffer_gib * 2**30 / (2 * len(layers) * d))

    def buffer(corpus: Sequence[Row], part: float, label: str) -> TokenBuffer | None:
        if not part:
            return None
        wanted = part * (cfg.tokens if cfg.cached_tokens is None else min(cfg.cached_tokens, cfg.tokens))
        capacity = max(cfg.batch, int(min(part * memory, wanted)))
        return TokenBuffer(model, corpus, layers, capacity, cfg.cached_tokens is not None, generator, label)

    for corpus, part, label in ((rows, 1 - share, "general"), (harmful_rows or [], share, "harmful")):
        warn_of_repeats(corpus, part, label, cfg)
    general = buffer(rows, 1 - share, "general")
    harmful = buffer(harmful_rows or [], share, "harmful")

    def draw(n: int) -> Tensor:
        from_harmful = round(share * n)
        sources = ((general, n - from_harmful), (harmful, from_harmful))
        return torch.cat([source.draw(count) for source, count in sources if source is not None and count])

    report: dict[str, Any] = train_sae(sae, draw, cfg, device)
    usage = last_usage(model, sae, (harmful_rows or rows)[:512])
    report["last_usage"] = dict(zip(layers, usage.tolist(), strict=True))
    collapsed = len(layers) > 1 and (usage.max().item() > 0.7 or _entropy(usage) < 0.5)
    report["router_collapsed"] = sae.router is not None and collapsed
    if report["router_collapsed"] and cfg.fallback:
        spent = report["seconds_sae"]
        sae = RoutedSAE(d, sae.m, k, layers, "uniform", {**info, "router_fallback": usage.tolist()})
        report |= train_sae(sae, draw, cfg, device)
        report["seconds_sae"] += spent
    report["router"] = sae.router_mode
    report |= {"d": d, "m": sae.m, "k": k, "layers": layers, "tokens": report["steps"] * cfg.batch}
    for label, source, part in (("general", general, 1 - share), ("harmful", harmful, share)):
        if source is not None:
            report[f"tokens_read_{label}"] = source.tokens_read
            # times each token read was trained on; above 20 for harmful prompts deserves a second look
            report[f"epochs_{label}"] = part * report["tokens"] / source.tokens_read
    report["seconds_model"] = sum(source.seconds for source in (general, harmful) if source is not None)
    sae.info["fit"] = {k: v for k, v in report.items() if not k.startswith("seconds") and k != "last_usage"}
    return sae, report


def repeats(rows: Sequence[Row], part: float, cfg: SAEConfig) -> float:
    """How often each distinct token of a corpus is trained on that gives the share `part` of all tokens."""
    whole = isinstance(rows, list)
    skip = shared_prefix(rows if whole else rows[:4096])
    length = sum(len(row["input_ids"]) for row in rows) if whole else len(rows.tokens)
    distinct = max(1, length - skip * len(rows))
    if cfg.cached_tokens is not None:
        distinct = min(distinct, max(1, int(part * cfg.cached_tokens)))
    return part * cfg.tokens / distinct


def warn_of_repeats(rows: Sequence[Row], part: float, label: str, cfg: SAEConfig) -> None:
    """Say, before hours of fitting, that a corpus is repeated more than `max_repeats` times."""
    if cfg.max_repeats is None or not part or not rows or (times := repeats(rows, part, cfg)) <= cfg.max_repeats:
        return
    more = "more prompts (pools.*)" if label == "harmful" else "web text (model.sae.corpus=<hub id or file>)"
    log.warning(
        "the autoencoder sees every distinct token of its %s corpus %.0f times (model.sae.tokens=%d): give it %s or "
        "fewer tokens; model.sae.max_repeats=null accepts it",
        *(label, times, cfg.tokens, more),
    )


@torch.no_grad()
def last_usage(model: nn.Module, sae: RoutedSAE | PretrainedSAE, rows: Sequence[Row]) -> Tensor:
    """Share of the rows' last tokens read at each layer, [L_r], on the CPU; only a router that chooses has to run."""
    if isinstance(sae, PretrainedSAE) or sae.router is None:
        used = torch.zeros(len(sae.layers)).index_fill(0, torch.tensor(sae.readable), 1.0)
        return used / used.sum()
    used = torch.zeros(len(sae.layers))
    with evaluating(model), tqdm(total=len(rows), desc="routes", unit="prompt") as bar:
        for chosen, batch, last in packs(model, rows):
            r = residuals(model, batch, sae.layers).flatten(0, 1)[last]
            used += _read_at(sae, sae.read(sae.normalize(r)[0])[1], len(last)).cpu()
            bar.update(len(chosen))
    return used / used.sum()


def _read_at(sae: RoutedSAE | PretrainedSAE, places: Tensor | None, tokens: int) -> Tensor:
    """How many tokens were read at each layer, [L_r], from their places [N]; None: all were, at every layer."""
    if places is None:
        return torch.full((len(sae.layers),), float(tokens))
    return torch.bincount(places, minlength=len(sae.layers))


@torch.no_grad()
def quality(
    model: nn.Module,
    sae: RoutedSAE | PretrainedSAE,
    rows: Sequence[Row],
    harmful_rows: Sequence[Row],
    max_tokens: int = 10_000,
) -> dict[str, Any]:
    """Reconstruction on held-out rows, read as the constraint reads: unscaled, at the routed layer.

    Keys end in `_general` or `_harmful` where they differ. FVU = sum |u - u_hat|^2 / sum |u - mean|^2, about
    the mean because after LayerNorm about half of the energy is the mean; per layer: a sample of tokens, all
    read at that layer. `dead_share`: latents that never fired on the evaluated tokens, an upper bound when
    these are few; `dense_share`: fired on > 20 % of the general ones. Usage: share of tokens read at each
    layer, and its entropy relative to log L_r; `last_usage` the same at the rows' last tokens. Of each corpus
    the first rows that make up `max_tokens` are used. Of several pretrained autoencoders FVU and L0 are of all layers
    together, and `l0_is_k` is missing.
    """
    device, bos, n_layers = device_of(model), bos_ids(model), len(sae.layers)
    sae = sae.to(device)
    report: dict[str, Any] = {}
    fired_anywhere = torch.zeros(sae.m, dtype=torch.bool, device=device)
    for label, corpus in (("general", rows), ("harmful", harmful_rows)):
        if not corpus:
            raise UserError(f"no {label} rows to measure the SAE on: pass held-out ones")
        skip = shared_prefix(corpus)
        fvu = [_Variance(sae.width, device), *(_Variance(sae.d, device) for _ in range(n_layers))]
        fired = torch.zeros(sae.m, device=device)
        used = torch.zeros(n_layers, device=device)
        active = full = 0.0
        sizes = itertools.accumulate(len(row["input_ids"]) for row in corpus)
        sample = [row for row, size in zip(corpus, sizes, strict=True) if size <= max_tokens] or corpus[:1]
        bar = tqdm(total=len(sample), desc=f"quality ({label})", unit="row")
        with evaluating(model), bar:
            for chosen, batch in batches(sample, device, tokens_at_once(sae, 2048)):
                r = residuals(model, batch, sae.layers)
                x = sae.normalize(r)[0]
                x = x[keep_mask(batch["input_ids"], batch["attention_mask"], r, bos, skip)]
                u, places = sae.read(x)
                values, indices = sae.encode(u)
                fvu[0].add(u, sae.decode(values, indices))
                # reading every token at every layer costs L_r encodings, so a smaller sample has to do
                for place in range(n_layers if fvu[1].n * n_layers < max_tokens else 0):
                    fvu[place + 1].add(*sae.at_layer(x, place))
                fired += torch.bincount(indices[values > 0], minlength=sae.m)
                used += _read_at(sae, places, len(u)).to(device)
                count = (values > 0).sum(-1)
                active += count.sum().item()
                if isinstance(sae, RoutedSAE):
                    full += (count == sae.k).sum().item()
                bar.update(len(chosen))
        n = fvu[0].n
        if not n:
            raise UserError(f"the held-out {label} rows have no token beyond their shared opening: pass longer ones")
        fired_anywhere |= fired > 0
        used_last = last_usage(model, sae, corpus[:512])
        report |= {
            f"tokens_{label}": n,
            f"fvu_{label}": fvu[0].value(),
            f"fvu_per_layer_{label}": {layer: v.value() for layer, v in zip(sae.layers, fvu[1:], strict=True)},
            f"l0_{label}": active / n,
            **({f"l0_is_k_{label}": full / n} if isinstance(sae, RoutedSAE) else {}),
            f"usage_{label}": dict(zip(sae.layers, (used / used.sum()).tolist(), strict=True)),
            f"usage_entropy_{label}": _entropy(used),
            f"last_usage_{label}": dict(zip(sae.layers, used_last.tolist(), strict=True)),
            f"last_usage_entropy_{label}": _entropy(used_last),
        }
        if label == "general":
            report["dense_share"] = (fired > 0.2 * n).float().mean().item()
    tokens = report["tokens_general"] + report["tokens_harmful"]
    report["l0"] = sum(report[f"l0_{label}"] * report[f"tokens_{label}"] for label in ("general", "harmful")) / tokens
    report["dead_share"] = 1 - fired_anywhere.float().mean().item()
    return report


class _Variance:
    """Running fraction of variance unexplained over tokens [N, d]."""

    def __init__(self, d: int, device: torch.device):
        self.n, self.error, self.energy = 0, 0.0, 0.0
        self.sum = torch.zeros(d, dtype=torch.float64, device=device)

    def add(self, u: Tensor, u_hat: Tensor) -> None:
        self.n += len(u)
        self.error += (u - u_hat).double().pow(2).sum().item()
        self.energy += u.double().pow(2).sum().item()
        self.sum += u.double().sum(0)

    def value(self) -> float:
        return self.error / (self.energy - self.sum.pow(2).sum().item() / self.n)


def _entropy(counts: Tensor) -> float:
    """Entropy of counts relative to the uniform one; 1 where there is a single layer."""
    if len(counts) == 1:
        return 1.0
    p = counts / counts.sum()
    return (torch.special.entr(p).sum() / math.log(len(counts))).item()
