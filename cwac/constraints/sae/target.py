"""L_safety, the activation constraint of CWAC (arXiv:2604.12384, Eq. 11), with its gates.

For a prompt b, S the preserved latents and z_base the aligned model's features, cached once:
L_safety = mean_b mean_positions sum_{i in S} (z_bi - z_base_bi)^2.

Deviations: see the package; `gate="topk", positions="last", units="raw"` is the formula to the letter.
The paper names neither positions nor units. `last` is the only reading of its index b without a
further average. Latents are read from LayerNormed residuals, so lambda has other units than with raw ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from cwac.constraints.sae.autoencoder import RoutedSAE
from cwac.constraints.sae.pretrained import PretrainedSAE
from cwac.constraints.targets import locate
from cwac.core.errors import UserError
from cwac.models.hooks import Row, device_of, read_at, residuals
from cwac.models.layers import evaluating

GATES = ("tau", "topk", "union", "base", "preact")


Gate = Literal["tau", "topk", "union", "base", "preact"]

MARGIN = 1e-5
"""Relative slack on tau: kernels differ in the last bits with the batch's shape, and a latent that ties
with the k-th must not count as new in the unchanged model."""


@dataclass
class _Prompt:
    """The frozen model's answer for one prompt; Q positions, L_r layers, S latents, on the CPU."""

    ids: list[int]
    positions: list[int]
    weights: Tensor  # [Q, L_r] how the layers are mixed; one-hot unless the router is soft
    z: Tensor  # [Q, S] the TopK features
    pre: Tensor  # [Q, S] pre-activations
    active: Tensor  # [Q, S] in the TopK and positive
    tau: Tensor  # [Q] the k-th largest pre-activation, at least 0; [Q, S] where each latent has its own threshold
    raw: Tensor  # [Q, d] the routed residual before LayerNorm; [Q, L_r d] where several layers are read at once


class SafetyTarget:
    """The aligned model's features on a set of prompts, and the distance of a current model from them.

    Build it on the model before any update. It moves what it needs to the model's device by itself,
    and holds no parameter that trains.

    Gates decide what counts as feature i of the current model, a being its pre-activation. Active at
    baseline: a always (so that a latent that left the TopK still gets a gradient), except `topk`.
    Inactive at baseline: `tau` a if a > tau, the baseline's k-th largest (of a pretrained autoencoder without TopK,
    the latent's own threshold); `union` and `topk` the current feature; `base` nothing. `preact` compares
    pre-activations instead.
    """

    def __init__(
        self, sae: RoutedSAE | PretrainedSAE, latents: Sequence[int], gate: Gate, units: str, prompts: list[_Prompt]
    ):
        self.sae, self.gate, self.units, self.prompts = sae, gate, units, prompts
        self.latents = torch.as_tensor(list(latents), dtype=torch.long)

    @cached_property
    def used(self) -> list[int]:
        """Layers, by their place in `sae.layers`; those that nobody is routed to are not computed."""
        return (torch.stack([p.weights.amax(0) for p in self.prompts]).amax(0) > 0).nonzero().flatten().tolist()

    @cached_property
    def baseline_energy(self) -> float:
        """Mean over prompts of sum_S z_base^2."""
        return torch.stack([p.z.pow(2).sum(-1).mean() for p in self.prompts]).mean().item()

    @classmethod
    def build(
        cls,
        model: nn.Module,
        sae: RoutedSAE | PretrainedSAE,
        latents: Sequence[int],
        prompt_rows: Sequence[Row],
        gate: Gate = "tau",
        positions: str = "last",
        units: Literal["raw", "relative"] = "raw",
    ) -> "SafetyTarget":
        """Cache the features of the (aligned) `model` at `positions` of each prompt.

        prompt_rows: `{"input_ids": prompt}`; for `response:n` prompt + answer, with `"prompt"` the prompt's length.
        positions: `last` the prompt's last token, whose logits choose the answer's first; `template:n` the
        last n prompt tokens; `prompt` all but the first; `response:n` `last` and the first n tokens of the
        aligned model's own answer, teacher-forced.
        units: `relative` divides by the mean over prompts of sum_S z_base^2.
        Raises UserError for an unknown option, an empty prompt set or a latent outside the SAE.
        """
        if gate not in GATES:
            raise UserError(f"method.activation.gate={gate}: use one of {', '.join(GATES)}")
        if units not in ("raw", "relative"):
            raise UserError(f"method.activation.units={units}: use raw or relative")
        if not len(prompt_rows):
            raise UserError("the activation constraint has no harmful prompts: give it a non-empty step pool")
        if not len(latents) or not 0 <= min(latents) <= max(latents) < sae.m:
            raise UserError(f"the preserved latents must be a non-empty subset of 0 .. {sae.m - 1}")
        sae = sae.to(device_of(model)).requires_grad_(False).eval()
        chosen = torch.as_tensor(list(latents), device=sae.w_enc.device)
        prompts = []
        with torch.no_grad(), evaluating(model):
            for row in tqdm(prompt_rows, desc="targets", unit="prompt"):
                ids, where = locate(row, positions)
                # one prompt at a time: no padding, and nothing depends on what it is batched with
                r = residuals(model, {"input_ids": torch.tensor([ids], device=device_of(model))}, sae.layers)[0, where]
                x = sae.normalize(r)[0]  # [Q, L_r, d]
                sae.to(dtype=x.dtype)
                weights = sae.read_weights(x, chosen)
                pre = sae.pre(sae.mix(x, weights))  # [Q, M]
                z, tau = sae.gate(pre)
                z, tau = z[:, chosen], tau[:, chosen] if tau.ndim > 1 else tau
                raw = sae.mix(r, weights)
                cached = (weights, z, pre[:, chosen], z > 0, tau, raw)
                prompts.append(_Prompt(ids, where, *(t.cpu() for t in cached)))
        target = cls(sae, latents, gate, units, prompts)
        if units == "relative" and target.baseline_energy == 0:
            raise UserError("method.activation.units=relative: no latent fires on the prompts; use units=raw")
        return target

    @classmethod
    def stand_in(
        cls, sae: RoutedSAE | PretrainedSAE, n_latents: int, n_prompts: int, tokens: int, gate: Gate, shared: int = 0
    ) -> "SafetyTarget":
        """A target of these sizes without a model's answers, for what it costs; every layer that may be read is.

        tokens: of each prompt, of which the first `shared` are the same in all.
        """
        w, z = torch.ones(1, len(sae.layers)), torch.ones(1, n_latents)
        answer = ([tokens - 1], w, z, z, z > 0, torch.ones(1), torch.ones(1, sae.width))
        rows = ([0] * shared + [1 + i] * (tokens - shared) for i in range(n_prompts))
        target = cls(sae, range(n_latents), gate, "raw", [_Prompt(ids, *answer) for ids in rows])
        target.used = sae.readable
        return target

    def save(self, folder: Path) -> None:
        """Write `targets.safetensors`, which depends neither on the gate nor on the units."""
        tensors = {
            f"{i}.{f.name}": torch.as_tensor(getattr(p, f.name)).contiguous()
            for i, p in enumerate(self.prompts)
            for f in fields(_Prompt)
        }
        save_file(tensors, folder / "targets.safetensors")

    @classmethod
    def load(
        cls, folder: Path, sae: RoutedSAE | PretrainedSAE, latents: Sequence[int], gate: Gate, units: str
    ) -> "SafetyTarget":
        """Read what `save` wrote, for the same autoencoder and latents."""
        stored = load_file(folder / "targets.safetensors")
        prompts = []
        for i in range(len(stored) // len(fields(_Prompt))):
            values = {f.name: stored[f"{i}.{f.name}"] for f in fields(_Prompt)}
            prompts.append(_Prompt(**values | {name: values[name].tolist() for name in ("ids", "positions")}))
        return cls(sae, latents, gate, units, prompts)

    def __len__(self) -> int:
        return len(self.prompts)

    def loss(self, model: nn.Module, indices: Sequence[int] | Tensor) -> Tensor:
        """L_safety on the prompts `indices` under the current `model`: scalar, fp32, with a gradient; 0 for none.

        Summed over latents, averaged over positions, then over prompts; the caller multiplies by lambda.
        """
        if not len(indices):
            return torch.zeros((), device=device_of(model))
        a, prompts, _, mask, u = self._read(model, indices)
        base = self._stack(prompts, "z", a)
        active = self._stack(prompts, "active", a).bool()
        if self.gate == "preact":
            q, base = a, self._stack(prompts, "pre", a)
        elif self.gate == "base":
            q = torch.where(active, a, 0.0)
        elif self.gate == "tau":
            tau = self._stack(prompts, "tau", a)
            tau = tau.unsqueeze(-1) if tau.ndim < a.ndim else tau
            q = torch.where(active | (a > tau * (1 + MARGIN)), a, 0.0)
        else:
            with full_precision(u):
                z = self.sae.dense(u)[..., self.latents.to(u.device)]
            q = z if self.gate == "topk" else torch.where(active, a, z)
        loss = self._mean((q - base).pow(2).sum(-1), mask)
        return loss / self.baseline_energy if self.units == "relative" else loss

    @torch.no_grad()
    def drift(self, model: nn.Module, batch_size: int = 16) -> dict[str, float]:
        """How far `model` has moved on all prompts, in evaluation mode.

        feature_drift: mean of sum_S (z - z_base)^2 with the true TopK, whatever the gate; relative_feature_drift
        divides by the mean of sum_S z_base^2; dropped_share: share of the latents of S active at baseline
        that left the TopK; residual_drift: mean |r - r_base| / |r_base| of the routed residual before LayerNorm.
        Where no latent of S was active at baseline, the second and third are missing.
        """
        total = {"feature": 0.0, "dropped": 0.0, "active": 0.0, "residual": 0.0}
        with evaluating(model):
            for start in range(0, len(self.prompts), batch_size):
                indices = range(start, min(start + batch_size, len(self.prompts)))
                a, prompts, raw, mask, u = self._read(model, indices)
                z = self.sae.dense(u)[..., self.latents.to(u.device)]
                base, active = self._stack(prompts, "z", a), self._stack(prompts, "active", a).bool()
                base_raw = self._stack(prompts, "raw", a)
                moved = (raw - base_raw).norm(dim=-1) / base_raw.norm(dim=-1).clamp_min(1e-12)
                total["feature"] += len(indices) * self._mean((z - base).pow(2).sum(-1), mask).item()
                total["residual"] += len(indices) * self._mean(moved, mask).item()
                total["active"] += (active & mask.unsqueeze(-1)).sum().item()
                total["dropped"] += (active & (z <= 0) & mask.unsqueeze(-1)).sum().item()
        n = len(self.prompts)
        drift = {"feature_drift": total["feature"] / n, "residual_drift": total["residual"] / n}
        if self.baseline_energy:
            drift["relative_feature_drift"] = drift["feature_drift"] / self.baseline_energy
        if total["active"]:
            drift["dropped_share"] = total["dropped"] / total["active"]
        return drift

    def _read(self, model: nn.Module, indices: Sequence[int] | Tensor):
        """Pre-activations [B, Q, S] of the current model at the baseline's layers, with what else the callers need."""
        prompts = [self.prompts[int(i)] for i in indices]
        layers = [self.sae.layers[i] for i in self.used]
        r, mask = read_at(model, [(p.ids, p.positions) for p in prompts], layers)  # [B, Q, used, d]
        x = self.sae.normalize(r, self.used)[0]
        weights = self._stack(prompts, "weights", x)[..., self.used]
        if (self.sae.w_enc.device, self.sae.w_enc.dtype) != (x.device, x.dtype):
            self.sae.to(device=x.device, dtype=x.dtype)
        u = self.sae.mix(x, weights, self.used)
        # only the |S| rows of the encoder: the other latents matter to `topk` and `union` alone
        with full_precision(u):
            a = self.sae.pre(u, self.latents.to(u.device))
        return a, prompts, self.sae.mix(r, weights, self.used), mask, u

    @staticmethod
    def _stack(prompts: list[_Prompt], name: str, like: Tensor) -> Tensor:
        values = nn.utils.rnn.pad_sequence([getattr(p, name) for p in prompts], batch_first=True)
        return values.to(device=like.device, dtype=like.dtype)

    @staticmethod
    def _mean(values: Tensor, mask: Tensor) -> Tensor:
        """Mean over the positions of each prompt, then over prompts; values and mask [B, Q]."""
        return ((values * mask).sum(1) / mask.sum(1)).mean()


def full_precision(u: Tensor) -> torch.autocast:
    """Features in their own dtype also under autocast: in bf16 their rounding would count as drift."""
    return torch.autocast(u.device.type, enabled=False)
