#!/usr/bin/env bash
# transformers: does a normalizer or pre-tokenizer that one sets on a tokenizer survive save_pretrained and from_pretrained?
#
# Guess (75 %): yes; save_pretrained writes it into tokenizer.json, and that file is what is loaded.
# What happens: it is written, and `tokenizers` itself reads it back, but a tokenizer with a class of its own (GPT2Tokenizer,
#   Qwen2Tokenizer, LlamaTokenizer) takes vocabulary, merges and post-processor from the file and builds normalizer and
#   pre-tokenizer anew from its own code. The same text gets the ids of before the change, without a warning. The same file
#   under PreTrainedTokenizerFast (TokenizersBackend) keeps everything.
# Versions: transformers 5.24.0, tokenizers 0.23.3.
# Who meets it: who lowercases, or splits numbers into digits, before training on such a model: training sees the one
#   tokenization, and every later process that loads the saved folder the other.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -qq --no-compile transformers==5.24.0 tokenizers==0.23.3
export HF_HOME="$dir/hf" HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1
export TRANSFORMERS_VERBOSITY=error WANDB_MODE=disabled OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
cat > "$dir/check.py" <<'PY'
import json
import pathlib

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

text = "The CAT ran 12345 miles"
core = Tokenizer(models.BPE())
core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
trainer = trainers.BpeTrainer(
    vocab_size=340,
    special_tokens=["<|endoftext|>"],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
)
core.train_from_iterator(["the cat ran 12345 miles"] * 5, trainer)


def lowercase(backend):
    backend.normalizer = normalizers.Lowercase()


def digits(backend):
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer])


def end(backend):
    ends = [("<|endoftext|>", backend.token_to_id("<|endoftext|>"))]
    backend.post_processor = processors.TemplateProcessing(single="$A <|endoftext|>", special_tokens=ends)


def saved_and_loaded(name, model_type, change):
    """Whether the saved file, and the tokenizer loaded from it, give the changed ids."""
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>").save_pretrained("before")
    said = pathlib.Path("before/tokenizer_config.json")
    said.write_text(json.dumps(json.loads(said.read_text()) | {"tokenizer_class": name}))
    pathlib.Path("before/config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer = AutoTokenizer.from_pretrained("before")
    plain = tokenizer(text)["input_ids"]
    change(tokenizer.backend_tokenizer)
    changed = tokenizer(text)["input_ids"]
    assert changed != plain
    tokenizer.save_pretrained("after")
    pathlib.Path("after/config.json").write_text(json.dumps({"model_type": model_type}))
    assert Tokenizer.from_file("after/tokenizer.json").encode(text).ids == changed, "the change is in the file"
    ids = AutoTokenizer.from_pretrained("after")(text)["input_ids"]
    assert ids in (plain, changed)
    return type(tokenizer).__name__, "kept" if ids == changed else "lost"


found = {}
for name, model_type in (("GPT2Tokenizer", "gpt2"), ("PreTrainedTokenizerFast", "gpt2")):
    for change in (lowercase, digits, end):
        cls, fate = saved_and_loaded(name, model_type, change)
        found[name, change.__name__] = fate
        print(f"{cls}, {change.__name__}: in tokenizer.json; after loading {fate}")
cls, found["Qwen2Tokenizer", "lowercase"] = saved_and_loaded("Qwen2Tokenizer", "qwen2", lowercase)
print(f"{cls}, lowercase: in tokenizer.json; after loading {found['Qwen2Tokenizer', 'lowercase']}")
assert found == {
    ("GPT2Tokenizer", "lowercase"): "lost",
    ("GPT2Tokenizer", "digits"): "lost",
    ("GPT2Tokenizer", "end"): "kept",
    ("PreTrainedTokenizerFast", "lowercase"): "kept",
    ("PreTrainedTokenizerFast", "digits"): "kept",
    ("PreTrainedTokenizerFast", "end"): "kept",
    ("Qwen2Tokenizer", "lowercase"): "lost",
}
PY
cd "$dir"
if ! venv/bin/python check.py > said.txt 2> errors.txt; then
    cat said.txt errors.txt
    exit 1
fi
cat said.txt
echo "observed as described"
