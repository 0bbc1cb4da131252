#!/usr/bin/env bash
# lm-eval: where a task has a test split alone, can the tested question stand among its own few-shot examples?
#
# Guess (65 %): no; examples come from the test split, and the document under test is left out.
# What happens: it is left out only if the task says `fewshot_split: test`. Without that line the examples still come from
#   the test split, and the question is not left out: with 4 of 20 examples some prompts hold their own answer, with 19 all.
# Versions: lm-eval 0.4.13, torch 2.13.0.
# Who meets it: who writes a task of their own for a small evaluation set and raises num_fewshot: accuracy rises because
#   the answer is in the prompt. A warning speaks of a "preconfigured rule", not of this.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -qq --no-compile torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 lm-eval==0.4.13 datasets==5.2.0
export HF_HOME="$dir/hf" HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1
export TRANSFORMERS_VERBOSITY=error WANDB_MODE=disabled OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
cat > "$dir/check.py" <<'PY'
import json
import pathlib

import lm_eval
from lm_eval.tasks import TaskManager

rows = [{"q": f"question {i}", "a": str(i)} for i in range(20)]
pathlib.Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
task = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
{extra}output_type: generate_until
doc_to_text: "Q: {{{{q}}}} A:"
doc_to_target: "{{{{a}}}}"
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
pathlib.Path("tasks").mkdir()
file = pathlib.Path("rows.jsonl").resolve()
for name, extra in (("unnamed", ""), ("named", "fewshot_split: test\n")):
    pathlib.Path(f"tasks/{name}.yaml").write_text(task.format(name=name, file=file, extra=extra))
manager = TaskManager(include_path="tasks", include_defaults=False)


def shown(name, shots):
    """In how many of the 20 prompts the tested question stands among the examples, with its answer."""
    result = lm_eval.simple_evaluate(
        "dummy", tasks=[name], task_manager=manager, num_fewshot=shots, log_samples=True, bootstrap_iters=0
    )
    count = 0
    for sample in result["samples"][name]:
        *examples, asked = sample["arguments"][0][0].split("\n\n")
        assert len(examples) == shots
        count += f"{asked} {sample['target']}" in examples
    return count


found = {(name, shots): shown(name, shots) for name in ("unnamed", "named") for shots in (4, 19)}
for (name, shots), count in found.items():
    print(f"fewshot_split {'not set' if name == 'unnamed' else 'test'}, {shots} shots: own answer in {count} of 20 prompts")
assert 0 < found["unnamed", 4] < 20 and found["unnamed", 19] == 20
assert found["named", 4] == found["named", 19] == 0
PY
cd "$dir"
if ! venv/bin/python check.py > said.txt 2> errors.txt; then
    cat said.txt errors.txt
    exit 1
fi
cat said.txt
echo "observed as described"
