#!/usr/bin/env bash
# accelerate: does gather_for_metrics still drop the repeated rows of the last batch after skip_first_batches?
#
# Guess (60 %): yes; the remainder is a fact about the data set, and the skipped loader keeps the data set.
# What happens: no. 7 rows on 2 ranks in batches of 2 give 0 to 6 from the start, but after skipping the first batch of each
#   rank they give 4, 5, 6 and row 0 once more.
# Versions: accelerate 1.15.0, torch 2.13.0 (gloo, 2 processes).
# Who meets it: an evaluation over several processes that resumes where it stopped: rows that were scored before the
#   interruption are scored again, and the sum has more rows than the data set.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -qq --no-compile torch==2.13.0 accelerate==1.15.0
export HF_HOME="$dir/hf" HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1
export TRANSFORMERS_VERBOSITY=error WANDB_MODE=disabled OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
cat > "$dir/check.py" <<'PY'
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

accelerator = Accelerator(cpu=True)
rows = 7
loader = accelerator.prepare(DataLoader(TensorDataset(torch.arange(rows)), batch_size=2))
whole = [x for (batch,) in loader for x in accelerator.gather_for_metrics(batch).tolist()]
rest = accelerator.skip_first_batches(loader, 1)  # the first batch of each rank, 4 rows, was done before
resumed = [x for (batch,) in rest for x in accelerator.gather_for_metrics(batch).tolist()]
if accelerator.is_main_process:
    print("from the start:", whole)
    print("after skipping:", resumed, "where 4, 5 and 6 were left")
    assert whole == list(range(rows))
    assert resumed == [4, 5, 6, 0]
accelerator.end_training()
PY
cd "$dir"
if ! venv/bin/python -m torch.distributed.run --standalone --nproc_per_node 2 check.py > said.txt 2> errors.txt; then
    cat said.txt errors.txt
    exit 1
fi
cat said.txt
echo "observed as described"
