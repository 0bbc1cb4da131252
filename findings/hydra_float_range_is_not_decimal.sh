#!/usr/bin/env bash
# Hydra: which values does a sweep over `range(0.1, 0.5, 0.1)` visit?
#
# Guess (60 %): 0.1, 0.2, 0.3 and 0.4, the numbers a reader sees, because the grammar knows each step as a decimal.
# What happens: the step is added in binary, so the third job gets 0.30000000000000004. Hydra's own listing of the jobs
#   prints that number, so the override is not the one a user who repeats a single cell by hand types (0.3).
# Versions: hydra-core 1.3.8, omegaconf 2.3.1.
# Who meets it: a sweep over harmful ratios or learning rates by `range`. Where a run's folder or hash is made from the
#   values, the cell of the sweep and the same cell started alone are two runs; where names are rounded for display they
#   look like one. A list, `0.1,0.2,0.3,0.4`, visits the decimals.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -qq --no-compile hydra-core==1.3.8 omegaconf==2.3.1
cat > "$dir/app.py" <<'PY'
import hydra


@hydra.main(config_path=None, version_base="1.3")
def app(cfg):
    print("visited", repr(cfg.ratio))


app()
PY
cd "$dir"
by_range=$(venv/bin/python app.py -m '+ratio=range(0.1,0.5,0.1)' | sed -n 's/^visited //p' | paste -sd' ')
by_list=$(venv/bin/python app.py -m '+ratio=0.1,0.2,0.3,0.4' | sed -n 's/^visited //p' | paste -sd' ')
echo "range(0.1,0.5,0.1): $by_range"
echo "0.1,0.2,0.3,0.4:    $by_list"
[ "$by_range" = "0.1 0.2 0.30000000000000004 0.4" ]
[ "$by_list" = "0.1 0.2 0.3 0.4" ]
echo "observed as described"
