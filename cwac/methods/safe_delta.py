"""Safe Delta: of the fine-tuning's update only entries that cost little safety are kept, and that loss is compensated.

Lu, Liu, Wu, Chen, Zhang, Ong, Wang, Tang: "Safe Delta: Consistently Preserving Safety when Fine-Tuning LLMs on Diverse
Datasets", ICML 2025, arXiv:2505.12038; formulas and defaults as in llama2/safedelta/safedelta_runner.py and
llama2/run_safedelta.py of ColinLu50/SafeDelta at 3a4ea35. For each linear layer of a block, W0 [m, n] aligned, W
fine-tuned, with inputs X on N refusals in the aligned model:
- H = 2/N X X^T + damping I, with 1 at the diagonal of an input that is always 0; H^-1 = U^T U, U upper triangular;
- columns are worked through in blocks of 2,048. An entry (i, j) costs (W - W0)^2_ij / U_jj^2 of safety. In the order
  of growing 1 / U_jj^2, the dearest 15 % left out, entries of W are kept as long as the sum of their costs is at most
  scale / 2 times m / 4096 times the mean of 1 / U_jj^2; the others are W0's;
- each kept entry changes the columns to the right of its group of 4 by -(W0 - W)_ij / U_jj times row j of U, so that
  the response to X stays close to the aligned one, as in optimal brain surgery.
X is the aligned model's, not that of the layers merged before, so one pass of it serves all layers.

Deviations:
- The budget is the code's, also for matrices narrower than a block: it was set for 4,096 rows and columns. Entries
  whose 1 / U_jj^2 are equal, those of one column, are taken from the first row on; the code leaves their order open.
- The code's 128 refusals come from a file of the aligned model's own answers to harmful requests, under four prompts.
  Here they are its answers to the pool `anchors`, as served, cut at `response_tokens`; prompts that it does not refuse
  are left out (ours).
- H and its factors are computed in fp64 (ours), the rest in fp32.
- As in the code, what is no linear layer of a block (embeddings, norms, head) and every bias is the aligned model's
  again. With LoRA nothing else has changed; the result is written below the adapter, so that both together give it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from cwac.constraints.anchors import anchor_rows
from cwac.constraints.subspace import capture
from cwac.core.checks import check, check_number, check_whole, is_number
from cwac.core.errors import UserError
from cwac.data.examples import Example
from cwac.methods.base import Context, MemoryEstimate, Method, Sizes
from cwac.methods.safelora import delta
from cwac.models.adapters import plain_parameters, require_plain_lora
from cwac.models.layers import base_layer, input_group, linears
from cwac.models.loading import load_aligned, require_source

BLOCK = 2048
"""Columns that share one budget and one order of their entries."""
GROUP = 4
"""Neighbouring columns that are decided together, before the columns to their right make up for them."""
DAMPING = 0.01
"""Of the mean of H's diagonal."""
LAYERS = 8
"""Decoder blocks whose H are held at a time (ours): the aligned model runs once for each such part."""


@dataclass
class SafeDelta(Method):
    """Trains as SFT does; everything happens once, after training."""

    scale: float = 0.1
    """s, the multiple of the safety budget; 0 keeps no entry and gives the aligned model back."""
    excluded: float = 0.15
    """Share of the entries, those with the largest 1 / U_jj^2, that are never kept."""
    n_prompts: int | None = 128
    """Harmful prompts of the pool `anchors`; None for all."""
    response_tokens: int = 64
    """Tokens of the aligned model's own refusal that follow each prompt."""

    needs_base_weights: ClassVar[bool] = True

    def __post_init__(self):
        check_number("scale", self.scale, 0)
        check(is_number(self.excluded) and 0 <= self.excluded < 1, "excluded", self.excluded, "give a share in [0, 1)")
        check_whole("n_prompts", self.n_prompts, 1, null=True)
        check_whole("response_tokens", self.response_tokens, 1)
        self._kept: dict[str, float] = {}

    def extra_data(self) -> dict[str, int]:
        return {"harmful_prompts": len(self._rows)}

    def training_data(self, train: list[Example], context: Context, rng: random.Random) -> list[Example]:
        require_plain_lora(context.loaded.model, self.name)
        require_source(context.loaded, self.name)
        if not context.pools.anchors:
            raise UserError(f"method={self.name} needs the pool `anchors`, which is empty; enlarge pools.anchors")
        return train

    def setup(self, model: nn.Module, context: Context) -> None:
        self._loaded = context.loaded
        self._rows = anchor_rows(model, context, context.pools.anchors[: self.n_prompts], self.response_tokens)

    def estimate_memory(self, model: nn.Module, sizes: Sizes) -> MemoryEstimate:
        """Token ids are all that is kept while training."""
        return MemoryEstimate()

    def finish(self, model: nn.Module) -> None:
        aligned = load_aligned(self._loaded)
        theirs, ours = linears(aligned, "all"), linears(model, "all")
        matrices = {id(base_layer(m).weight) for m in ours.values()}
        start = plain_parameters(aligned)
        for name, parameter in plain_parameters(model).items():
            if id(parameter) not in matrices:
                parameter.copy_(start[name])
        names = list(theirs)
        blocks = sorted({int(n.split(".")[0]) for n in names})
        for first in range(0, len(blocks), LAYERS):
            part = {n: theirs[n] for n in names if int(n.split(".")[0]) in blocks[first : first + LAYERS]}
            H = second_moments(aligned, self._rows, part)
            factors = {group: factor(H.pop(group)) for group in list(H)}
            for name, layer in part.items():
                W0, module = layer.weight.float(), ours[name]
                U = factors[input_group(name)].to(W0.device)
                if hasattr(module, "lora_A"):
                    dW = delta(module, layer.weight).to(W0.device)
                    W, self._kept[name] = merge(W0, W0 + dW, U, self.scale, self.excluded)
                    base_layer(module).weight.copy_(W - dW)
                else:
                    W, self._kept[name] = merge(W0, module.weight.float(), U, self.scale, self.excluded)
                    module.weight.copy_(W)

    def report(self, model: nn.Module) -> list[dict]:
        return [{"metric": "kept_share", "set": name, "value": share} for name, share in self._kept.items()]


def second_moments(model: nn.Module, rows: list[dict], modules: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    """2/N X X^T [n, n], fp64, for every distinct input of the modules, over all tokens of the N rows."""
    sources: dict[str, nn.Module] = {}
    for name, module in modules.items():
        sources.setdefault(input_group(name), module)
    H = {g: torch.zeros(m.in_features, m.in_features, dtype=torch.float64) for g, m in sources.items()}

    def visit(group: str, x: torch.Tensor, first: torch.Tensor) -> None:
        x = torch.cat([first, x]).double()  # [tokens, n]
        H[group] = H[group].to(x.device) + 2 / len(rows) * x.T @ x

    capture(model, rows, sources, visit)
    return H


def factor(H: torch.Tensor) -> torch.Tensor:
    """U [n, n], upper triangular, fp32, with U^T U the inverse of the damped H [n, n], fp64."""
    H = H.clone()
    diagonal = H.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
    return torch.linalg.cholesky(inverse, upper=True).float()


def kept_entries(D: torch.Tensor, u: torch.Tensor, budget: float, excluded: float) -> torch.Tensor:
    """The entries of an update D [m, k] that are kept, bool [m, k]; u [k]: the diagonal of U.

    budget: what the kept ones may cost together, in units of the mean of 1 / u^2.
    """
    price = (1 / u.square()).expand_as(D).T.reshape(-1)  # column by column, so that ties are in the rows' order
    cost = (D / u).square().T.reshape(-1)
    order = torch.argsort(price, stable=True)[: price.numel() - int(excluded * price.numel())]
    affordable = cost[order].cumsum(0) <= budget * price.mean()
    kept = torch.zeros_like(price, dtype=torch.bool)
    kept[order] = affordable
    return kept.reshape(D.T.shape).T


def merge(
    W0: torch.Tensor, W: torch.Tensor, U: torch.Tensor, scale: float, excluded: float
) -> tuple[torch.Tensor, float]:
    """Weights [m, n] between the aligned W0 and the fine-tuned W, and the share of entries taken from W."""
    result, n_kept = W0.clone(), 0
    rows, columns = W0.shape
    for left in range(0, columns, BLOCK):
        right = min(left + BLOCK, columns)
        now = result[:, left:right]
        kept = kept_entries(W[:, left:right] - now, U.diagonal()[left:right], scale / 2 * rows / 4096, excluded)
        n_kept += int(kept.sum())
        for start in range(left, right, GROUP):
            group = slice(start, min(start + GROUP, right))
            was = result[:, group].clone()
            result[:, group] = torch.where(kept[:, start - left : group.stop - left], W[:, group], was)
            error = (was - result[:, group]) / U.diagonal()[group]
            result[:, group.stop :] -= error @ U[group, group.stop :]
    return result, n_kept / W0.numel()
