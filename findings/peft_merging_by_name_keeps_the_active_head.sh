#!/usr/bin/env bash
# PEFT: is merge_and_unload(adapter_names=["second"]) the model that set_adapter("second") gives, while another is active?
#
# Guess (75 %): yes; the argument names the adapters to merge, whichever are active.
# What happens: only for the LoRA part. A module that each adapter has a full copy of (modules_to_save, the LM head here) is
#   taken from the active adapter. The plain model has the second adapter's layers under the first one's head, and its logits
#   are those of neither. No warning. set_adapter("second") before merging gives the second model exactly.
# Versions: peft 0.21.2, transformers 5.24.0, torch 2.13.0.
# Who meets it: who exports several adapters with a trained head or embedding from one loaded model, such as a loop over
#   adapter names: every export but the active one's is a mixture.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -qq --no-compile torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 peft==0.21.2
export HF_HOME="$dir/hf" HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1
export TRANSFORMERS_VERBOSITY=error WANDB_MODE=disabled OMP_NUM_THREADS=1
cat > "$dir/check.py" <<'PY'
import copy
import warnings

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

tokens = torch.arange(3, 11)[None]
torch.manual_seed(0)
base = LlamaForCausalLM(
    LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
)
config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
model = get_peft_model(base, config, adapter_name="first")
model.add_adapter("second", config)
with torch.no_grad():  # stands for training: both adapters differ from the base and from each other
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.add_(0.1 * torch.randn_like(parameter))


@torch.no_grad()
def logits(model):
    return model.eval()(tokens).logits


want, heads = {}, {}
for name in ("second", "first"):  # "first" stays active
    model.set_adapter(name)
    want[name] = logits(model)
    heads[name] = model.get_base_model().lm_head.modules_to_save[name].weight.clone()
with warnings.catch_warnings(record=True) as heard:
    warnings.simplefilter("always")
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=["second"])
gap = {name: float((logits(merged) - there).abs().max()) for name, there in want.items()}
whose = [name for name, head in heads.items() if torch.equal(merged.lm_head.weight, head)]
print(f"merged adapter_names=['second']: logits off by {gap['second']:.2g} from the second model, {gap['first']:.2g} from the first")
print("the merged model's head is that of:", whose)
print("warned:", [str(w.message)[:60] for w in heard])
with torch.no_grad():
    merged.lm_head.weight.copy_(heads["second"])
rest = float((logits(merged) - want["second"]).abs().max())
print(f"with the second head put in by hand: off by {rest:.2g}")
model.set_adapter("second")
after = float((logits(model.merge_and_unload()) - want["second"]).abs().max())
print(f"set_adapter('second') first: off by {after:.2g}")
assert whose == ["first"] and not heard
assert min(gap.values()) > 1e-2 and rest < 1e-5 and after < 1e-5
PY
cd "$dir"
if ! venv/bin/python check.py > said.txt 2> errors.txt; then
    cat said.txt errors.txt
    exit 1
fi
cat said.txt
echo "observed as described"
