#!/usr/bin/env bash
# datasets: what happens to a JSON Lines column that holds a number in one row and text in another?
#
# Guess (65 %): an error, as Arrow columns have one type. Once told that release 5 has a Json type: then it is used wherever
#   the two rows stand (60 %).
# What happens: within one chunk of 10 MB the column becomes Json and both values come back as they were. Where the text
#   first comes in a later chunk, the type has been fixed as int64 by then and loading fails, streamed or not.
# Versions: datasets 5.2.0, pyarrow 26.0.1.
# Who meets it: answers such as 7 and "seven" in one file. A sample of the file, or the same rows shuffled, loads; the whole
#   file does not, and whether it does depends on the length of the rows in between.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -qq --no-compile datasets==5.2.0 pyarrow==26.0.1
export HF_HOME="$dir/hf" HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1
export TRANSFORMERS_VERBOSITY=error WANDB_MODE=disabled OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
cat > "$dir/check.py" <<'PY'
import json

from datasets import load_dataset


def write(name, rows):
    with open(name, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read(name, **options):
    try:
        rows = load_dataset("json", data_files=name, split="train", **options)
        return str(rows.features["answer"]), [row["answer"] for row in rows][-2:]
    except Exception as error:
        return type(error).__name__, str(error.__cause__ or error).splitlines()[0]


filler = "x" * 1000
write("near.jsonl", [{"text": "t", "answer": 7}, {"text": "t", "answer": "seven"}])
write("far.jsonl", [{"text": filler, "answer": 7}] * 12_000 + [{"text": "t", "answer": "seven"}])
near, far, streamed = read("near.jsonl"), read("far.jsonl"), read("far.jsonl", streaming=True)
print("number and text within 10 MB:  ", near)
print("the text after the first 10 MB:", far)
print("the same, streamed:            ", streamed)
assert near == ("Json(decode=True)", [7, "seven"])
assert far[0] == "DatasetGenerationError" and "seven" in far[1]
assert streamed[0] == "ArrowInvalid" and "seven" in streamed[1]
PY
cd "$dir"
if ! venv/bin/python check.py > said.txt 2> errors.txt; then
    cat said.txt errors.txt
    exit 1
fi
cat said.txt
echo "observed as described"
