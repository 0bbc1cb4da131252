#!/usr/bin/env bash
# statsmodels: what does multipletests give for a family of p-values of which one is missing (NaN)?
#
# Guess (70 %): NaN at that place and corrected values at the others, whichever the method.
# What happens: it depends on the method. Under "holm" and "bonferroni" only that place is NaN, though the family counts it
#   as a test. Under "fdr_bh" and "fdr_by" every corrected value is NaN, while the array `reject` of the same call still
#   holds a rejection. Under "hommel" all is NaN and nothing is rejected, not even p = 0.0001.
# Versions: statsmodels 0.15.0, NumPy 2.4.6, SciPy 1.17.1, Python 3.11 or later.
# Who meets it: tables of comparisons in which one cell has no p-value (a constant score, a failed seed): the q column is
#   empty or a finding disappears, by the choice of the method. Drop the missing ones first.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -qq --no-compile statsmodels==0.15.0 numpy==2.4.6 scipy==1.17.1
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
cat > "$dir/check.py" <<'PY'
import numpy as np
from statsmodels.stats.multitest import multipletests

family = np.array([0.0001, np.nan, 0.03, 0.2])
found = {}
for method in ("bonferroni", "holm", "fdr_bh", "fdr_by", "hommel"):
    reject, corrected, *_ = multipletests(family, method=method)
    without = multipletests(family[~np.isnan(family)], method=method)[0]
    found[method] = int(np.isnan(corrected).sum()), int(reject.sum()), int(without.sum())
    print(f"{method:10} corrected {corrected.round(4)}, reject {reject}, rejected without the missing one: {without.sum()}")
assert found["bonferroni"][0] == found["holm"][0] == 1
assert found["fdr_bh"][0] == found["fdr_by"][0] == found["hommel"][0] == 4
assert found["fdr_bh"][1] >= 1 and found["fdr_by"][1] >= 1 and found["hommel"][1] == 0
assert found["hommel"][2] >= 1
PY
cd "$dir"
if ! venv/bin/python check.py > said.txt 2> errors.txt; then
    cat said.txt errors.txt
    exit 1
fi
cat said.txt
echo "observed as described"
