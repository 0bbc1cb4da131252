"""A method that fails in chosen cells, for testing sweeps."""

import os
from dataclasses import dataclass

from cwac.methods.base import Method


@dataclass
class Crash(Method):
    """Raises in the third step of every seed listed in CWAC_TEST_CRASH."""

    def setup(self, model, context):
        self.seed = context.seed

    def penalty(self, model, step):
        if step == 2 and str(self.seed) in os.environ.get("CWAC_TEST_CRASH", "").split(","):
            raise RuntimeError(f"planted crash in seed {self.seed}")
