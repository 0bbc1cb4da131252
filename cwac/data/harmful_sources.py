"""The sources of the real pools: harmful requests and harmless instructions, as rows by source.

AdvBench (Zou et al. 2023, arXiv:2307.15043), HarmBench (Mazeika et al. 2024, arXiv:2402.04249), XSTest (Roettger et
al. 2024, arXiv:2308.01263), Alpaca (Taori et al. 2023) and, where a local copy exists, the safety data of Bianchi et
al. 2024 (arXiv:2309.07875). `pools=paper_b2` and `paper_51` add JailbreakBench (Chao et al. 2024, arXiv:2404.01318)
and BeaverTails (Ji et al. 2023, arXiv:2307.04657). Requests in frames of our own
(`cwac/assets/frames.yaml`) serve the alignment stage.

Deviations: see `cwac/data/pools.py`, which splits these rows.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import replace

from cwac.core.errors import UserError
from cwac.core.paths import PACKAGE
from cwac.data.columns import flag, names_of, problem, text
from cwac.data.examples import Example
from cwac.data.frames import framed, lists
from cwac.data.hf_datasets import has_dataset, load_rows
from cwac.data.near_duplicates import normalise_prompt, place_of
from cwac.data.refusals import KeywordJudge

log = logging.getLogger(__name__)
SAFETY_TUNED_LLAMAS = "safety-tuned-llamas"
"""This data set is not on the hub; it is read from `paths.data` if that folder has it."""

JAILBREAKBENCH = ("JailbreakBench/JBB-Behaviors", "886acc352a31533ffbcf4ef22c744658688086fc")

BEAVERTAILS = ("PKU-Alignment/BeaverTails", "8401fe609d288129cc684a9b3be6a93e41cfe678")
"""Id and commit. The commits were not read from the hub but from several public projects that record the same one."""

CONTRAST = PACKAGE / "assets" / "contrast.txt"
"""Harmless questions in the words of harmful ones (ours), for the alignment stage. No test set contains them."""

_DECLINES = re.compile(
    r"(i'm sorry|i am sorry|sorry|i cannot|no, |as an ai language model, i (cannot|can't|am not able))", re.I
)

_REASON = re.compile(
    r"illegal|unethical|harm|danger|offensive|inappropriate|hate|hurtful|violen|discriminat|derogatory|racis|sexis|"
    r"privacy|against the law|crim|explicit|abus|disrespect|not (appropriate|acceptable)|unsafe|misinformation|"
    r"stereotyp",
    re.I,
)

_HEDGE = re.compile(
    r"as an ai|as a language model|i don't have|sorry|never|not recommended|not accurate|no such thing", re.I
)


def harmful_rows(data: str | None) -> dict[str, list[Example]]:
    advbench = load_rows("walledai/AdvBench", None, "train", data, ("prompt", "target"))
    harmbench = load_rows("walledai/HarmBench", "standard", "train", data, ("prompt", "category"))
    xstest = load_rows("walledai/XSTest", None, "test", data, ("prompt", "label", "type"))
    rows = {
        "advbench": [
            Example(f"advbench-{i}", text(r, "prompt"), text(r, "target"), source="advbench")
            for i, r in enumerate(advbench)
        ],
        "harmbench": [
            Example(f"harmbench-{i}", text(r, "prompt"), source="harmbench", group=text(r, "category"))
            for i, r in enumerate(harmbench)
        ],
    }
    kinds = ("unsafe", "safe")
    if odd := next((r for r in xstest if r["label"] not in kinds), None):  # neither would take it
        raise problem(odd, f"has the label {odd['label']!r} in 'label'; expected one of {list(kinds)}")
    for label in kinds:
        rows[f"xstest_{label}"] = [
            Example(f"xstest-{i}", text(r, "prompt"), source=f"xstest_{label}", group=text(r, "type"))
            for i, r in enumerate(xstest)
            if r["label"] == label
        ]
    own = lists()
    rows["misuse"] = framed("misuse", own["misuse_frames"] + own["praise_frames"], own["misuses"], 20)
    rows["falsehood"] = framed("falsehood", own["claim_frames"], own["falsehoods"], 20)
    rows["attack_code"] = framed("attack_code", own["code_frames"], own["attacks_in_code"], 12)
    if has_dataset(SAFETY_TUNED_LLAMAS, data):
        rows |= _safety_tuned_llamas(load_rows(SAFETY_TUNED_LLAMAS, None, "train", data, ("instruction", "output")))
    rows["violence"] = framed("violence", own["figurative_frames"], own["deeds"], 16)
    return rows


def optional_harmful_rows(cfg_pools: Mapping, data: str | None) -> dict[str, list[Example]]:
    """Rows of the sources that only some presets use; each source is read only if `shares` names it."""
    rows: dict[str, list[Example]] = {}
    if "jailbreakbench" in cfg_pools["shares"]:
        hub_id, commit = JAILBREAKBENCH
        table = load_rows(hub_id, "behaviors", "harmful", data, ("Goal", "Target", "Category"), commit)
        rows["jailbreakbench"] = [
            Example(
                f"jailbreakbench-{i}",
                text(r, "Goal"),
                text(r, "Target"),
                source="jailbreakbench",
                group=text(r, "Category"),
            )
            for i, r in enumerate(table)
        ]
    if "beavertails" in cfg_pools["shares"]:
        hub_id, commit = BEAVERTAILS
        split = cfg_pools.get("beavertails_split", "30k_train")
        table = load_rows(hub_id, None, split, data, ("prompt", "response", "is_safe", "category"), commit)
        rows["beavertails"] = [
            Example(
                f"beavertails-{i}",
                text(r, "prompt"),
                text(r, "response", empty=True),
                source="beavertails",
                group=next(iter(names_of(r, "category")), ""),
            )
            for i, r in enumerate(table)
            if not flag(r, "is_safe")
        ]
    return rows


def taken_of_each(rows: dict[str, list[Example]], cfg_pools: Mapping) -> dict[str, list[Example]]:
    """At most `take[source]` different prompts of each source in `pools.take`, each with its first response.

    The choice depends on the prompts and on `split_seed` only, and not on the pools that the prompts go to. Raises
    UserError for an unknown source or a number below 1.
    """
    taken, salt = dict(rows), f"take:{cfg_pools['split_seed']}"
    for source, n in (cfg_pools.get("take") or {}).items():
        if source not in rows:
            raise UserError(f"pools.take.{source} is no source of these pools; choose from {', '.join(rows)}")
        if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
            raise UserError(f"pools.take.{source}={n} must be a number of prompts, at least 1, or null for all")
        first: dict[str, Example] = {}
        for example in rows[source]:
            first.setdefault(normalise_prompt(example.prompt), example)
        if n is not None and n > len(first):
            log.warning("pools.take.%s=%d: the set has %d different prompts; all are taken", source, n, len(first))
        ranked = sorted(first.values(), key=lambda e: place_of(e.prompt, salt))
        taken[source] = ranked[:n]
    return taken


def _safety_tuned_llamas(table: list[dict]) -> dict[str, list[Example]]:
    """The rows of this data set in two groups: clear refusals, and sensitive but harmless questions with answers.

    The data set mixes both with many rows in between ("I don't have preferences"), which are left out.
    """
    judge = KeywordJudge()
    kinds: dict[str, list[Example]] = {"safety_tuned_llamas": [], "safety_tuned_llamas_answered": []}
    for i, row in enumerate(table):
        prompt, output = text(row, "instruction"), text(row, "output", empty=True).strip()
        verdict = judge.judge_one(prompt, output).verdict
        if verdict == "refusal" and _DECLINES.match(output) and _REASON.search(output):
            kind = "safety_tuned_llamas"
        elif verdict != "refusal" and not (_DECLINES.match(output) or _REASON.search(output) or _HEDGE.search(output)):
            kind = "safety_tuned_llamas_answered"
        else:
            continue
        kinds[kind].append(Example(f"stl-{i}", prompt, output, source=kind))
    return kinds


def benign_rows(data: str | None, limit: int) -> dict[str, list[Example]]:
    alpaca = load_rows("tatsu-lab/alpaca", None, "train", data, ("instruction", "input", "output"))
    contrast = CONTRAST.read_text(encoding="utf-8").splitlines()
    own = lists()
    return {
        "everyday": framed("everyday", own["everyday_frames"] + own["praise_frames"], own["topics"], 8),
        "inquiry": framed("inquiry", own["inquiry_frames"], own["misuses"], 14),
        "claim": framed("claim", own["claim_frames"], own["truths"], 20),
        "code": framed("code", own["code_frames"], own["tasks_in_code"], 12),
        "passage": framed("passage", own["passage_frames"], own["passages"], 12),
        "oddity": [
            replace(example, id=f"{example.id}-{kind}", group=kind)
            for kind, pair in own["oddities"].items()
            for example in framed("oddity", pair["frames"], pair["fillers"], 9)
        ],
        "contrast": [Example(f"contrast-{i}", line, source="contrast") for i, line in enumerate(contrast)],
        "alpaca": [
            Example(
                f"alpaca-{i}",
                "\n\n".join(
                    filter(None, (text(r, "instruction", empty=True), r["input"] and text(r, "input", empty=True)))
                ),
                text(r, "output", empty=True),
                source="alpaca",
            )
            for i, r in enumerate(alpaca[:limit])
        ],
        # last, since a prompt that two sources have stays with the first
        "wordplay": [
            *framed("wordplay", own["figurative_frames"], own["figures"], 50),
            *(
                replace(example, id=f"{example.id}-procedure")
                for example in framed("wordplay", own["procedure_frames"], own["procedures"], 20)
            ),
        ],
        "endearment": framed("endearment", own["figurative_frames"], own["endearments"], 12),
        "papers": framed("papers", own["papers_frames"], own["papers"], 14),
        "play": framed("play", own["play_frames"], own["play_deeds"], 9),
        "absurdity": [
            replace(example, id=f"{example.id}-{kind}")
            for kind, pair in enumerate(own["absurdities"])
            for example in framed("absurdity", pair["frames"], pair["fillers"], 12)
        ],
    }
