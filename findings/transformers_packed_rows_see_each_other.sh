#!/usr/bin/env bash
# transformers: do rows packed into one by DataCollatorWithFlattening (positions start anew, no attention mask) stay apart?
#
# Guess (60 %): yes; transformers 5 finds the borders in position_ids and masks accordingly, also for sdpa and eager.
# What happens: only under use_cache=False. By default the model makes a cache, and with a cache the borders are not looked
#   for: each row attends to the rows packed before it, and its logits change. Nothing is said.
# Versions: transformers 5.24.0, torch 2.13.0.
# Who meets it: Trainer turns the cache off while it trains, so training is right; an evaluation or activation-capturing
#   loop of one's own on the same packed batches is not. Losses and activations then depend on what was packed together.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -qq --no-compile torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
export HF_HOME="$dir/hf" HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1
export TRANSFORMERS_VERBOSITY=error WANDB_MODE=disabled OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
cat > "$dir/check.py" <<'PY'
import torch
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(config).eval()
rows = [[3, 4, 5, 6, 7], [8, 9, 10, 11]]
batch = DataCollatorWithFlattening()([{"input_ids": row, "labels": row} for row in rows])
print("packed:", batch["input_ids"].tolist(), "positions:", batch["position_ids"].tolist())
with torch.no_grad():
    alone = model(torch.tensor(rows[1:])).logits[0]
    moved = {}
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        for options in ({}, {"use_cache": False}):
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], **options).logits
            moved[attention, bool(options)] = float((logits[0, len(rows[0]) :] - alone).abs().max())
            print(f"{attention:5} {options or 'default'}: logits of the second row move by {moved[attention, bool(options)]:.2g}")
for attention in ("sdpa", "eager"):
    assert moved[attention, False] > 1e-2
    assert moved[attention, True] < 1e-5
PY
cd "$dir"
if ! venv/bin/python check.py > said.txt 2> errors.txt; then
    cat said.txt errors.txt
    exit 1
fi
cat said.txt
echo "observed as described"
