#!/usr/bin/env bash
# TRL: what does SFTTrainer do with a prompt-completion row whose prompt alone fills max_length?
#
# Guess (65 %): it stays in the data set with all labels at -100. And if rows were dropped, a warning would say so (60 %).
# What happens: the row is left out of the training set, and no log line or warning says so. A row that keeps at least one
#   token of its completion stays.
# Versions: trl 1.16.0, transformers 5.24.0, datasets 5.2.0, torch 2.13.0.
# Who meets it: who mixes harmful and task rows at a ratio: long task prompts vanish, and the ratio trained on is higher
#   than the one configured. Number of steps and epochs change with it.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -qq --no-compile torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 trl==1.16.0 datasets==5.2.0
export HF_HOME="$dir/hf" HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1
export TRANSFORMERS_VERBOSITY=error WANDB_MODE=disabled OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
cat > "$dir/check.py" <<'PY'
import logging
import warnings

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

heard = []


class Listener(logging.Handler):
    def emit(self, record):
        heard.append(record.getMessage())


logging.captureWarnings(True)
for name in (None, "py.warnings", "trl", "transformers", "datasets", "accelerate"):
    logging.getLogger(name).addHandler(Listener())
vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *"abcdefghij"])}
backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
backend.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
)
rows = [
    {"prompt": "a b c d e f", "completion": " g"},  # fills max_length by itself
    {"prompt": "a b", "completion": " g"},
    {"prompt": "a b c d e", "completion": " g h"},  # keeps one of three tokens to learn
]
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
)
args = SFTConfig(output_dir="out", max_length=6, use_cpu=True, bf16=False, report_to=[], save_strategy="no")
trainer = SFTTrainer(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
kept = [tokenizer.decode(row["input_ids"]) for row in trainer.train_dataset]
told = [text for text in heard if any(word in text.lower() for word in ("drop", "remov", "skipp", "discard", "trunc"))]
print(f"{len(rows)} rows given, {len(kept)} trained on:", kept)
print("log lines and warnings about it:", told)
assert kept == ["a b g </s>", "a b c d e g"]
assert not told
PY
cd "$dir"
if ! venv/bin/python check.py > said.txt 2> errors.txt; then
    cat said.txt errors.txt
    exit 1
fi
cat said.txt
echo "observed as described"
