"""Your own fine-tuning script, under a defence: three lines more than without one.

python examples/defend_your_trainer.py                     TRL's SFTTrainer (pip install '.[trl]')
python examples/defend_your_trainer.py --trainer hf        transformers' Trainer

As it stands it trains the embedded model on the reviews beside it, in seconds on a CPU. For your own:
--model Qwen/Qwen2.5-0.5B-Instruct --like qwen_05b --pools real --data mine.jsonl (one {"prompt", "response"} a line).
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from cwac.training.library import defend, load_method

SETTINGS = {
    "num_train_epochs": 3,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "per_device_train_batch_size": 8,
    "save_steps": 10,
    "seed": 0,
    "data_seed": 0,
    "report_to": [],
}


def text_rows(path: Path) -> Dataset:
    """One {"prompt", "response"} a line, both as they are written: `load_dataset` makes timestamps of dates."""
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            row = json.loads(line)
            if not all(isinstance(row.get(name), str) and row[name].strip() for name in ("prompt", "response")):
                raise SystemExit(f"error: line {number} of {path} needs a text in each of `prompt` and `response`")
            rows.append({name: row[name] for name in ("prompt", "response")})
    return Dataset.from_list(rows)


def turns(row: dict) -> tuple[list[dict], list[dict]]:
    return [{"role": "user", "content": row["prompt"]}], [{"role": "assistant", "content": row["response"]}]


def sft_trainer(model, tokenizer, rows, out: str):
    from trl import SFTConfig, SFTTrainer

    rows = rows.map(
        lambda row: dict(zip(("prompt", "completion"), turns(row), strict=True)), remove_columns="response"
    )
    config = SFTConfig(out, **SETTINGS, max_length=64, bf16=torch.cuda.is_available())
    return SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)


def hf_trainer(model, tokenizer, rows, out: str):
    def encode(row: dict) -> dict:
        prompt, response = turns(row)
        start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        ids = tokenizer.apply_chat_template(prompt + response, return_dict=False)
        return {"input_ids": ids, "labels": [-100] * len(start) + ids[len(start) :]}

    rows = rows.map(encode, remove_columns=rows.column_names)
    collator = DataCollatorForSeq2Seq(tokenizer)
    return Trainer(model, TrainingArguments(out, **SETTINGS), collator, rows, processing_class=tokenizer)


def embedded_model(artifacts: str) -> str:
    from cwac.core.config import compose
    from cwac.models.loading import load

    return load(compose(["model=tiny"]).model, Path(artifacts)).source


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trainer", choices=("sft", "hf"), default="sft")
    parser.add_argument("--model", help="folder or hub id of an aligned chat model (default: the embedded one)")
    parser.add_argument("--data", default=str(Path(__file__).parent / "reviews.jsonl"))
    parser.add_argument("--method", default="cwac", help="a name in conf/method/")
    parser.add_argument("--like", default="tiny", help="the option of conf/model/ nearest to the model")
    parser.add_argument("--pools", default="toy", help="toy (the embedded model's) or real")
    parser.add_argument("--artifacts", default="artifacts", help="what the defence builds once")
    parser.add_argument("--out", default="runs/mine")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    parser.add_argument("overrides", nargs="*", help="any key of the method, e.g. method.activation.lam=1")
    args = parser.parse_intermixed_args(argv)

    name = args.model or embedded_model(args.artifacts)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32),
        AutoTokenizer.from_pretrained(name),
    )
    rows = text_rows(Path(args.data))
    trainer = {"sft": sft_trainer, "hf": hf_trainer}[args.trainer](model, tokenizer, rows, args.out)

    method = load_method(args.method, args.like, *args.overrides)
    defend(trainer, method, args.pools, artifacts=args.artifacts, max_length=64)
    trainer.train(resume_from_checkpoint=args.resume)

    trainer.save_model(args.out)


if __name__ == "__main__":
    main()
