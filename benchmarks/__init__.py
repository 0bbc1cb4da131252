"""What things cost, beside what they are measured against (benchmarks/README.md)."""

import os

os.environ.setdefault("TQDM_DISABLE", "1")  # before anything imports tqdm
