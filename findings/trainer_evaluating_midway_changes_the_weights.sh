#!/usr/bin/env bash
# transformers' Trainer: does evaluating on the way leave the trained weights as they are without it?
#
# Guess (60 %): bit for bit; evaluation runs without gradients and without dropout.
# What happens: only for models without dropout. Each pass over a DataLoader, even one that does not shuffle, draws a number
#   from PyTorch's global generator, so the dropout masks after an evaluation are others and the weights part.
# Versions: transformers 5.24.0, torch 2.13.0.
# Who meets it: who treats eval_steps as a setting of logging: two runs of one seed that differ only in it are not the same
#   run. LoRA's dropout is enough.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -qq --no-compile torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
export HF_HOME="$dir/hf" HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1
export TRANSFORMERS_VERBOSITY=error WANDB_MODE=disabled OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
cat > "$dir/check.py" <<'PY'
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

rows = [{"input_ids": (ids := [3 + (7 * i + j * j) % 60 for j in range(8)]), "labels": ids} for i in range(12)]


def train(dropout, evaluate):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                    attention_dropout=dropout)
    )
    args = TrainingArguments(
        output_dir="out", use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", learning_rate=1e-3,
        per_device_train_batch_size=2, num_train_epochs=1, seed=0, eval_strategy="steps" if evaluate else "no",
        eval_steps=2,
    )
    Trainer(model, args, train_dataset=rows[:8], eval_dataset=rows[8:]).train()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


changed = {}
for dropout in (0.0, 0.1):
    changed[dropout] = float((train(dropout, True) - train(dropout, False)).abs().max())
    print(f"dropout {dropout}: evaluating on the way moves the trained weights by {changed[dropout]:.2g}")
assert changed[0.0] == 0 and changed[0.1] > 1e-6
assert torch.equal(train(0.1, True), train(0.1, True)), "each is reproducible by itself"
torch.manual_seed(0)
first = torch.rand(1)
torch.manual_seed(0)
list(DataLoader(range(4)))
second = torch.rand(1)
print(f"torch.rand after a seed: {first.item():.4f}; with a pass over an unshuffled DataLoader before it: {second.item():.4f}")
assert first != second
PY
cd "$dir"
if ! venv/bin/python check.py > said.txt 2> errors.txt; then
    cat said.txt errors.txt
    exit 1
fi
grep -v "^{'" said.txt
echo "observed as described"
