#!/usr/bin/env bash
# PEFT: does PeftModel.from_pretrained on a base that still carries another `default` adapter give the saved model?
#
# Guess (60 %): yes; the new `default` replaces the old one, which the warning about several adapters is about.
# What happens: only where both name the same modules. Modules that the earlier adapter had and the saved one has not
#   (v_proj here) keep the earlier adapter, active, while the configuration lists the saved one's modules alone. The logits
#   are those of neither model. unload() first gives the saved model exactly.
# Versions: peft 0.21.2, transformers 5.24.0, torch 2.13.0.
# Who meets it: loops over adapters with one base in memory, such as an evaluation of several cells. get_peft_model changes
#   the base in place, so letting go of the wrapper does not clean it.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -qq --no-compile torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 peft==0.21.2
export HF_HOME="$dir/hf" HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1
export TRANSFORMERS_VERBOSITY=error WANDB_MODE=disabled OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
cat > "$dir/check.py" <<'PY'
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

tokens = torch.arange(3, 11)[None]


def base():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    )


def adapter(model, modules, seed):
    model = get_peft_model(model, LoraConfig(r=4, target_modules=modules)).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    return model


@torch.no_grad()
def logits(model):
    return model.eval()(tokens).logits


wanted = adapter(base(), ["q_proj"], 1)
wanted.save_pretrained("saved")
used = base()
adapter(used, ["q_proj", "v_proj"], 2)  # an earlier cell of the same process; `used` itself carries its layers now
with warnings.catch_warnings(record=True) as heard:
    warnings.simplefilter("always")
    mixed = PeftModel.from_pretrained(used, "saved")
fresh = PeftModel.from_pretrained(base(), "saved")
modules = sorted({n.split("self_attn.")[1].split(".")[0] for n, _ in mixed.named_parameters() if "lora_A" in n})
gap = {name: float((logits(m) - logits(wanted)).abs().max()) for name, m in (("fresh", fresh), ("used", mixed))}
print("adapter configuration after loading:", sorted(mixed.peft_config), mixed.peft_config["default"].target_modules)
print("modules with an active adapter:", modules)
print(f"logits against the saved model: on a fresh base off by {gap['fresh']:.2g}, on the used one by {gap['used']:.2g}")
print("warned:", [str(w.message).split(".")[0] for w in heard if "peft_config" in str(w.message)])
clean = adapter(base(), ["q_proj", "v_proj"], 2).unload()
after = float((logits(PeftModel.from_pretrained(clean, "saved")) - logits(wanted)).abs().max())
print(f"after unload() first: off by {after:.2g}")
assert mixed.peft_config["default"].target_modules == {"q_proj"} and modules == ["q_proj", "v_proj"]
assert gap["fresh"] < 1e-6 and gap["used"] > 1e-3 and after < 1e-6
PY
cd "$dir"
if ! venv/bin/python check.py > said.txt 2> errors.txt; then
    cat said.txt errors.txt
    exit 1
fi
cat said.txt
echo "observed as described"
