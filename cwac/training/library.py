"""The project as a library: a defence for a script that brings its own model, data and HF or TRL trainer.

method = load_method("cwac", "qwen")
defend(trainer, method, pools="real")
trainer.train()
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, Trainer, set_seed

from cwac.core.config import compose, instantiate
from cwac.core.errors import UsageError, UserError
from cwac.core.validation import validate
from cwac.data.examples import Example, Messages, Pools
from cwac.data.pools import load_pools
from cwac.data.tokenize import IGNORE, encode_example
from cwac.methods.base import Method
from cwac.models.context import Context, make_context
from cwac.models.loading import Loaded, weights_hash
from cwac.training.arguments import refuse_deepspeed, total_steps
from cwac.training.engine import MethodTrainer, attach


class EncodedRow(Example):
    """The place of one of the user's rows, which is token ids already, among a method's training rows."""

    @property
    def messages(self) -> Messages:
        raise UserError(
            "this method reads the training rows as text, which an encoded dataset no longer has; train it with "
            "train.py, or change its configuration (method=salora: method.task_rank=null)"
        )


class Mixed(torch.utils.data.Dataset):
    """The user's encoded rows in a method's order, with the rows it adds."""

    def __init__(self, given, examples: list[Example], context: Context):
        self.given, self.places = given, []
        for example in examples:
            if isinstance(example, EncodedRow):
                self.places.append(int(example.id))
                continue
            row = encode_example(context.tokenizer, example, context.template, context.max_length)
            if "attention_mask" in given[0]:
                row["attention_mask"] = [1] * len(row["input_ids"])
            if any(label != IGNORE for label in row["labels"]):
                self.places.append(row)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> dict:
        place = self.places[i]
        return self.given[place] if isinstance(place, int) else place


def load_method(name: str, model: str, *overrides: str) -> Method:
    """The defence that `train.py method=<name> model=<model>` would run.

    model: the option of conf/model nearest to yours: its SAE sizes, safety layers and trigger length are used, its
    weights are not. overrides: as on the command line, e.g. "method.activation.lam=1".
    Raises UsageError for a value out of range, Hydra's errors for an unknown option.
    """
    cfg = compose([f"method={name}", f"model={model}", *overrides])
    validate(cfg)
    return instantiate(cfg.method)


def defend(
    trainer: Trainer,
    method: Method,
    pools: Pools | str = "real",
    *,
    data: str | None = None,
    artifacts: str | Path = "artifacts",
    template: str = "chat",
    max_length: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    base: str | None = None,
) -> MethodTrainer:
    """Set `method` up on the trainer's model, which must still hold the aligned weights, and hook it in, in place.

    After it, `trainer.train()` trains under the defence, its checkpoints hold the method's state, and
    `resume_from_checkpoint` goes on from one. Serve prompts through `method.prompt(messages)`: BEA adds its trigger.

    pools: a preset of conf/pools, `real` (from the hub, or the folder `data` laid out like it) or `toy` (for the
    embedded model), or your own. artifacts: folder of the cache of what the method builds. template: `chat` or
    `alpaca`, as your rows are rendered. max_length: of a row in tokens; the trainer's own (TRL), else 512. tokenizer:
    where the trainer has none. base: folder or hub id of the model before its alignment (AsFT, Safe LoRA).

    Raises UserError, before anything is trained, where the trainer, the model or the pools do not serve the method.
    """
    args = trainer.args
    tokenizer = tokenizer or trainer.processing_class
    if tokenizer is None:
        raise UsageError("the trainer has no processing_class; give defend(..., tokenizer=)")
    if isinstance(trainer, MethodTrainer):
        raise UsageError(f"the trainer is under method={trainer.method.name} already; make a new one")
    if trainer.model_init is not None:
        raise UsageError(
            "model_init makes a new model when training starts, without the defence; give Trainer a model"
        )
    refuse_deepspeed(args, method)
    if isinstance(pools, str):
        pools = load_pools(compose([f"pools={pools}"]).pools, data, args.seed)
    model = trainer.model
    key = {"kind": "library", "weights": weights_hash(model, adapter=False), "dtype": str(model.dtype)}
    context = make_context(
        Loaded(model, tokenizer, key, model.config._name_or_path, base),
        pools,
        artifacts,
        seed=args.seed,
        template=template,
        max_length=max_length or getattr(args, "max_length", None) or 512,
        process_rank=args.process_index,
        world_size=args.world_size,
    )
    dataset = trainer.train_dataset
    sized = hasattr(dataset, "__len__")
    if not sized and args.max_steps <= 0:
        raise UsageError("a dataset without a length needs max_steps in the trainer's arguments")
    rows = [EncodedRow(str(i), "") for i in range(len(dataset) if sized else 0)]
    mixed = method.training_data(rows, context, random.Random(f"method-{args.seed}"))
    swaps = type(method).batch is not Method.batch
    if mixed != rows and not sized:
        raise UsageError(f"method={method.name} adds rows, which a dataset without a length cannot take")
    if (mixed != rows or swaps) and (getattr(args, "packing", False) or getattr(args, "padding_free", False)):
        raise UsageError(f"method={method.name} works on single rows; set packing=False and padding_free=False")
    if mixed != rows:
        trainer.train_dataset = Mixed(dataset, mixed, context)
    context.steps = total_steps(args, len(trainer.train_dataset) if sized else 0)
    method.setup(model, context)
    set_seed(args.seed)  # whether an artifact was built on the way or found must not move what training draws
    return attach(trainer, method)
