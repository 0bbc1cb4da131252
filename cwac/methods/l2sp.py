"""L2-SP: fine-tuning with a penalty on the distance from the weights that it starts from.

Li, Grandvalet, Davoine: "Explicit Inductive Bias for Transfer Learning with Convolutional Networks", ICML 2018,
arXiv:1802.01483. The loss gains lambda / 2 ||W - W_0||^2 (the paper's alpha), W_0 the pre-trained weights, here
those of the aligned model. Official code, read at 1426356 of holyseven/TransferLearningClassification:
`model/network_base.py` (`tf.nn.l2_loss`, which is half the squared norm), `run_classification/run_exp.py` (default
0.01) and `run_classification/train.sh`, whose L2-SP run has 0.1.

Deviations:
- Nothing is new in a language model that is fine-tuned as it is, so the paper's second term, weight decay of the new
  layers (beta), has nothing to act on.
- All that trains is held, embeddings and norms included; the official code holds convolution kernels, and leaves
  biases and batch normalisation free (ours: a gain left free would be a way around).
- The optimizer is the project's AdamW, through whose moments the term's gradient goes as the task's does; the authors
  train with momentum SGD. One lambda is another strength under each.
- LoRA (ours): dW = s B A is held to 0, which is the same function of the weights as in full-parameter training.
- The gradient is added in closed form once per optimizer step, before clipping, so that it depends on neither
  accumulation nor ranks.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from cwac.constraints.start import Start
from cwac.core.checks import check_number
from cwac.data.examples import Example
from cwac.methods.base import Context, MemoryEstimate, Method, Sizes
from cwac.models.adapters import require_plain_lora


@dataclass
class L2SP(Method):
    """Needs no data beyond the task."""

    lam: float = 0.1
    """lambda; 0 is plain fine-tuning."""

    needs_step_hooks: ClassVar[bool] = True

    def __post_init__(self):
        check_number("lam", self.lam, 0)

    def training_data(self, train: list[Example], context: Context, rng: random.Random) -> list[Example]:
        require_plain_lora(context.loaded.model, self.name)
        return train

    def setup(self, model: nn.Module, context: Context) -> None:
        self._start = Start(model) if self.lam else None

    def estimate_memory(self, model: nn.Module, sizes: Sizes) -> MemoryEstimate:
        self._start = Start(model) if self.lam else None
        return MemoryEstimate(tensors={"W_0 of the penalty": [*self._start.weights.values()]} if self.lam else {})

    def start(self, model: nn.Module) -> None:
        if self._start is not None:
            self._start.place(model)

    def after_backward(self, model: nn.Module) -> None:
        if self._start is not None:
            self._start.add_gradient_(model, self.lam)
