#!/usr/bin/env bash
# TRL with PEFT: what is DPOTrainer's reference where the model carries an adapter that was trained before and no ref_model?
#
# Guess (65 %): the base without the adapter, as the known recipe has it: the adapter is switched off for the reference.
# What happens: the trainer adds a second adapter, `ref`, a copy of the one it was given. The first loss is ln 2 although
#   the adapter has moved the model away from its base; adapters listed afterwards are `default` and `ref`.
# Versions: trl 1.16.0, peft 0.21.2, transformers 5.24.0, torch 2.13.0.
# Who meets it: an alignment stage (SFT, then DPO) on one adapter. Its KL term now holds to the SFT model and not to the
#   base, so results do not compare with runs of older releases, and code that iterates over lora_ parameters finds twice
#   as many.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -qq --no-compile torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 trl==1.16.0 peft==0.21.2 datasets==5.2.0
export HF_HOME="$dir/hf" HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1
export TRANSFORMERS_VERBOSITY=error WANDB_MODE=disabled OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
cat > "$dir/check.py" <<'PY'
import math

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *"abcdefghij"])}
backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
backend.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
)
pairs = [{"prompt": "a b", "chosen": " c", "rejected": " d"}] * 2
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
)
model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
with torch.no_grad():  # stands for an adapter that an earlier stage, such as SFT, has trained
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.5)


@torch.no_grad()
def margin():
    """log p(chosen) - log p(rejected) of the first answer token."""
    ids = torch.tensor([tokenizer("a b")["input_ids"]])
    scores = model.eval()(ids).logits[0, -1].log_softmax(-1)
    return float(scores[vocabulary["c"]] - scores[vocabulary["d"]])


with_adapter = margin()
with model.disable_adapter():
    without = margin()
print(f"margin of chosen over rejected: {without:+.3f} without the adapter, {with_adapter:+.3f} with it")
args = DPOConfig(
    output_dir="out", beta=1.0, use_cpu=True, bf16=False, report_to=[], save_strategy="no", logging_steps=1,
    per_device_train_batch_size=2, num_train_epochs=1, gradient_checkpointing=False, disable_tqdm=True,
)
trainer = DPOTrainer(model, args=args, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)
adapters = sorted(trainer.model.peft_config)
trainer.train()
first = trainer.state.log_history[0]
against_base = math.log1p(math.exp(-(with_adapter - without)))  # of the first token alone
print("adapters of the model in training:", adapters)
print(f"first loss {first['loss']:.4f} (ln 2 = {math.log(2):.4f}); against the bare base it would be near {against_base:.2f}")
assert adapters == ["default", "ref"]
assert abs(first["loss"] - math.log(2)) < 1e-4 and first["rewards/chosen"] == 0
assert abs(against_base - math.log(2)) > 0.05
PY
cd "$dir"
if ! venv/bin/python check.py > said.txt 2> errors.txt; then
    cat said.txt errors.txt
    exit 1
fi
grep -v "^{'" said.txt
echo "observed as described"
