#!/usr/bin/env bash
# pandas: what does astype(str) make of a missing value?
#
# Guess (60 %): the text "nan" (or "None"), the old trap that everybody filters out by its name.
# What happens: in pandas 3.1 the value stays missing. A key that is glued from columns of text is then missing as a
#   whole, and groupby leaves those rows out, where they used to form a group called "nan" or "None" that one could see.
#   Series.map(str) still writes "nan".
# Version: pandas 3.1.1.
# Who meets it: analysis code that builds an identity from columns, such as method + "/" + judge, where a run without a
#   judge has none: its rows vanish from sums and tables and nothing is printed.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -qq --no-compile pandas==3.1.1 numpy==2.4.6
"$dir/venv/bin/python" - <<'PY'
import pandas as pd

rows = pd.DataFrame({"method": ["sft", "sft", "lisa"], "judge": ["keyword", None, None], "n": [10, 20, 30]})
text = rows["judge"].astype(str)
rows["key"] = rows["method"].astype(str) + "/" + text
groups = rows.groupby("key")["n"].sum().to_dict()
mapped = rows["judge"].map(str).tolist()
numbers = pd.Series([0.1, None]).astype(str).tolist()
print("astype(str):", text.tolist(), "and of numbers:", numbers)
print("map(str):   ", mapped)
print("sum of n by key:", groups, "of", rows["n"].sum(), "in all")
assert text.isna().tolist() == [False, True, True]
assert numbers[0] == "0.1" and pd.isna(numbers[1])
assert mapped == ["keyword", "nan", "nan"]
assert groups == {"sft/keyword": 10}
PY
echo "observed as described"
