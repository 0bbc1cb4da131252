#!/usr/bin/env bash
# datasets: does a comment added to the function given to map() make it compute again?
#
# Guess (60 %): no; the fingerprint is made from the function's code, in which comments and line numbers have no part.
# What happens: a comment above the function changes nothing, one on a line of its own inside it changes the fingerprint, and
#   everything is computed again: the table from byte code to lines within the function is part of what is hashed. So is the
#   name of the file.
# Versions: datasets 5.2.0, dill 0.4.1, Python 3.11 or later.
# Who meets it: who tokenises a large set, then documents the function: an hour of work and its disk space once more, and a
#   fingerprint recorded with a run no longer matches although the rows are the same.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -qq --no-compile datasets==5.2.0 dill==0.4.1
export HF_HOME="$dir/hf" HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1
export TRANSFORMERS_VERBOSITY=error WANDB_MODE=disabled OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
write() {
    cat > app.py <<PY
from datasets import load_dataset

rows = load_dataset("json", data_files="rows.jsonl", split="train")
$1
def add(row):
    before = row["a"]
$2
    return {"b": before + 1}
print(rows.map(add)._fingerprint)
PY
    "$dir/venv/bin/python" app.py 2> errors.txt || { cat errors.txt >&2; exit 1; }
}
cd "$dir"
echo '{"a": 1}' > rows.jsonl
plain=$(write "" "")
again=$(write "" "")
above=$(write "# what it does" "")
inside=$(write "" "    # add one
")
echo "as it was:              $plain, and again: $again"
echo "a comment above:        $above"
echo "a comment line inside:  $inside"
[ "$plain" = "$again" ] && [ "$plain" = "$above" ] && [ "$plain" != "$inside" ]
echo "observed as described"
