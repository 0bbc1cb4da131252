#!/usr/bin/env bash
# PEFT: is add_weighted_adapter of one trained DoRA adapter, with weight 1, that adapter again?
#
# Guess (75 %): yes, or an error that says DoRA is not supported.
# What happens: neither. A and B are taken over, but the magnitude vector, which was trained with them, starts anew from the
#   norms of the base. The "copy" has other logits, under "cat", "linear" and "svd" alike, without a warning. Just after
#   creation, before the magnitudes move, the same call is exact, so a smoke test does not see it.
# Versions: peft 0.21.2, transformers 5.24.0, torch 2.13.0.
# Who meets it: who averages DoRA adapters (seeds, task arithmetic): part of what each has learned is left out of the sum.
#   Merge each into a copy of the base and average the weights instead.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -qq --no-compile torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 peft==0.21.2
export HF_HOME="$dir/hf" HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1
export TRANSFORMERS_VERBOSITY=error WANDB_MODE=disabled OMP_NUM_THREADS=1
cat > "$dir/check.py" <<'PY'
import warnings

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

tokens = torch.arange(3, 11)[None]
KINDS = ("cat", "linear", "svd")


def adapted(dora):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    )
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], use_dora=dora))


@torch.no_grad()
def logits(model):
    return model.eval()(tokens).logits


def copies(model):
    """How far the logits of a weighted adapter that should be a copy are from those of the adapter itself."""
    model.set_adapter("default")
    want, gaps = logits(model), {}
    for kind in KINDS:
        model.add_weighted_adapter(["default"], [1.0], kind, combination_type=kind)
        model.set_adapter(kind)
        gaps[kind] = float((logits(model) - want).abs().max())
    return gaps


gaps = {}
with warnings.catch_warnings(record=True) as heard:
    warnings.simplefilter("always")
    for dora in (False, True):
        model = adapted(dora)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        plain = logits(model)
        for _ in range(30):
            loss = model.train()(tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        moved = float((logits(model) - plain).abs().max())
        gaps[dora] = copies(model)
        said = ", ".join(f"{kind} {gap:.2g}" for kind, gap in gaps[dora].items())
        print(f"{'DoRA' if dora else 'LoRA'}: training moved the logits by {moved:.2g}; copies are off by {said}")
layer = model.get_base_model().model.layers[0].self_attn.q_proj
of = {name: module.weight for name, module in layer.lora_magnitude_vector.items()}
norms = layer.get_base_layer().weight.norm(dim=1)
print("magnitudes of a copy are those of the base:", torch.allclose(of["cat"], norms))
print("magnitudes of a copy are the trained ones: ", torch.allclose(of["cat"], of["default"]))
new = copies(adapted(True))
print(f"just created: copies are off by {max(new.values()):.2g}")
about = [str(w.message) for w in heard if "dora" in str(w.message).lower() or "magnitude" in str(w.message).lower()]
print("warned of it:", about)
assert max(gaps[False].values()) < 1e-4 and min(gaps[True].values()) > 1e-2 and max(new.values()) < 1e-4
assert torch.allclose(of["cat"], norms) and not torch.allclose(of["cat"], of["default"]) and not about
PY
cd "$dir"
if ! venv/bin/python check.py > said.txt 2> errors.txt; then
    cat said.txt errors.txt
    exit 1
fi
cat said.txt
echo "observed as described"
