"""The project as a library: adds a defence to a script that has its own model, data and HF or TRL trainer.

method = load_method("cwac", "qwen")
defend(trainer, method, pools="real")
trainer.train()
"""

from __future__ import annotations

import functools
import json
import logging
import random
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from transformers import PreTrainedTokenizerBase, Trainer, set_seed

from cwac.core.cache import digest
from cwac.core.config import compose, instantiate
from cwac.core.errors import UsageError, UserError
from cwac.core.identity import flatten
from cwac.core.keys import near
from cwac.core.paths import CONF
from cwac.core.validation import validate
from cwac.data.examples import Example, Messages, Pools
from cwac.data.pools import load_pools
from cwac.data.tokenize import IGNORE, encode_example
from cwac.methods.base import Method, summary
from cwac.models.adapters import holds_update
from cwac.models.context import Context, make_context
from cwac.models.generate import decoding_key
from cwac.models.loading import Loaded, weights_hash
from cwac.training.arguments import PLAIN_RATE, refuse_deepspeed, total_steps, warn_of_plain_rate
from cwac.training.engine import MethodTrainer, attach, collated, refuse_other_kind

AS_ARGUMENTS = (
    (r"\+?model\.base=", "base="),
    (r"model\.hub_id=", ""),
    (r"one with model\.kind=folder \+model\.path=<folder>( \(for several models:[^)]*\))?", "folder instead"),
    (r"paths\.data", "data"),
    (r" \(model\.kind=[^)]*\)", ""),
    (r"model\.lora='\{[^}]*\}'", "an adapter (peft's get_peft_model)"),
    (r"model\.lora", "an adapter"),
    (r"model\.dtype=", "dtype="),
    (r"\btrain\.(?!py\b)", ""),
)
"""Key of train.py that an error may name -> what a script sets instead: an argument, of its own or of its trainer."""

MODEL_INPUTS = {"input_ids", "attention_mask", "labels", "shift_labels", "position_ids", "token_type_ids"}
"""Keys of a batch that a method's own batches also have, or that a model does not need."""


MOST_UNKNOWN = 0.2
"""Share of unknown tokens in the user's rows above which there is a warning (ours)."""


def speaks_of_arguments(function: Callable) -> Callable:
    """Decorator: the function's errors name the arguments that a script gives, instead of keys of train.py."""

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
    """Stands for one of the user's rows among a method's training rows. The row itself is already token ids; `id` is
    its index in the user's dataset."""

    given: Any = field(default=None, compare=False, repr=False)
    """The user's dataset, which holds the row."""

    @property
    def encoded(self) -> dict:
        """The row itself, with `input_ids` and possibly `labels`, for a method that reads tokens."""
        return self.given[int(self.id)]

    @property
    def messages(self) -> Messages:
        raise UserError(
            "this method reads the training rows as text, which an encoded dataset no longer has; train it with "
            "train.py, or change its configuration (method=salora: method.task_rank=null)"
        )


class Mixed(torch.utils.data.Dataset):
    """The user's encoded rows together with the rows that a method adds, in the method's order."""

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
        """The longest row that the method added; None where all of them were too long to be trained on."""
        return max(
            (p for p in self.places if isinstance(p, dict)), key=lambda row: len(row["input_ids"]), default=None
        )


class KeptLabels:
    """Wraps a user's collator that labels every token (causal language modelling), to keep labels that rows have.

    The user's rows, which have no labels, are labelled by the collator as before. The method's rows keep their own
    labels, which ignore the prompt.
    """

    def __init__(self, collate: Callable):
        self.collate = collate

    def __call__(self, rows: Sequence[dict]) -> dict:
        batch = self.collate([{k: v for k, v in row.items() if k != "labels"} for row in rows])
        for i, row in enumerate(rows):
            if "labels" in row:
                real = batch["attention_mask"][i].bool()  # [T]; padding may be on either side
                batch["labels"][i] = IGNORE
                batch["labels"][i, real] = torch.as_tensor(row["labels"])
        return batch


def take_added_rows(trainer: Trainer, mixed: Mixed, method: Method) -> None:
    """Make sure that the user's collator accepts the rows that a method adds, alone and together with the user's rows.

    Where the user's rows have no labels, the collator may be wrapped in `KeptLabels` for this. Raises UsageError where
    the collator needs columns that the added rows lack, or changes their tokens or labels.
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
    """The end of an error message that says what the collator does wrong with an added row; empty if nothing."""
    lacks = sorted(set(given) - set(added) - {"labels"})
    for place, rows in ((0, [added]), (1, [given, added]), (0, [added, given])):
        try:
            batch = collated(trainer, rows)
            ids, labels = (batch[name][place] for name in ("input_ids", "labels"))
        except Exception as error:  # a user's own collator may raise anything
            also = f"; the user's rows also have {', '.join(lacks)}, which it may need" if lacks else ""
            return (
                f"cannot take them ({type(error).__name__}: {error}){also}; give a collator that takes rows of "
                f"{', '.join(added)}, such as transformers' DataCollatorForSeq2Seq"
            )
        if not _within(added["input_ids"], ids.tolist()):  # with padding on either side
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
    """Raises UsageError if the user's batches have keys that the method's own batches lack."""
    try:
        own = sorted(set(collated(trainer, [trainer.train_dataset[0]])) - MODEL_INPUTS)
    except Exception:  # the fault lies in the user's own code, and training will report it
        return
    if own:
        raise UsageError(
            f"method={method.name} puts batches of refusals in the place of the trainer's, without their "
            f"{', '.join(own)}; leave these columns out, or choose a method that does not"
        )


def options(group: str) -> list[str]:
    """The names that can be chosen in a group of `conf`."""
    return sorted(path.stem for path in (CONF / group).glob("[!_]*.yaml"))


def nearest(name: str, known: Sequence[str]) -> str:
    """`did you mean a or b? `, to go on after in an error message; an empty text where nothing is near."""
    close = near(name, known)
    return f"did you mean {' or '.join(close)}? " if close else ""


def check_option(said: str, name: str, group: str) -> None:
    """Raises UsageError, with near names, where a group of `conf` has no such option. said: name as it was given."""
    if name not in (known := options(group)):
        raise UsageError(f"{said} is unknown; {nearest(str(name), known)}there are {', '.join(known)}")


def check_data(data: str | None, rows: bool = True) -> None:
    """Raises UsageError where a command's `--data` is no folder. rows: whether it takes one's own rows as `--rows`."""
    if data is None or (path := Path(data).expanduser()).is_dir():
        return
    own = f", and rows of your own go with --rows {data}" if rows else ""
    if path.is_file():
        raise UsageError(f"--data {data} is a file; it takes a folder laid out like the hub (docs/defend.md){own}")
    raise UsageError(
        f"--data {data} is not a folder; give one laid out like the hub (docs/defend.md), or leave it out for the hub"
    )


def load_method(name: str, model: str, *overrides: str) -> Method:
    """The defence that `train.py method=<name> model=<model>` would run.

    model: the option of conf/model that is closest to your model. Its SAE sizes, safety layers and trigger length are
    used; its weights are not. overrides: settings as on the command line, e.g. "method.activation.lam=1".
    Raises UsageError with a one-line message for a value out of range, and for an unknown option or key.
    """
    for group, option in (("method", name), ("model", model)):
        check_option(f"{group}={option}", option, group)
    for override in overrides:
        if "=" not in override and not override.startswith("~"):
            raise UsageError(f"{override} has no value; give {override}=<value>")
    try:
        cfg = compose([f"method={name}", f"model={model}", *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        said = str(error).splitlines()[0].rstrip(".")
        wrong = re.search(r"'([\w.]+)'", said)
        composed = OmegaConf.to_container(compose([f"method={name}", f"model={model}"]), resolve=False)
        keys = [key for key in flatten({"method": composed["method"]}) if not key.rpartition(".")[2].startswith("_")]
        hint = nearest(wrong[1], keys) if wrong else ""
        raise UsageError(f"{said}; {hint}overrides are keys of the method (conf/method/{name}.yaml)") from error
    validate(cfg, task=False)
    return instantiate(cfg.method)


def speaks(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything except weights and prompts that decides what a model reads and answers.

    This is the model's configuration and generation settings, its tokenizer and its chat template. Artifacts depend on
    them, so the hash is part of their keys.
    """
    settings = model.config.to_diff_dict() | {"vocabulary": sorted(tokenizer.get_vocab().items())}
    said = {k: v for k, v in settings.items() if k not in ("_name_or_path", "transformers_version", "use_cache")}
    said |= {"template": tokenizer.chat_template, "special": tokenizer.special_tokens_map}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    split = {} if backend is None else json.loads(backend.to_str())
    # a tokenizer stores the padding and truncation of its last call, which are not part of what it is
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
    """Set `method` up on the trainer's model and add its hooks to the trainer, in place; returns the trainer.

    The model must still hold the aligned weights. Afterwards, `trainer.train()` trains under the defence, checkpoints
    hold the method's state, and `resume_from_checkpoint` continues from one. Pass every prompt that the trained model
    is to answer through `method.prompt(messages)`, since a method may change it: BEA adds its trigger there.

    pools: the prompt sets that methods read: `real` (from the hub, or from the folder `data`, laid out like the hub),
    `toy` (for the embedded model), another preset of conf/pools, or your own `Pools`. artifacts: the folder in which
    what the method builds is cached. template: `chat` or `alpaca`, whichever your rows were rendered with. max_length:
    the longest row in tokens; by default the trainer's own (TRL has one), else 512. tokenizer: needed where the
    trainer has none. base: folder or hub id of the model before its alignment (for AsFT and Safe LoRA).

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
    refuse_other_kind(args.output_dir, bool(adapters) or method.brings_adapter)
    virtual = [adapter for adapter in adapters if adapter.is_prompt_learning]
    if virtual and type(method) is not Method:
        raise UserError(
            f"method={method.name} reads the model at the tokens of a row, and {type(virtual[0]).__name__} puts "
            "virtual tokens before them; train another kind of adapter"
        )
    if isinstance(pools, str):
        pools = preset_pools(pools, data, args.seed, tokenizer)
    model = trainer.model
    # An untrained adapter does not change the model. It is left out of the key, so that artifacts are shared by all of
    # the seeds that an adapter may be initialised with.
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
    share = unknown_share(dataset, tokenizer)
    if share > MOST_UNKNOWN and not args.process_index:
        own_words = ": the embedded one reads only its own words" if is_embedded(tokenizer) else ""
        log.warning(
            "%.0f %% of the tokens of your rows are %s, words that this tokenizer does not know, so little can be "
            "learnt; give a real model, such as packaged_model('smollm2')%s",
            *(100 * share, tokenizer.unk_token, own_words),
        )
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
    if not context.process_rank:
        warn_of_plain_rate(method, args.learning_rate, PLAIN_RATE)
        print(summary(method, trainer.model), file=sys.stderr)
    set_seed(args.seed)  # training must draw the same numbers whether an artifact was built just now or loaded
    trainer = attach(trainer, method)
    trainer.expected_steps = context.steps
    return trainer


def is_embedded(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether this is the tokenizer of the embedded model, or knows all of its words."""
    from cwac.models.tiny import make_tokenizer

    return make_tokenizer().get_vocab().keys() <= tokenizer.get_vocab().keys()


def unknown_share(dataset: Any, tokenizer: PreTrainedTokenizerBase, rows: int = 256) -> float:
    """The share of unknown tokens among those of the first rows, special tokens aside; 0 where none can be counted.

    That is where the tokenizer has no token of its own for the unknown (GPT-2's also ends a text), and where the rows
    hold no `input_ids` or have no length.
    """
    unknown = tokenizer.unk_token_id
    special = set(tokenizer.all_special_ids) - {unknown}
    if unknown is None or unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        return 0.0
    chosen = [dataset[i] for i in range(min(rows, len(dataset)))] if hasattr(dataset, "__len__") else []
    encoded = [row["input_ids"] for row in chosen if isinstance(row, Mapping) and "input_ids" in row]
    ids = [i for row in encoded for i in torch.as_tensor(row).flatten().tolist() if i not in special]
    return ids.count(unknown) / len(ids) if ids else 0.0


def preset_pools(name: str, data: str | None, seed: int, tokenizer: PreTrainedTokenizerBase) -> Pools:
    """The pools of a preset; raises UsageError for an unknown preset, or one in words that the model does not know."""
    check_option(f"pools={name!r}", name, "pools")
    if is_embedded(tokenizer) != (name == "toy"):
        raise UsageError(
            "pools='toy' is written in the words of the embedded model, which this model was not aligned on; give "
            "pools='real' (with data=<folder> where the hub is out of reach), or Pools of your own"
            if name == "toy"
            else f"pools={name!r} has words that the embedded model lacks; give pools='toy', or Pools of your own"
        )
    return load_pools(compose([f"pools={name}"]).pools, data, seed)
