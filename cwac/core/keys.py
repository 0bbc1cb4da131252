"""Which keys a configuration may have, and which key a mistyped one may have meant.

A key that nothing reads is refused, wherever it came from (`+key=value`, a preset, `conf/local`). Otherwise a mistyped
option would give a run under a new name whose settings are the plain ones, and it would pass for a result. Known keys
are those of the files in `conf/`, those in `OPTIONAL`, and those that classes check themselves (`CHECKED`). Imports
neither torch nor transformers.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from cwac.core.errors import UsageError
from cwac.core.files import LOADER
from cwac.core.identity import flatten
from cwac.core.paths import CONF
from cwac.core.renamed import RENAMED

GROUPS = ("train", "pools", "task", "model", "method", "eval", "logger")
"""Groups whose files hold keys of the same group. The files of all other groups may set any key."""

NAMED = ("method", "model", "task", "pools", "eval/judge")
"""Groups whose files hold a `name`, which stands in run ids, rows and tables; it is that of the file."""

ROOT = (*GROUPS, "values", "variant", "attack", "chosen", "local", "parallel", "scale", "experiment")
"""Top-level keys that come from the defaults list of `conf/config.yaml`."""

OPTIONAL = (
    *(f"model.{key}" for key in ("path", "base", "base_revision", "revision", "attention", "safety_layers")),
    *(f"model.{key}" for key in ("trigger_tokens", "n_train", "hub_id", "license")),
    *(f"model.sae.{key}" for key in ("fallback", "harmful_share", "lr", "warmup", "decay", "clip", "auxk")),
    *(f"model.sae.{key}" for key in ("dead_after", "center", "buffer_gib", "backend", "seed", "renorm_every")),
    *(f"model.sae.{key}" for key in ("schedule", "corpus", "corpus_text", "corpus_config", "max_repeats")),
    *(f"pools.{key}" for key in ("take", "beavertails_split", "poison_categories")),
    *(f"task.{key}" for key in ("n_held_out", "replace", "aliases", "response", "label", "text", "instruction")),
)
"""Keys that the code reads although not every YAML file sets them."""

CHECKED = (
    *("method", "train", "objective", "eval.judge", "eval.vllm.options"),
    *("model.lora", "model.shape", "task.aliases"),
    *("variant", "picks", "search"),  # from which presets compute values
)
"""Keys that may have any key below them: these go to a class or function that refuses what it does not know, or are
passed to another library as they are."""

ONLY_WITH = {
    "model.path": ("folder",),
    "model.base": ("folder", "gguf", "hub"),
    "model.base_revision": ("folder", "gguf", "hub"),
}
"""Key -> the values of `model.kind` with which it is read."""

SYNONYMS = {
    "harmful_ratio": ("p", "ratio", "poison_ratio", "harmful_share", "poison_rate"),
    "train.learning_rate": ("lr", "learning_rate", "rate"),
    "train.num_train_epochs": ("epochs", "epoch", "num_epochs", "n_epochs"),
    "train.max_steps": ("steps", "num_steps", "n_steps"),
    "train.per_device_train_batch_size": ("batch_size", "bs", "train_batch_size", "batch"),
    "train.gradient_accumulation_steps": ("grad_accum", "accumulation_steps"),
    "train.weight_decay": ("weight_decay", "wd"),
    "train.max_length": ("max_length", "max_len", "max_seq_length", "cutoff_len"),
    "train.lr_scheduler_type": ("scheduler", "lr_scheduler"),
    "task.n_train": ("n_train", "num_samples", "n_samples", "max_samples"),
    "method": ("methods", "defense", "defence", "defenses", "defences"),
    "model": ("models", "model_name", "model_name_or_path", "base_model"),
    "task": ("tasks", "dataset", "dataset_name", "datasets"),
    "seed": ("seeds", "random_seed"),
    "experiment": ("experiments", "preset"),
    "eval/judge": ("judges", "judge_name"),
    "model.lora": ("lora", "peft"),
    "model.dtype": ("dtype", "torch_dtype", "precision"),
    "paths.runs": ("output_dir", "out", "output", "out_dir", "save_dir", "runs"),
    "paths.data": ("data", "data_dir", "data_path"),
    "paths.artifacts": ("artifacts", "cache_dir"),
}
"""Key -> the last part of its name in other programs. These are tried before names that look alike."""


@functools.cache
def leaves() -> dict[str, list[Any]]:
    """Every key in the files of `conf/`, by full name -> the values that the files give it."""
    found: dict[str, list[Any]] = {}

    def add(prefix: str, path) -> None:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=LOADER)
        content = {k: v for k, v in (content or {}).items() if k not in ("defaults", "hydra")}
        for key, value in flatten(content, prefix).items():
            found.setdefault(key, []).append(value)

    add("", CONF / "config.yaml")
    for group in GROUPS:
        for path in sorted((CONF / group).glob("*.yaml")):
            add(group, path)
    for path in sorted((CONF / "eval" / "judge").glob("*.yaml")):
        add("eval.judge", path)
    return found


@functools.cache
def known() -> frozenset[str]:
    return frozenset([*leaves(), *ROOT, *OPTIONAL])


@functools.cache
def parents() -> frozenset[str]:
    """The keys that are groups of other keys."""
    return frozenset(key.rsplit(".", n)[0] for key in known() for n in range(1, key.count(".") + 1))


@functools.cache
def booleans() -> frozenset[str]:
    return frozenset(k for k, v in leaves().items() if all(isinstance(x, bool) for x in v))


@functools.cache
def sources() -> frozenset[str]:
    """Names of the data sets that the pools are made from."""
    return frozenset(key.split(".")[2] for key in leaves() if key.startswith("pools.shares."))


def below(key: str, prefixes: Iterable[str]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def unread(cfg: DictConfig) -> Iterator[str]:
    """The keys of a composed configuration that nothing reads, by full name."""
    container = OmegaConf.to_container(cfg, resolve=False)
    shared = [f"pools.{key}.{source}" for key in ("shares", "take") for source in sources()]
    text = ""
    for key in flatten(container):
        if key in known() or key in parents() or below(key, (*CHECKED, *shared)):
            continue
        top = key.split(".")[0]
        text = text or str(container)
        # a user's own key is read if another value interpolates it
        own = top not in parents() and re.search(rf"\$\{{(oc\.\w+:)?{re.escape(top)}[.}},:]", text)
        if not own:
            yield key


def check_keys(cfg: DictConfig) -> None:
    """Raises UsageError for a key that nothing reads, in a wrong place, or with a wrong kind of value.

    Checked are: keys that nothing reads; a single value where a group of keys belongs; anything but true and false for
    a boolean key; and keys that the chosen kind of model does not read (`ONLY_WITH`).
    """
    for key in unread(cfg):
        value = OmegaConf.select(cfg, key)
        raise UsageError(f"{key}={value} is read by nothing (conf/README.md has the keys){meant(key)}")
    for key in sorted(parents() - {"method"}):
        if key.startswith("method.") or key in ("model.lora", "task.aliases"):
            continue
        value = OmegaConf.select(cfg, key)
        if value is not None and not OmegaConf.is_dict(value):
            if (CONF / key.replace(".", "/")).is_dir():
                group = key.replace(".", "/")
                raise UsageError(
                    f"{key}={value} is no value: choose one of the options with {group}={nearest(str(value), group)}"
                )
            inside = sorted({k.removeprefix(f"{key}.").split(".")[0] for k in known() if k.startswith(f"{key}.")})
            raise UsageError(f"{key}={value} is no value: {key} is a group of keys ({', '.join(inside)})")
    for key in sorted(booleans()):
        if not key.startswith("method."):
            value = OmegaConf.select(cfg, key, default=True)
            if not isinstance(value, bool):
                raise UsageError(f"{key}={value} is neither true nor false; give one of the two")
    for key, kinds in ONLY_WITH.items():
        if OmegaConf.select(cfg, key) is not None and cfg.model.kind not in kinds:
            raise UsageError(
                f"{key}={OmegaConf.select(cfg, key)} is read with model.kind={' or '.join(kinds)} alone, and "
                f"model={cfg.model.name} is of kind {cfg.model.kind}; add model.kind={kinds[0]}, or leave it out"
            )


def check_names(choices: Mapping[str, Any]) -> None:
    """Raises UsageError where the file of a chosen option has another name than its own, or none of its own.

    Its runs would stand under the name of another option: of the one that was copied or that it derives from. A name
    given on the command line (`method.name=...`) is meant.

    choices: group -> chosen option; one without a file in `conf/`, or with a base file (`_hub`), is not looked at.
    """
    for group in NAMED:
        path = CONF / group / f"{choices.get(group)}.yaml"
        if not path.is_file() or path.stem.startswith("_"):  # what others derive from is no option
            continue
        name = (yaml.load(path.read_text(encoding="utf-8"), Loader=LOADER) or {}).get("name")
        if name is None or str(name) != path.stem:
            said = "has no name of its own" if name is None else f"has name: {name}"
            raise UsageError(
                f"{group}={path.stem}: conf/{group}/{path.name} {said}, and runs and tables would call it by a name "
                f"that is not the file's; write name: {path.stem} there"
            )


def options(group: str) -> list[str]:
    """The options of a group that have a file, such as those of `method` or `eval/judge`."""
    return sorted(path.stem for path in (CONF / group).glob("[!_]*.yaml"))


def nearest(name: str, group: str) -> str:
    """The options of a group as a comma-separated text, those most similar to a name first."""
    there = options(group)
    close = difflib.get_close_matches(name, there, n=3, cutoff=0.5)
    return ", ".join([*close, *(o for o in there if o not in close)])


def near(name: str, candidates: Iterable[str]) -> list[str]:
    """At most three of the candidates whose whole text or last part resembles the name; the best one first."""

    def last(text: str) -> str:
        return re.split(r"[./]", text)[-1]

    def alike(a: str, b: str) -> float:
        return difflib.SequenceMatcher(None, a.lower(), b.lower()).ratio()

    name = str(name)
    scores = {c: max(alike(name, c), alike(last(name), last(c)) - 0.1) for c in map(str, candidates) if c != name}
    best = max(scores.values(), default=0.0)
    close = [c for c in scores if scores[c] >= max(0.66, best - 0.08)]
    return sorted(close, key=lambda c: (-scores[c], c))[:3]


def did_you_mean(names: Iterable[str]) -> str:
    """`; did you mean a or b?`, to end an error message with; an empty text where there are no names."""
    names = list(names)
    return f"; did you mean {' or '.join(names)}?" if names else ""


def meant(key: str) -> str:
    """A `did_you_mean` for a key that does not exist."""
    if synonym := same_as(key):
        return did_you_mean([synonym])
    groups = {str(path.relative_to(CONF)) for path in CONF.rglob("*") if path.is_dir()}
    return did_you_mean(near(key, {*known(), *parents(), *groups} - {"chosen", "local"}))


def same_as(key: str) -> str | None:
    """The key that other programs call by this name, alone or within its group (`lr`, `train.lr`); None if none."""
    group, _, name = key.rpartition(".")
    found = (ours for ours, others in SYNONYMS.items() if name in others and group in ("", ours.rpartition(".")[0]))
    return next(found, None)


def dashed(arguments: Iterable[str]) -> str:
    """What is wrong with a setting in the form of an option (`--lr 1e-5`), which Hydra has none of; '' where none is.

    arguments: those of `train.py`. Hydra's own flags are left to it, and beginnings of them that are no key's name:
    `--p 0.1` would be its `--package`, and a run at another p than was meant.
    """
    from hydra._internal.utils import get_args_parser

    flags, arguments = get_args_parser()._option_string_actions, [*arguments]
    for place, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if not re.fullmatch(r"--[A-Za-z][\w./-]*", option) or option in flags:
            continue
        following = next(iter(arguments[place + 1 :]), "-")
        if not equals:
            value = "<value>" if following.startswith("-") or "=" in following else following
        name = option[2:].replace("-", "_")
        name = RENAMED.get(name, name)
        key = name if name in {*known(), *parents(), "experiment"} else same_as(name)
        if not key and any(flag.startswith(option) for flag in flags):
            continue
        remedy = f"; write {key}={value}" if key else meant(name) or "; python train.py --help lists the keys"
        return f"{option}: settings are written key=value, without dashes{remedy}"
    return ""


def explain(message: str) -> str:
    """Rewrite Hydra's error about an unknown option or key as one line, the most similar names first.

    Any other message is returned unchanged. Hydra itself advises to append an unknown key with `+`, which would start
    a run with the mistyped key.
    """
    if found := re.search(r"Could not find '([\w/.-]+)/([^'/]+)'", message):
        group, name = found.groups()
        if (CONF / group).is_dir():
            # Hydra's list also has options without a file, such as experiment=tune_<method>
            listed = re.findall(r"^\t([^_\s]\S*)$", message, re.M) or options(group)
            missing = f"Could not find '{group}/{name}'"
            if group == "experiment" and name.startswith("tune_"):
                return f"{missing}; {no_search(name.removeprefix('tune_'), listed)}"
            close = did_you_mean(f"{group}={o}" for o in near(name, listed))
            return f"{missing}{close}{'' if close else ';'} {group} has {', '.join(listed)}"
    if found := re.search(r"Interpolation key 'search\.(layers\.)?([^']+)' not found", message):
        of, name = found.groups()
        if not of:
            return no_search(name)
        return (
            f"conf/experiment/tune.yaml has no blocks of model={name} for method=sppft to search; add a line under "
            f"search.layers, such as `{name}: choice(auto,[0,1],[1,2])`, with six choices (docs/searches.md)"
        )
    if found := re.search(r"Could not override '([^']+)'", message):
        key = found[1]
        if below(key, ("train",)) and key.removeprefix("train.") in training_fields():
            return f"Could not override '{key}': no yaml sets it yet; append it with +{key}=<value>"
        if key in OPTIONAL:
            return f"Could not override '{key}': this option does not set it yet; append it with +{key}=<value>"
        return f"Could not override '{key}': there is no such key{meant(key)}"
    if found := re.search(r"Ambiguous value for argument '([^']+)'", message):
        typed = found[1]
        other = f" (and {meant(key)[2:]})" if (key := typed.partition("=")[0]) not in known() and meant(key) else ""
        return f"{typed} gives several values, which a sweep takes: add -m; a value that is a list is [a,b]{other}"
    if found := re.search(r"Error parsing override '([^'=]*)'\s+missing EQUAL", message):
        key = found[1].lstrip("+")
        there = key in {*known(), *parents()}
        return f"{key} has no value: settings are written key=value, without a space{'' if there else meant(key)}"
    if found := re.search(r"An item is already at '([^']+)'", message):
        return f"Could not append '{found[1]}': it is there already; leave out the +: {found[1]}=<value>"
    return message


def no_search(name: str, listed: Iterable[str] = ()) -> str:
    """What to do where a method has no line in `conf/experiment/tune.yaml`.

    name: the method, perhaps mistyped. listed: the options of `experiment`, from which a near search is named.
    """
    if (CONF / "experiment" / f"tune_{name}.yaml").is_file():  # with axes of its own beside a setting that they need
        return f"the search of method={name} has a preset of its own: experiment=tune_{name} (docs/searches.md)"
    if name not in options("method"):
        searched = [option.removeprefix("tune_") for option in listed if option.startswith("tune_")]
        close = [f"experiment=tune_{method}" for method in near(name, searched)]
        close = close or [f"experiment=tune method={method}" for method in near(name, options("method"))]
        needs = f"conf/method/{name}.yaml and a line in conf/experiment/tune.yaml (docs/searches.md)"
        found = f"{did_you_mean(close)} ".removeprefix("; ").lstrip()
        return f"{found}experiment=tune method={name} is a search that needs {needs}"
    return (
        f"conf/experiment/tune.yaml has no search space of method={name}; add a line under search, such as "
        f'`{name}: {{<<: *seeds, method.KEY: "choice(0.01,0.03,0.1,0.3,1.0,3.0)"}}`, where KEY is a key of the '
        f"method; then experiment=tune method={name} searches it (docs/searches.md)"
    )


def training_fields() -> set[str]:
    from dataclasses import fields

    from transformers import TrainingArguments

    return {f.name for f in fields(TrainingArguments)}
