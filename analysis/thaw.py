"""The former name of `analysis.restore`: the command works under both.

python -m analysis.thaw results/NAME --runs runs
"""

import sys

from analysis.restore import main

if __name__ == "__main__":
    sys.exit(main())
