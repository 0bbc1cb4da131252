"""Methods for tests/test_remembered.py: L2-SP as docs/add_a_method.md has it, and three ways to get it wrong."""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from cwac.core.distributed import spread
from cwac.methods.base import Method

PAGE = (Path(__file__).parent.parent / "docs" / "add_a_method.md").read_text()
SNIPPET = textwrap.dedent(re.search(r"^  ```python\n(  @dataclass\n  class L2SP.*?)^  ```$", PAGE, re.M | re.S)[1])
space = {"dataclass": dataclass, "Method": Method, "ClassVar": ClassVar, "spread": spread, "__name__": __name__}
exec(SNIPPET, space)
L2SP = space["L2SP"]


@dataclass
class Remembers(Method):
    """L2-SP of the parameters that `setup` saw."""

    lam: float = 0.01

    def setup(self, model, context):
        self._pairs = {n: (p, p.detach().clone()) for n, p in model.named_parameters() if p.requires_grad}

    def penalty(self, model, step):
        return self.lam / 2 * sum((p - start).square().sum() for p, start in self._pairs.values())


@dataclass
class Closes(Method):
    """The same, kept in a function."""

    lam: float = 0.01

    def setup(self, model, context):
        weights = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]
        self._distance = lambda: sum((p - start).square().sum() for p, start in weights)

    def penalty(self, model, step):
        return self.lam / 2 * self._distance()


@dataclass
class Stands(Method):
    """A penalty that is a number and no function of the model."""

    def penalty(self, model, step):
        with torch.no_grad():
            return sum(p.square().sum() for p in model.parameters())


@dataclass
class Elsewhere(Method):
    """A penalty of tensors that are not the model's."""

    def setup(self, model, context):
        self._own = torch.nn.Parameter(torch.ones(3))

    def penalty(self, model, step):
        return self._own.square().sum()
