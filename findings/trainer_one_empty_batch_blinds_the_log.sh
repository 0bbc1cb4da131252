#!/usr/bin/env bash
# transformers' Trainer: what does one batch without any label token (all -100) do to a training?
#
# Guess (60 %): its loss is NaN, NaN gradients follow, and the weights are ruined.
# What happens: the gradients are zero and the weights stay finite and the same in both settings below. The log is what
#   breaks. With logging_nan_inf_filter off, every later loss and the final train_loss are NaN, since a running sum stays
#   NaN; with the filter on (default) the step is logged as 0.0, which pulls train_loss down from 4.2 to 3.3.
# Versions: transformers 5.24.0, torch 2.13.0.
# Who meets it: long prompts that fill max_length leave batches with nothing to learn. A guard that stops at a NaN loss ends
#   a training that was sound; a mean over the logged losses counts a zero.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -qq --no-compile torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
export HF_HOME="$dir/hf" HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1
export TRANSFORMERS_VERBOSITY=error WANDB_MODE=disabled OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
cat > "$dir/check.py" <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments


def row(i, learn):
    ids = [3 + (5 * i + j) % 60 for j in range(8)]
    return {"input_ids": ids, "labels": ids if learn else [-100] * 8}


def train(nan_filter):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    )
    args = TrainingArguments(
        output_dir="out", use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", logging_steps=1,
        per_device_train_batch_size=2, num_train_epochs=1, learning_rate=1e-3, train_sampling_strategy="sequential",
        logging_nan_inf_filter=nan_filter,
    )
    rows = [row(i, learn=i not in (4, 5)) for i in range(10)]  # the third of five batches has nothing to learn
    trainer = Trainer(model, args, train_dataset=rows)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    finite = all(bool(torch.isfinite(p).all()) for p in model.parameters())
    return losses, trainer.state.log_history[-1]["train_loss"], finite, [p.detach() for p in model.parameters()]


on, off = train(True), train(False)
for name, (losses, mean, finite, _) in (("filter on (default)", on), ("filter off", off)):
    print(f"{name}: losses {[round(x, 2) for x in losses]}, train_loss {mean:.2f}, weights finite: {finite}")
nan = [x != x for x in off[0]]
assert nan == [False, False, True, True, True] and off[1] != off[1]
assert on[0][2] == 0.0 and all(x > 3 for i, x in enumerate(on[0]) if i != 2)
assert on[2] and off[2] and all(torch.equal(a, b) for a, b in zip(on[3], off[3], strict=True))
PY
cd "$dir"
if ! venv/bin/python check.py > said.txt 2> errors.txt; then
    cat said.txt errors.txt
    exit 1
fi
grep -v "^{'" said.txt
echo "observed as described"
