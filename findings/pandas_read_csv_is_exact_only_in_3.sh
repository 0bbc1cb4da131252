#!/usr/bin/env bash
# pandas: does read_csv give back the float64 values that were written with all their digits?
#
# Guess (65 %): no; a fast parser is the default, and exact values need float_precision="round_trip".
# What happens: in pandas 3.1 every value comes back exactly by default, and the argument is deprecated. In pandas 2.2,
#   which many projects' ranges still allow, a third of the values are off by a unit in the last place, and
#   0.30000000000000004 is read as 0.3: one file is two different tables.
# Versions: pandas 3.1.1 against 2.2.3, numpy 2.4.6.
# Who meets it: whoever rebuilds tables from logged metrics on another machine. Two keys that differ in the last place
#   (0.1 + 0.2 and 0.3) are two groups in pandas 3 and one in pandas 2; checksums of recomputed tables differ.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
for version in 3.1.1 2.2.3; do
    python3 -m venv "$dir/$version"
    "$dir/$version/bin/pip" install -qq --no-compile "pandas==$version" numpy==2.4.6
done
cat > "$dir/check.py" <<'PY'
import io

import numpy as np
import pandas as pd

bits = np.random.default_rng(1).integers(0, 2**63, 100_000, dtype=np.uint64)
written = bits.view(np.float64)
written = written[np.isfinite(written)]
text = "x\n" + "\n".join(map(repr, written.tolist())) + "\n"
read = pd.read_csv(io.StringIO(text))["x"].to_numpy()
ratio = pd.read_csv(io.StringIO("x\n0.30000000000000004\n"))["x"][0]
share = float((read != written).mean())
print(f"pandas {pd.__version__}: {share:.1%} of {len(written)} values changed; 0.30000000000000004 is read as {ratio}")
if pd.__version__.startswith("3."):
    assert share == 0 and ratio != 0.3
else:
    assert 0.2 < share < 0.5 and ratio == 0.3
PY
"$dir/3.1.1/bin/python" "$dir/check.py"
"$dir/2.2.3/bin/python" "$dir/check.py"
echo "observed as described"
