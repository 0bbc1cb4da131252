"""Which latents are safety-critical, with the evidence, and a causal test of the answer.

CWAC (arXiv:2604.12384, section 4.1) keeps "the top 100 safety-critical latents, identified from harmful
prompts" and gives no ranking. `activation` is its literal reading. The default, contrast and then
first-order attribution to the refusal, follows what work on refusal features found to be causal
(arXiv:2505.23556; arXiv:2505.20063: activation alone finds detectors, which rarely drive outputs).

Deviations: the contrast, the eligibility rules, the fill-up and the causal test are ours.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import DynamicCache

from cwac.constraints.sae.autoencoder import RoutedSAE, tokens_at_once
from cwac.constraints.sae.pretrained import PretrainedSAE
from cwac.core.errors import UserError
from cwac.data.tokenize import encode_prompt, pad_token_id, stop_tokens
from cwac.models.hooks import (
    Row,
    batches,
    bos_ids,
    device_of,
    keep_mask,
    logits_at,
    on_layers,
    packs,
    residuals,
    shared_prefix,
)
from cwac.models.layers import CACHE, evaluating

Method = Literal["activation", "contrast", "contrast+attribution", "cosine", "random"]
METHODS = ("activation", "contrast", "contrast+attribution", "cosine", "random")

DISTINGUISHING_RATIO = 3.0
"""How many times as often a token opens one side as the other, to count as a sign of it (ours)."""


def most_frequent(openers: Counter[int], n: int = 8) -> dict[int, float]:
    """The n most frequent of counted first tokens, each with its share of all that were counted."""
    return {token: count / openers.total() for token, count in openers.most_common(n)}


def distinguishing_tokens(
    refusal: Mapping[int, float], compliance: Mapping[int, float]
) -> tuple[list[int], list[int]]:
    """The tokens of each side that tell a refusal from an answer.

    A token that opens both belongs to the side that it opens at least `DISTINGUISHING_RATIO` times as often ("I": nine
    in ten refusals, one in seven answers), else to neither.
    """

    def of(side: Mapping[int, float], other: Mapping[int, float]) -> list[int]:
        return [token for token, share in side.items() if share >= DISTINGUISHING_RATIO * other.get(token, 0.0)]

    return of(refusal, compliance), of(compliance, refusal)


@torch.no_grad()
def last_latents(
    model: nn.Module,
    sae: RoutedSAE | PretrainedSAE,
    rows: Sequence[Row],
    openers: Counter[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents z [P, M], the routed layer's place [P] and input u [P, d] at each prompt's last token; on the CPU.

    Of several pretrained autoencoders, u is [P, L_r d], and no layer is routed: its place is 0.
    openers: if given, the same passes go on to the logits, and the first token of each greedy answer is counted in it.
    """
    z, layer = torch.empty(len(rows), sae.m), torch.zeros(len(rows), dtype=torch.long)
    inputs = torch.empty(len(rows), sae.width)
    with evaluating(model), tqdm(total=len(rows), desc="latents", unit="prompt") as bar:
        for chosen, batch, last in packs(model, rows):
            if openers is None:
                r = residuals(model, batch, sae.layers).flatten(0, 1)[last]
            else:
                seen: dict[int, Tensor] = {}

                def record(layer: int, hidden: Tensor, seen=seen, last=last) -> None:
                    seen[layer] = hidden.flatten(0, 1)[last]

                with on_layers(model, sae.layers, record):
                    openers.update(logits_at(model, batch, last).argmax(-1).tolist())
                r = torch.stack([seen[layer] for layer in sae.layers], dim=1)
            u, routed = sae.read(sae.normalize(r)[0])
            z[chosen], inputs[chosen] = sae.dense(u).cpu(), u.cpu()
            if routed is not None:
                layer[chosen] = routed.cpu()
            bar.update(len(chosen))
    return z, layer, inputs


@torch.no_grad()
def firing_rates(model: nn.Module, sae: RoutedSAE | PretrainedSAE, rows: Sequence[Row]) -> Tensor:
    """Share of kept tokens on which each latent fires, [M]."""
    counts, n, skip = torch.zeros(sae.m), 0, shared_prefix(rows)
    with evaluating(model), tqdm(total=len(rows), desc="firing rates", unit="row") as bar:
        for chosen, batch in batches(rows, device_of(model), tokens_at_once(sae)):
            r = residuals(model, batch, sae.layers)
            keep = keep_mask(batch["input_ids"], batch["attention_mask"], r, bos_ids(model), skip)
            x = sae.normalize(r[keep])[0]
            values, indices = sae.encode(sae.read(x)[0])
            counts += torch.bincount(indices[values > 0], minlength=sae.m).cpu()
            n += len(x)
            bar.update(len(chosen))
    if not n:
        raise UserError("no token of the general rows is SAE data, so no latent has a density; enlarge pools.benign")
    return counts / n


def attribution(
    model: nn.Module,
    sae: RoutedSAE | PretrainedSAE,
    rows: Sequence[Row],
    refusal: Sequence[int],
    compliance: Sequence[int],
) -> Tensor:
    """First-order effect [M] of each latent on the refusal margin at the last token, averaged over prompts.

    margin = logsumexp(logits of refusal openers) - logsumexp(logits of compliance openers). Taking latent i
    out of the routed residual moves it by -z_i std W_dec,i, so its effect is z_i std <dmargin/dr, W_dec,i>.
    One backward pass per prompt, no reconstruction is spliced in.
    """
    total = torch.zeros(sae.m)
    bar = tqdm(total=len(rows), desc="attribution", unit="prompt")
    with evaluating(model), torch.enable_grad(), bar:
        for chosen, batch, last in packs(model, rows):
            seen: dict[int, Tensor] = {}

            def record(layer: int, hidden: Tensor, seen=seen) -> Tensor:
                # the first layer starts the graph, so nothing below it is differentiated
                seen[layer] = hidden if seen else hidden.detach().requires_grad_()
                return seen[layer]

            with on_layers(model, sae.layers, record):
                final = logits_at(model, batch, last).float()
            margin = final[:, list(refusal)].logsumexp(-1) - final[:, list(compliance)].logsumexp(-1)
            hidden = [seen[layer] for layer in sae.layers]
            grads = torch.autograd.grad(margin.sum(), hidden)
            with torch.no_grad():
                r = torch.stack([h.flatten(0, 1)[last] for h in hidden], dim=1)  # [B, L_r, d]
                g = torch.stack([h.flatten(0, 1)[last] for h in grads], dim=1).float()
                x, _, std = sae.normalize(r)
                weights = sae.read_weights(x)
                z = sae.dense(sae.mix(x, weights))
                total += (z * sae.on_decoder(sae.mix(std * g, weights))).sum(0).cpu()
            bar.update(len(chosen))
    return total / len(rows)


def rank_latents(
    model: nn.Module,
    sae: RoutedSAE | PretrainedSAE,
    harmful_rows: Sequence[Row],
    benign_rows: Sequence[Row],
    n: int = 100,
    method: Method = "contrast+attribution",
    *,
    general_rows: Sequence[Row] | None = None,
    openers: tuple[Mapping[int, float], Mapping[int, float]] | None = None,
    prefilter: int = 300,
    bootstraps: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """The n most safety-critical latents, best first, with the evidence; read at each prompt's last token.

    harmful_rows: encoded prompts that the model refuses; benign_rows: harmless ones of the same form;
    general_rows: text for the firing rate of dense latents (benign_rows where None).
    method: `activation` mean on harmful prompts (the paper, literally), `contrast` standardised harmful -
    benign difference, `contrast+attribution` the `prefilter` best of those ordered by `attribution`,
    `cosine` decoder row against the difference of means, `random` a control.
    openers: ids of the first tokens of the model's own refusals, and of its answers to harmless prompts, each with
    the share that it opens (`distinguishing_tokens`); measured from its logits where None.

    Columns: latent, rank, score, eligible, contrast, contrast_low (lower 95 % bootstrap bound), attribution,
    cosine, mean_harmful, mean_benign, fires_harmful, fires_benign, fires_general, layer (most used).
    A latent is eligible if it fires on >= 5 % of harmful prompts and <= 20 % of general tokens, its
    contrast_low is > 0 (`contrast*`), its attribution > 0 (`contrast+attribution`), and no better one has a
    decoder row at cosine > 0.95. If fewer than n are, the best-ranked others fill up, the prefiltered
    first; `activation` and `random` take the best n, eligible or not. `attrs["eligible"]` counts the
    genuine ones among the n. `attrs["split_half"]` is the rank correlation of the contrast between two
    halves of the prompts (below 0.6 the order is mostly noise).
    """
    if method not in METHODS:
        raise UserError(f"method.activation.ranking={method}: use one of {', '.join(METHODS)}")
    if not len(harmful_rows) or not len(benign_rows):
        raise UserError("ranking the latents needs harmful and benign prompts: neither pool may be empty")
    if not 1 <= n <= sae.m:
        raise UserError(f"method.activation.n_latents={n}: must lie between 1 and the SAE's {sae.m} latents")
    sae = sae.to(device_of(model))
    generator = torch.Generator().manual_seed(seed)
    counted = [Counter() for _ in range(2)] if method == "contrast+attribution" and openers is None else []
    harmful, places, u_harmful = last_latents(model, sae, harmful_rows, *counted[:1])
    benign, _, u_benign = last_latents(model, sae, benign_rows, *counted[1:])
    contrast = _contrast(harmful, benign)
    samples = torch.stack([
        _contrast(_resample(harmful, generator), _resample(benign, generator)) for _ in range(bootstraps)
    ])  # fmt: skip
    low = samples.quantile(0.05, dim=0)
    cosine = sae.cosines(u_harmful.mean(0) - u_benign.mean(0))
    rows = nn.functional.normalize(sae.w_dec.detach().float().cpu(), dim=1)
    fires_harmful = (harmful > 0).float().mean(0)
    fires_general = firing_rates(model, sae, benign_rows if general_rows is None else general_rows)
    effect = torch.full((sae.m,), float("nan"))
    if method == "contrast+attribution":
        if openers is None:
            openers = most_frequent(counted[0]), most_frequent(counted[1])
        refusal, compliance = distinguishing_tokens(*openers)
        if not refusal or not compliance:
            raise UserError(
                "the model opens refusals and answers with the same tokens, so attribution has no margin to "
                "explain (does it refuse at all?): use method.activation.ranking=contrast"
            )
        effect = attribution(model, sae, harmful_rows, refusal, compliance)

    eligible = (fires_harmful >= 0.05) & (fires_general <= 0.20)
    if method.startswith("contrast"):
        eligible &= low > 0
    candidate = eligible
    if method == "contrast+attribution":
        best = torch.where(eligible, contrast, -torch.inf).topk(min(prefilter, sae.m)).indices
        candidate = torch.zeros_like(eligible).index_fill(0, best, True) & eligible
        eligible = candidate & (effect > 0)
    score = {
        "activation": harmful.mean(0),
        "contrast": contrast,
        "contrast+attribution": effect,
        "cosine": cosine,
        "random": torch.rand(sae.m, generator=generator),
    }[method]
    order = torch.argsort(score, descending=True, stable=True).tolist()
    if method not in ("activation", "random"):
        # stable: the eligible first, then what only the sign of its attribution rules out, each by score
        order = sorted(order, key=lambda i: (not eligible[i], not candidate[i]))
        order, eligible = _merge_duplicates(order, eligible, rows, n, getattr(sae, "place", None))
    chosen = torch.tensor(order[:n])
    frame = pd.DataFrame({
        "latent": chosen,
        "rank": range(1, len(chosen) + 1),
        "score": score[chosen],
        "eligible": eligible[chosen],
        "contrast": contrast[chosen],
        "contrast_low": low[chosen],
        "attribution": effect[chosen],
        "cosine": cosine[chosen],
        "mean_harmful": harmful.mean(0)[chosen],
        "mean_benign": benign.mean(0)[chosen],
        "fires_harmful": fires_harmful[chosen],
        "fires_benign": (benign > 0).float().mean(0)[chosen],
        "fires_general": fires_general[chosen],
        "layer": [_layer(harmful[:, i], places_of(sae, i, places), sae.layers) for i in chosen.tolist()],
    })  # fmt: skip
    frame.attrs.update(method=method, eligible=int(eligible[chosen].sum()), eligible_total=int(eligible.sum()))
    frame.attrs["split_half"] = _split_half(harmful, benign, generator)
    return frame


def _contrast(harmful: Tensor, benign: Tensor) -> Tensor:
    """Standardised difference of means, [M], of latents [P, M]."""
    spread = ((harmful.var(0, correction=0) + benign.var(0, correction=0)) / 2 + 1e-6).sqrt()
    return (harmful.mean(0) - benign.mean(0)) / spread


def _resample(z: Tensor, generator: torch.Generator) -> Tensor:
    return z[torch.randint(len(z), (len(z),), generator=generator)]


def places_of(sae: RoutedSAE | PretrainedSAE, latent: int, places: Tensor) -> Tensor:
    """Where a latent was read in each prompt, [P]: at its own layer, or where the prompt was routed, `places` [P]."""
    return torch.full_like(places, int(sae.place[latent])) if isinstance(sae, PretrainedSAE) else places


def _layer(z: Tensor, places: Tensor, layers: Sequence[int]) -> int:
    """The layer at which a latent [P] fires most, -1 if it never does."""
    fired = places[z > 0]
    return layers[int(fired.mode().values)] if len(fired) else -1


def _merge_duplicates(
    order: list[int], eligible: Tensor, rows: Tensor, n: int, place: Tensor | None = None
) -> tuple[list[int], Tensor]:
    """Of decoder rows at cosine > 0.95 the best-ranked stays; the others become ineligible and go last.

    place: per latent, the layer it belongs to, [M]; rows of two layers are no duplicates. None: all are of one.
    """
    kept: list[int] = []
    dropped: list[int] = []
    eligible = eligible.clone()
    of = None if place is None else place.tolist()
    for i in order:
        # only what can still be chosen has to be compared
        considered = len(kept) < n or eligible[i]
        alike = kept if of is None else [j for j in kept if of[j] == of[i]] if considered else []
        if considered and alike and (rows[alike] @ rows[i]).max() > 0.95:
            eligible[i] = False
            dropped.append(i)
        else:
            kept.append(i)
    return kept + dropped, eligible


def _split_half(harmful: Tensor, benign: Tensor, generator: torch.Generator) -> float:
    """Spearman correlation of the contrast between random halves, over latents that fire on >= 5 % of harmful."""
    parts = []
    for z in (harmful, benign):
        order = torch.randperm(len(z), generator=generator)
        parts.append((z[order[: len(z) // 2]], z[order[len(z) // 2 :]]))
    firing = (harmful > 0).float().mean(0) >= 0.05
    if min(len(p) for pair in parts for p in pair) < 1 or firing.sum() < 3:
        return float("nan")
    first, second = (_contrast(parts[0][h], parts[1][h])[firing] for h in (0, 1))
    return float(pd.Series(first.numpy()).corr(pd.Series(second.numpy()), method="spearman"))


# ---------------------------------------------------------------- the causal test


def matched_random(energy: Tensor, latents: Sequence[int], generator, neighbours: int = 10) -> list[int]:
    """As many other latents, each drawn from the `neighbours` closest in activation energy [M] to one of `latents`."""
    free = torch.ones(len(energy), dtype=torch.bool)
    free[list(latents)] = False
    drawn = []
    size = energy.clamp_min(1e-12).log()
    for i in latents:
        distance = torch.where(free, (size - size[i]).abs(), torch.inf)
        near = distance.topk(min(neighbours, int(free.sum())), largest=False).indices
        if not len(near):
            break
        pick = int(near[torch.randint(len(near), (1,), generator=generator)])
        free[pick] = False
        drawn.append(pick)
    return drawn


@torch.no_grad()
def generate_edited(
    model: nn.Module,
    tokenizer: Any,
    sae: RoutedSAE | PretrainedSAE,
    prompts: Sequence[Any],
    latents: Sequence[int],
    factor: float,
    max_new_tokens: int = 32,
    template: str = "chat",
    batch_size: int = 32,
) -> list[str]:
    """Greedy answers while `latents` are multiplied by `factor` at the routed layer of every token.

    Only the latents' own contribution is changed: r += (factor - 1) std sum_S z_i W_dec,i, so the
    reconstruction error stays in. The route and z come from a clean pass over the same tokens, since the
    route of a shallow layer depends on deeper ones (as in RouteSAE). Each row's first token is left alone.
    """
    device, layers = device_of(model), sae.layers
    chosen = torch.as_tensor(list(latents), dtype=torch.long, device=device)
    encoded = [encode_prompt(tokenizer, p, template) for p in prompts]
    stop = torch.tensor(stop_tokens(model, tokenizer, template), device=device)
    pad = pad_token_id(tokenizer)
    answers: list[str] = []
    with evaluating(model), tqdm(total=len(encoded), desc="edited generation") as bar:
        for start in range(0, len(encoded), batch_size):
            group = encoded[start : start + batch_size]
            longest = max(map(len, group))
            ids = torch.tensor([[pad] * (longest - len(p)) + p for p in group], device=device)
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in group], device=device)
            clean_cache, edited_cache = DynamicCache(config=model.config), DynamicCache(config=model.config)
            step, written, open_ = ids, [], torch.ones(len(group), dtype=torch.bool, device=device)
            for _ in range(max_new_tokens):
                inputs = {
                    "input_ids": step,
                    "attention_mask": mask,
                    "position_ids": (mask.cumsum(1) - 1).clamp_min(0)[:, -step.shape[1] :],
                    "use_cache": True,
                }
                r = residuals(model, {**inputs, CACHE: clean_cache}, layers)
                x, _, std = sae.normalize(r)
                weights = sae.read_weights(x)  # [B, T, L_r]
                z = sae.dense(sae.mix(x, weights))[..., chosen]
                shift = (factor - 1) * sae.contribution(z, chosen, weights)  # [B, T, L_r, d]
                editable = (mask.cumsum(1) > 1)[:, -step.shape[1] :]
                shift = shift * editable[..., None, None]

                def edit(layer: int, hidden: Tensor, std=std, shift=shift) -> Tensor:
                    at = layers.index(layer)
                    return hidden + (std[:, :, at] * shift[:, :, at]).to(hidden.dtype)

                with on_layers(model, layers, edit):
                    logits = model(**inputs, **{CACHE: edited_cache}).logits[:, -1]
                token = logits.argmax(-1).masked_fill(~open_, pad)
                written.append(token)
                open_ &= ~torch.isin(token, stop)
                if not open_.any():
                    break
                step = token.unsqueeze(1)
                mask = torch.cat([mask, torch.ones_like(step)], dim=1)
            texts = tokenizer.batch_decode(torch.stack(written, dim=1), skip_special_tokens=True)
            answers += [t.strip() for t in texts]
            bar.update(len(group))
    return answers


def causal_check(
    model: nn.Module,
    tokenizer: Any,
    sae: RoutedSAE | PretrainedSAE,
    latents: Sequence[int],
    examples: Sequence[Any],
    judge: Any,
    *,
    factors: Sequence[float] = (-1.0,),
    draws: int = 5,
    max_new_tokens: int = 32,
    template: str = "chat",
    seed: int = 0,
    harmless: Sequence[Any] = (),
) -> list[dict[str, Any]]:
    """Does turning `latents` around (z -> factor * z) undo refusals, and turning matched random ones not?

    examples: held-out harmful requests (`Example`); judge: a `Judge`. One entry an edit: its `factor`, the `latents`
    edited (`none`, `held`: the given ones, `random 1` ... `draws` matched sets, the same under each factor), `n`, and
    in percent the verdicts, `energy`, their share of all latents' energy at the last prompt token (where the held have
    most of it, no other set is a match), and `unchanged`, of the `harmless` prompts those whose answer stays to the
    letter; NaN without any.
    """
    if not len(examples):
        raise UserError("the causal check has no prompts: give it held-out harmful requests")
    sae = sae.to(device_of(model))
    generator = torch.Generator().manual_seed(seed)
    texts, messages = [e.prompt for e in examples], [e.messages for e in examples]
    rows = [{"input_ids": encode_prompt(tokenizer, m, template)} for m in messages]
    energy = last_latents(model, sae, rows)[0].pow(2).mean(0)
    benign = [e.messages for e in harmless]

    def answers_to(asked: Sequence[Any], chosen: Sequence[int], by: float) -> list[str]:
        return generate_edited(model, tokenizer, sae, asked, chosen, by, max_new_tokens, template)

    def answered(name: str, chosen: Sequence[int], by: float) -> dict[str, Any]:
        verdicts = Counter(j.verdict for j in judge.judge(texts, answers_to(messages, chosen, by)))
        return {
            "latents": name,
            "n": len(texts),
            **{v: 100 * verdicts[v] / len(texts) for v in ("refusal", "harmful", "other")},
            "energy": float(100 * energy[list(chosen)].sum() / energy.sum()),
        }

    def unchanged(chosen: Sequence[int], by: float) -> float:
        same = [a == b for a, b in zip(plain, answers_to(benign, chosen, by), strict=True)]
        return 100 * sum(same) / len(same)

    plain = answers_to(benign, [], 1.0) if benign else []
    untouched = answered("none", [], 1.0) | {"unchanged": 100.0 if benign else float("nan")}
    drawn = [matched_random(energy, latents, generator) for _ in range(draws)]
    sets = {"held": list(latents), **{f"random {i}": chosen for i, chosen in enumerate(drawn, 1)}}
    entries = []
    for factor in factors:
        entries.append({"factor": factor, **untouched})
        for name, chosen in sets.items():
            kept = unchanged(chosen, factor) if benign else float("nan")
            entries.append({"factor": factor, **answered(name, chosen, factor), "unchanged": kept})
    return entries
