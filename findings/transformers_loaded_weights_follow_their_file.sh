#!/usr/bin/env bash
# transformers with safetensors: does a model in memory change when its file is overwritten by another model's (`cp`)?
#
# Guess (60 %): no; from_pretrained has copied the weights by the time it returns.
# What happens: where the dtype is the file's own, parameters are views into the mapped file. After the overwrite the model
#   in memory computes exactly the other model's logits. So does a copy that was trained in between: shortening the file, as
#   cp does before it writes, throws away the process's own changed pages too. Cast or cloned weights are safe, and so is
#   save_pretrained into the same folder, which puts a new file in the old one's place.
# Versions: transformers 5.24.0, safetensors 0.8.0, torch 2.13.0, on Linux.
# Who meets it: campaigns that share a folder of models. Whoever copies a new alignment over the old one while cells train
#   from it swaps the weights under them; the logged losses show a jump and no error.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -qq --no-compile torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
export HF_HOME="$dir/hf" HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1
export TRANSFORMERS_VERBOSITY=error WANDB_MODE=disabled OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
cat > "$dir/check.py" <<'PY'
import shutil

import torch
from transformers import LlamaConfig, LlamaForCausalLM

tokens = torch.arange(3, 11)[None]
for seed in (0, 1):
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    LlamaForCausalLM(config).save_pretrained(f"model{seed}")
models = {
    "loaded as it is": LlamaForCausalLM.from_pretrained("model0").eval(),
    "loaded and trained": LlamaForCausalLM.from_pretrained("model0").eval(),
    "loaded as bfloat16": LlamaForCausalLM.from_pretrained("model0", dtype=torch.bfloat16).eval(),
    "loaded and cloned": LlamaForCausalLM.from_pretrained("model0").eval(),
}
for parameter in models["loaded and cloned"].parameters():
    parameter.data = parameter.data.clone()
optimizer = torch.optim.SGD(models["loaded and trained"].parameters(), lr=0.1)
models["loaded and trained"](tokens, labels=tokens).loss.backward()
optimizer.step()
other = LlamaForCausalLM.from_pretrained("model1").eval()


@torch.no_grad()
def logits(model):
    return model(tokens).logits.float()


before = {name: logits(model) for name, model in models.items()}
shutil.copyfile("model1/model.safetensors", "model0/model.safetensors")  # an overwrite, as `cp` makes it
state = {}
for name, model in models.items():
    after = logits(model)
    state[name] = (
        "unchanged" if torch.equal(after, before[name]) else "the other model" if torch.equal(after, logits(other)) else "?"
    )
    print(f"{name}: {state[name]}")
assert state == {
    "loaded as it is": "the other model",
    "loaded and trained": "the other model",
    "loaded as bfloat16": "unchanged",
    "loaded and cloned": "unchanged",
}
PY
cd "$dir"
if ! venv/bin/python check.py > said.txt 2> errors.txt; then
    cat said.txt errors.txt
    exit 1
fi
cat said.txt
echo "observed as described"
