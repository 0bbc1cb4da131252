"""Does fine-tuning break a model's safety, and which defence keeps it?

A reproduction of CWAC (coupled weight and activation constraints, arXiv:2604.12384) with its
ablations, and exact constraints beyond it.
"""

__version__ = "0.1.0"
