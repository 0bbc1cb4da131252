#!/usr/bin/env bash
# PEFT with transformers 5: what does LoRA's target_modules="all-linear" adapt in a mixture-of-experts model?
#
# Guess (75 %): the nn.Linear modules, so attention alone, because transformers 5 fuses the experts into 3-D parameters and
#   the router is a parameter too. And naming gate_proj, up_proj and down_proj gives the experts nothing, silently (65 %).
# What happens: PEFT translates the names of the older layout. Every expert and the router get an adapter through
#   `target_parameters`, and the one on the fused gate_up_proj has twice the rank and twice the alpha that were asked for.
# Versions: peft 0.21.2, transformers 5.24.0, torch 2.13.0.
# Who meets it: who compares methods at "LoRA r=4, all-linear" across dense and expert models: the router is trained, the
#   number of trained parameters grows with the number of experts, and code that looks for adapted nn.Linear modules, to
#   constrain or to merge them, does not see the experts' adapters.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -qq --no-compile torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 peft==0.21.2
export HF_HOME="$dir/hf" HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1
export TRANSFORMERS_VERBOSITY=error WANDB_MODE=disabled OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
cat > "$dir/check.py" <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
mixtral = MixtralConfig(**sizes, intermediate_size=64, num_local_experts=4)
qwen = Qwen3MoeConfig(**sizes, intermediate_size=64, moe_intermediate_size=16, num_experts=4, head_dim=8)


def adapted(model, targets):
    """Which matrices got an adapter, with the shape of its A."""
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=4, target_modules=targets))
    shapes = {
        name.split("layers.0.")[1].split(".lora_A")[0]: tuple(p.shape)
        for name, p in wrapped.named_parameters()
        if "lora_A" in name
    }
    return shapes, wrapped.peft_config["default"]


linear = [n.split("layers.0.")[1] for n, m in MixtralForCausalLM(mixtral).named_modules()
          if isinstance(m, torch.nn.Linear) and n != "lm_head"]
shapes, config = adapted(MixtralForCausalLM(mixtral), "all-linear")
print("nn.Linear modules of the block:", ", ".join(linear))
print("Mixtral, all-linear:           ", shapes)
print("the adapter's configuration:    target_parameters =", sorted(config.target_parameters),
      "rank_pattern =", config.rank_pattern, "alpha_pattern =", config.alpha_pattern)
assert sorted(linear) == [f"self_attn.{x}_proj" for x in "koqv"]
assert shapes["mlp.gate"] == (4, 32), "the router"
assert shapes["mlp.experts"] == (4 * 4, 64), "down_proj: rank 4 for each of 4 experts"
assert shapes["mlp.experts.base_layer"] == (4 * 8, 32), "gate_up_proj: rank 8"
assert set(config.rank_pattern.values()) == {8} and set(config.alpha_pattern.values()) == {8}

by_name, _ = adapted(Qwen3MoeForCausalLM(qwen), ["q_proj", "gate_proj", "up_proj", "down_proj"])
print("Qwen3-MoE, by the old names:   ", by_name)
assert by_name == {"self_attn.q_proj": (4, 32), "mlp.experts.base_layer": (4 * 8, 32), "mlp.experts": (4 * 4, 16)}
PY
cd "$dir"
if ! venv/bin/python check.py > said.txt 2> errors.txt; then
    cat said.txt errors.txt
    exit 1
fi
cat said.txt
echo "observed as described"
