#!/usr/bin/env bash
# wandb: can the final metrics of an offline run be read from files/wandb-summary.json?
#
# Guess (65 %): yes; an offline run's folder has wandb-summary.json and config.yaml under files/, as an online one does.
# What happens: the folder holds the binary record (run-<id>.wandb), requirements.txt and logs. Neither summary nor
#   configuration exists as text after finish(), although run.summary had the values a moment before.
# Version: wandb 0.31.0.
# Who meets it: users on clusters without a network who collect results by globbing for wandb-summary.json: they find no
#   run at all, which looks as if nothing had been logged. Metrics have to be written to a file of one's own, or the run
#   has to be synced first.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -qq --no-compile wandb==0.31.0
cd "$dir"
env -u WANDB_MODE WANDB_SILENT=true WANDB_CONFIG_DIR="$dir/c" WANDB_CACHE_DIR="$dir/c" venv/bin/python - <<'PY'
import json
from pathlib import Path

import wandb

run = wandb.init(project="demo", mode="offline", dir="logs", config={"seed": 3})
run.log({"HS": 12.5})
run.summary["FA"] = 90.0
before = {key: run.summary[key] for key in ("HS", "FA")}
run.finish()
print("run.summary before finish:", json.dumps(before))
folder = next(Path("logs/wandb").glob("offline-run-*"))
names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
shown = ["run-<id>.wandb" if name.endswith(".wandb") else name for name in names]
print("files afterwards:", ", ".join(shown))
assert before == {"HS": 12.5, "FA": 90.0}
assert "run-<id>.wandb" in shown
assert not [name for name in names if name.endswith((".json", ".yaml"))]
PY
echo "observed as described"
