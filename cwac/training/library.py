"""The project as a library: a defence for a script that brings its own model, data and HF or TRL trainer.

method = load_method("cwac", "qwen")
defend(trainer, method, pools="real")
trainer.train()
"""

from __future__ import annotations

import difflib
import functools
import json
import logging
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from transformers import PreTrainedTokenizerBase, Trainer, set_seed

from cwac.core.cache import digest
from cwac.core.config import compose, instantiate
from cwac.core.errors import UsageError, UserError
from cwac.core.paths import CONF
from cwac.core.validation import validate
from cwac.data.examples import Example, Messages, Pools
from cwac.data.pools import load_pools
from cwac.data.tokenize import IGNORE, encode_example
from cwac.methods.base import Method
from cwac.models.adapters import holds_update
from cwac.models.context import Context, make_context
from cwac.models.generate import decoding_key
from cwac.models.loading import Loaded, weights_hash
from cwac.training.arguments import refuse_deepspeed, total_steps
from cwac.training.engine import MethodTrainer, attach, collated

AS_ARGUMENTS = (
    (r"\+?model\.base=", "base="),
    (r"paths\.data", "data"),
    (r" \(model\.kind=[^)]*\)", ""),
    (r"model\.lora='\{[^}]*\}'", "an adapter (peft's get_peft_model)"),
    (r"model\.lora", "an adapter"),
    (r"model\.dtype=", "dtype="),
    (r"\btrain\.(?!py\b)", ""),
)
"""Keys of train.py that errors name -> what a script gives instead, an argument of `defend` or of its trainer."""

MODEL_INPUTS = {"input_ids", "attention_mask", "labels", "shift_labels", "position_ids", "token_type_ids"}
"""Keys of a batch that a method's own batches have, or a model does without."""


def speaks_of_arguments(function: Callable) -> Callable:
    """Errors of the function name arguments of a script's, not keys of train.py."""

    @functools.wraps(function)
    def call(*given, **named):
        try:
            return function(*given, **named)
        except UserError as error:
            said = str(error)
            for key, argument in AS_ARGUMENTS:
                said = re.sub(key, argument, said)
            raise type(error)(said) from error.__cause__

    return call


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodedRow(Example):
    """The place of one of the user's rows, which is token ids already, among a method's training rows."""

    given: Any = field(default=None, compare=False, repr=False)
    """The dataset it stands in."""

    @property
    def encoded(self) -> dict:
        """The row itself, `input_ids` and perhaps `labels`, for a method that reads tokens."""
        return self.given[int(self.id)]

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
            for name, value in (("attention_mask", 1), ("token_type_ids", 0)):
                if name in given[0]:
                    row[name] = [value] * len(row["input_ids"])
            if any(label != IGNORE for label in row["labels"]):
                self.places.append(row)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> dict:
        place = self.places[i]
        return self.given[place] if isinstance(place, int) else place

    def added(self) -> dict | None:
        """One row that the method added, the longest; None where all of them were too long to be trained on."""
        return max(
            (p for p in self.places if isinstance(p, dict)), key=lambda row: len(row["input_ids"]), default=None
        )


class KeptLabels:
    """The user's collator, which makes labels of all tokens (causal language modelling), around rows that have some.

    The user's rows are labelled as before; those of a method keep their labels, none on a prompt.
    """

    def __init__(self, collate: Callable):
        self.collate = collate

    def __call__(self, rows: Sequence[dict]) -> dict:
        batch = self.collate([{k: v for k, v in row.items() if k != "labels"} for row in rows])
        for i, row in enumerate(rows):
            if "labels" in row:
                real = batch["attention_mask"][i].bool()  # [T], padded on whichever side
                batch["labels"][i] = IGNORE
                batch["labels"][i, real] = torch.as_tensor(row["labels"])
        return batch


def take_added_rows(trainer: Trainer, mixed: Mixed, method: Method) -> None:
    """See to it that the user's collator takes the rows that a method adds, beside the user's and alone.

    Raises UsageError where it needs columns that they do not have, or changes their tokens or labels.
    """
    given, added = mixed.given[0], mixed.added()
    if added is None:
        return
    if trouble := added_row_trouble(trainer, given, added):
        if "labels" in given:
            raise UsageError(f"method={method.name} adds rows, and the trainer's data_collator {trouble}")
        collate, trainer.data_collator = trainer.data_collator, KeptLabels(trainer.data_collator)
        if trouble := added_row_trouble(trainer, given, added):
            trainer.data_collator = collate
            raise UsageError(f"method={method.name} adds rows, and the trainer's data_collator {trouble}")


def added_row_trouble(trainer: Trainer, given: dict, added: dict) -> str:
    """What the collator does to an added row that it should not; empty where it takes it as it is."""
    lacks = sorted(set(given) - set(added) - {"labels"})
    for place, rows in ((0, [added]), (1, [given, added]), (0, [added, given])):
        try:
            batch = collated(trainer, rows)
            ids, labels = (batch[name][place] for name in ("input_ids", "labels"))
        except Exception as error:  # whatever a collator of the user's own raises
            also = f"; the user's rows also have {', '.join(lacks)}, which it may need" if lacks else ""
            return (
                f"cannot take them ({type(error).__name__}: {error}){also}; give a collator that takes rows of "
                f"{', '.join(added)}, such as transformers' DataCollatorForSeq2Seq"
            )
        if not _within(added["input_ids"], ids.tolist()):  # beside padding on either side
            return "changes their tokens (mlm=True does); give one that leaves input_ids as they are"
        if [i for i in labels.tolist() if i != IGNORE] != [i for i in added["labels"] if i != IGNORE]:
            return (
                "does not keep their labels, so that prompts would be trained on; give one that keeps the labels of a "
                "row, such as transformers' DataCollatorForSeq2Seq"
            )
    return ""


def _within(part: Sequence[int], whole: Sequence[int]) -> bool:
    n = len(part)
    return any(list(whole[i : i + n]) == list(part) for i in range(len(whole) - n + 1))


def check_swapped_batches(trainer: Trainer, method: Method) -> None:
    """Raises UsageError where the user's batches have keys that those of the method do not."""
    try:
        own = sorted(set(collated(trainer, [trainer.train_dataset[0]])) - MODEL_INPUTS)
    except Exception:  # the user's own collator on the user's own row: training says what is wrong
        return
    if own:
        raise UsageError(
            f"method={method.name} puts batches of refusals in the place of the trainer's, without their "
            f"{', '.join(own)}; leave these columns out, or choose a method that does not"
        )


def options(group: str) -> list[str]:
    """The names that can be chosen of a group of `conf`."""
    return sorted(path.stem for path in (CONF / group).glob("[!_]*.yaml"))


def nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}? " if close else ""


def load_method(name: str, model: str, *overrides: str) -> Method:
    """The defence that `train.py method=<name> model=<model>` would run.

    model: the option of conf/model nearest to yours: its SAE sizes, safety layers and trigger length are used, its
    weights are not. overrides: as on the command line, e.g. "method.activation.lam=1".
    Raises UsageError, one line, for a value out of range, and for an unknown option or key.
    """
    for group, option in (("method", name), ("model", model)):
        known = options(group)
        if option not in known:
            raise UsageError(f"{group}={option} is unknown; {nearest(str(option), known)}there are {', '.join(known)}")
    try:
        cfg = compose([f"method={name}", f"model={model}", *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        said = str(error).splitlines()[0].rstrip(".")
        wrong = re.search(r"'([\w.]+)'", said)
        keys = [f"method.{key}" for key in compose([f"method={name}", f"model={model}"]).method]
        hint = nearest(wrong[1], keys) if wrong else ""
        raise UsageError(f"{said}; {hint}overrides are keys of the method, e.g. method.lam=1") from error
    validate(cfg)
    return instantiate(cfg.method)


def speaks(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what decides, beside weights and prompts, what a model reads and answers: artifacts depend on it."""
    settings = model.config.to_diff_dict() | {"vocabulary": sorted(tokenizer.get_vocab().items())}
    said = {k: v for k, v in settings.items() if k not in ("_name_or_path", "transformers_version", "use_cache")}
    said |= {"template": tokenizer.chat_template, "special": tokenizer.special_tokens_map}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    split = {} if backend is None else json.loads(backend.to_str())
    # a tokenizer remembers how it was last called
    said["tokenizer"] = {k: v for k, v in split.items() if k not in ("padding", "truncation")}
    said["generation"] = model.generation_config.to_diff_dict() if hasattr(model, "generation_config") else None
    return digest(json.loads(json.dumps(said, default=str)))


@speaks_of_arguments
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
    if not isinstance(method, Method):
        example = method if isinstance(method, str) else "cwac"
        raise UsageError(f"defend takes a method, not {method!r}; give load_method({example!r}, <model>)")
    if not isinstance(trainer, Trainer):
        raise UsageError(f"defend takes a Trainer of transformers' or a subclass, not {type(trainer).__name__}")
    if not isinstance(pools, str | Pools):
        raise UsageError(f"pools={pools!r} is neither a preset (real, toy) nor of type Pools")
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
    adapters = getattr(trainer.model, "peft_config", {}).values()
    virtual = [adapter for adapter in adapters if adapter.is_prompt_learning]
    if virtual and type(method) is not Method:
        raise UserError(
            f"method={method.name} reads the model at the tokens of a row, and {type(virtual[0]).__name__} puts "
            "virtual tokens before them; train another kind of adapter"
        )
    if isinstance(pools, str):
        pools = preset_pools(pools, data, args.seed, tokenizer)
    model = trainer.model
    # an adapter that has learnt nothing yet is none: all of its seeds share what is built
    key = {"kind": "library", "weights": weights_hash(model, adapter=holds_update(model)), "dtype": str(model.dtype)}
    key |= decoding_key(model)
    key["speaks"] = speaks(model, tokenizer)
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
    rows = [EncodedRow(str(i), "", given=dataset) for i in range(len(dataset) if sized else 0)]
    mixed = method.training_data(rows, context, random.Random(f"method-{args.seed}"))
    swaps = type(method).batch is not Method.batch
    if mixed != rows and not sized:
        raise UsageError(f"method={method.name} adds rows, which a dataset without a length cannot take")
    if (mixed != rows or swaps) and (getattr(args, "packing", False) or getattr(args, "padding_free", False)):
        raise UsageError(f"method={method.name} works on single rows; set packing=False and padding_free=False")
    if swaps and sized:
        check_swapped_batches(trainer, method)
    if mixed != rows:
        with_added = Mixed(dataset, mixed, context)
        take_added_rows(trainer, with_added, method)
        trainer.train_dataset = with_added
    context.steps = total_steps(args, len(trainer.train_dataset) if sized else 0)
    trainer.model = trainer.model_wrapped = method.setup(model, context) or model
    asked = [{"role": "user", "content": "prompt"}]
    if method.prompt(asked) != asked:
        log.warning(
            "method=%s changes the prompts that are served: pass every one through method.prompt(messages), or what "
            "it trains will not show",
            method.name,
        )
    set_seed(args.seed)  # whether an artifact was built on the way or found must not move what training draws
    trainer = attach(trainer, method)
    trainer.expected_steps = context.steps
    return trainer


def preset_pools(name: str, data: str | None, seed: int, tokenizer: PreTrainedTokenizerBase) -> Pools:
    """The pools of a preset; raises UsageError for an unknown one, or words that are not the model's language."""
    known = options("pools")
    if name not in known:
        raise UsageError(f"pools={name!r} is unknown; {nearest(name, known)}there are {', '.join(known)}")
    from cwac.models.tiny import make_tokenizer

    embedded = make_tokenizer().get_vocab().keys() <= tokenizer.get_vocab().keys()
    if embedded != (name == "toy"):
        raise UsageError(
            "pools='toy' is written in the words of the embedded model, which this model was not aligned on; give "
            "pools='real' (with data=<folder> where the hub is out of reach), or Pools of your own"
            if name == "toy"
            else f"pools={name!r} has words that the embedded model lacks; give pools='toy', or Pools of your own"
        )
    return load_pools(compose([f"pools={name}"]).pools, data, seed)
