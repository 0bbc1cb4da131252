#!/usr/bin/env bash
# accelerate: what does gather_for_metrics return for one number a rank, such as the mean loss of a batch?
#
# Guess (60 %): one number a rank at every step, the last included; only rows are trimmed.
# What happens: the result of the last step is cut to the number of real rows left in it, whatever it holds. With one row
#   left and two ranks, rank 1's mean is gone, and rank 0's, which is kept, includes a repeated row: 4.0 where the row is 8.
# Versions: accelerate 1.15.0, torch 2.13.0 (gloo, 2 processes).
# Who meets it: evaluation loops that gather `outputs.loss`: the reported loss depends on how the rows fall on the ranks
#   (2.33 here, 2.80 by rows). Gather one value a row instead.
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
values = torch.tensor([0.0, 1.0, 2.0, 3.0, 8.0])
loader = accelerator.prepare(DataLoader(TensorDataset(values), batch_size=2))
means, rows = [], []
for (batch,) in loader:
    means.append(accelerator.gather_for_metrics(batch.mean()).tolist())  # one value a rank, as a loss is
    rows += accelerator.gather_for_metrics(batch).tolist()
if accelerator.is_main_process:
    print("batch means gathered:", means)
    print("rows gathered:       ", rows)
    flat = [x for step in means for x in step]
    print(f"mean of the batch means {sum(flat) / len(flat):.2f}; mean of the rows {sum(rows) / len(rows):.2f}")
    assert rows == values.tolist()
    assert means == [[0.5, 2.5], [4.0]], "rank 1's value of the last step is gone, rank 0's counts a repeated row"
accelerator.end_training()
PY
cd "$dir"
if ! venv/bin/python -m torch.distributed.run --standalone --nproc_per_node 2 check.py > said.txt 2> errors.txt; then
    cat said.txt errors.txt
    exit 1
fi
cat said.txt
echo "observed as described"
