"""Does fine-tuning break a model's safety, and which defence keeps it?

A reproduction of CWAC (coupled weight and activation constraints, arXiv:2604.12384) with its ablations, and exact
constraints beyond it. `defend` and `load_method` put a defence into a training script of your own, `measure` says
whether it held.

The packages form a stack; each imports only those before it, which `tests/test_layout.py` checks:
core, data, models, constraints, methods, evaluation, training.
"""

import importlib
import os
from typing import Any

# Tensors of 2 MB and more in large pages where Linux offers them: without, a CPU faults in hundreds of MB of memory
# at every step. torch asks once, at its first such tensor; 0 turns it off.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.1.0"
PUBLIC = {
    "Example": "cwac.data.examples",
    "Pools": "cwac.data.examples",
    "defend": "cwac.training.library",
    "hf_trainer": "cwac.training.script",
    "load_method": "cwac.training.library",
    "measure": "cwac.training.measure",
    "measure_task": "cwac.training.measure",
    "packaged_model": "cwac.training.script",
    "text_rows": "cwac.training.script",
}
"""Public name -> module."""
__all__ = list(PUBLIC)


def __getattr__(name: str) -> Any:
    """The names of `PUBLIC`, loaded with torch and transformers only when a script asks for them."""
    if name in PUBLIC:
        return getattr(importlib.import_module(PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
