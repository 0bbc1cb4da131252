"""Does fine-tuning break a model's safety, and which defence keeps it?

A reproduction of CWAC (coupled weight and activation constraints, arXiv:2604.12384) with its
ablations, and exact constraints beyond it.
"""

import os

# Tensors of 2 MB and more in large pages where Linux offers them: without, a CPU faults in hundreds of MB of memory
# at every step. torch asks once, at its first such tensor; 0 turns it off.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.1.0"
