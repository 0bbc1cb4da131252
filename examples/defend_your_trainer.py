"""Your own fine-tuning script, under a defence: three lines more than without one.

python examples/defend_your_trainer.py                         transformers' Trainer
python examples/defend_your_trainer.py --trainer sft           TRL's SFTTrainer (pip install '.[trl]' in the checkout)
python examples/defend_your_trainer.py --model smollm2 --rows mine.jsonl --data FOLDER
python examples/defend_your_trainer.py --model Qwen/Qwen2.5-0.5B-Instruct --like qwen_05b --rows mine.csv

As it stands it trains the embedded model on the reviews beside it, in seconds on a CPU. Rows of your own are JSON
lines of {"prompt", "response"}, of {"messages"} or of Alpaca's columns, or a table of them (docs/defend.md); the
embedded model reads only its own words, so give a real one with them. `python -m experiments.measure tiny runs/mine
--pools toy` says whether the model still refuses, and with `--rows held_out.jsonl` whether it has learnt the task.
"""

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint

from cwac import defend, hf_trainer, load_method, packaged_model, text_rows
from cwac.core.config import Parser, about, command
from cwac.core.errors import UsageError
from cwac.training.library import check_data, check_option, nearest, options
from cwac.training.script import SETTINGS, turns


def sft_trainer(model, tokenizer, rows, out: str, max_length: int, **settings):
    from trl import SFTConfig, SFTTrainer

    rows = rows.map(
        lambda row: dict(zip(("prompt", "completion"), turns(row), strict=True)), remove_columns="response"
    )
    bf16 = torch.cuda.is_available()
    config = SFTConfig(out, **{**SETTINGS, **settings}, max_length=max_length, bf16=bf16)
    return SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)


@command
def main(argv: list[str] | None = None) -> int:
    parser = Parser(**about(__doc__))
    parser.add_argument("--trainer", choices=("hf", "sft", "trl"), default="hf", help="sft and trl: TRL's SFTTrainer")
    parser.add_argument("--model", default="tiny", help="tiny, smollm2, qwen_coder_05b, a folder, or a hub id")
    reviews = str(Path(__file__).parent / "reviews.jsonl")
    parser.add_argument("--rows", default=reviews, metavar="FILE", help="what is trained on: .jsonl or .csv")
    parser.add_argument("--method", default="cwac", help="a name in conf/method/")
    parser.add_argument("--like", help="the option of conf/model/ nearest to the model (default: its name)")
    parser.add_argument("--pools", help="the defence's prompts (default: toy for the embedded model, else real)")
    parser.add_argument("--data", metavar="FOLDER", help="laid out like the hub, read instead of it for --pools")
    parser.add_argument("--max-length", type=int, help="of a row in tokens (default: 64 for the embedded model, 512)")
    parser.add_argument("--learning-rate", type=float, default=SETTINGS["learning_rate"], help="default: %(default)g")
    parser.add_argument("--epochs", type=float, default=SETTINGS["num_train_epochs"], help="default: %(default)g")
    parser.add_argument("--artifacts", default="artifacts", help="what the defence builds once")
    parser.add_argument("--out", default="runs/mine")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    parser.add_argument("overrides", nargs="*", help="any key of the method, e.g. method.energy=0.999")
    args = parser.parse_intermixed_args(argv)

    # what is wrong with the arguments is said before a model is loaded
    for key in ("learning_rate", "epochs"):
        if not 0 < getattr(args, key) < float("inf"):
            raise UsageError(f"--{key.replace('_', '-')} {getattr(args, key):g} is not a number above 0")
    if args.max_length is not None and args.max_length < 1:
        raise UsageError(f"--max-length {args.max_length} is not a number of at least 1")
    if args.resume and not (Path(args.out).is_dir() and get_last_checkpoint(args.out)):
        raise UsageError(
            f"--resume: {args.out} holds no checkpoint; leave it out, or give the --out of the stopped run"
        )
    if args.trainer != "hf" and importlib.util.find_spec("trl") is None:
        raise UsageError(f"--trainer {args.trainer} needs TRL: pip install '.[trl]' in the checkout, or --trainer hf")
    like = args.like or args.model
    if args.like:
        check_option(f"--like {like}", like, "model")
    if like not in (known := options("model")):
        raise UsageError(
            f"--model {like} needs --like, one of {', '.join(known)}; {nearest(like, known)}".rstrip("; ")
        )
    if args.pools:
        check_option(f"--pools {args.pools}", args.pools, "pools")
    check_data(args.data)
    rows = text_rows(args.rows)
    method = load_method(args.method, like, *args.overrides)

    packaged = args.model in options("model") and not Path(args.model).is_dir()
    name = packaged_model(args.model, args.artifacts) if packaged else args.model
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32),
        AutoTokenizer.from_pretrained(name),
    )
    length = args.max_length or (64 if like == "tiny" else 512)
    settings = {"learning_rate": args.learning_rate, "num_train_epochs": args.epochs}
    make = hf_trainer if args.trainer == "hf" else sft_trainer
    trainer = make(model, tokenizer, rows, args.out, length, **settings)

    pools = args.pools or ("toy" if like == "tiny" else "real")
    defend(trainer, method, pools, data=args.data, artifacts=args.artifacts, max_length=length)
    trainer.train(resume_from_checkpoint=args.resume)

    trainer.save_model(args.out)
    given = f"--pools {pools}" + (f" --data {args.data}" if args.data else "")
    print(f"saved in {args.out}. Did it hold? python -m experiments.measure {args.model} {args.out} {given}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
