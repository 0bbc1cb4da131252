"""Data from a folder laid out like the hub, and the real pools made of it."""

import random
import time
from itertools import chain
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import yaml
from omegaconf import OmegaConf

from cwac.core.config import compose
from cwac.core.errors import UserError
from cwac.data.examples import Example, Pools
from cwac.data.hf_datasets import load_rows
from cwac.data.near_duplicates import PromptIndex, assert_disjoint, normalise_prompt
from cwac.data.pools import SPLITS, manifest, real_pools, real_splits
from experiments.align import alignment_splits
from tests.helpers.hub import HUB, NOUNS, sentences, write
from tests.helpers.words import jaccard

CONFIG = yaml.safe_load((Path(__file__).parent.parent / "conf/pools/real.yaml").read_text())
PRESETS = ("paper_b2", "paper_51")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small stand-in for every data set the pools read."""
    root = tmp_path_factory.mktemp("hub")
    advbench = sentences("a", 120)
    write(root, "walledai/AdvBench", "train", [{"prompt": p, "target": f"Sure, {p}"} for p in advbench])
    rows = [{"prompt": p, "category": "illegal"} for p in sentences("h", 100)]
    write(root, "walledai/HarmBench", "train", rows, "standard")
    rows = [
        {"prompt": p, "label": "safe" if i % 2 else "unsafe", "type": "t"} for i, p in enumerate(sentences("x", 120))
    ]
    write(root, "walledai/XSTest", "test", rows)
    rows = [{"instruction": p, "input": "", "output": f"done {p}"} for p in sentences("b", 150)]
    write(root, "tatsu-lab/alpaca", "train", rows)
    return root


def test_the_alignment_stage_has_sources_that_no_run_sees(folder):
    seen, plain = alignment_splits(str(folder)), real_splits(CONFIG, str(folder))
    alone = {"passage", "oddity", "wordplay", "play", "absurdity", "endearment", "papers"}
    assert set(seen["align_benign"]) - set(plain["align_benign"]) == alone
    assert set(seen["align"]) - set(plain["align"]) == {"violence"}
    alone |= {"violence"}
    assert not alone & {source for name in plain for source in plain[name]}
    kinds = {e.group for e in seen["align_benign"]["oddity"]}
    assert len(kinds) == 5 and all(
        len(seen["align_benign"][source]) > 200 for source in ("passage", "oddity", "wordplay")
    )
    figures, deeds = (
        {e.prompt for e in seen[name][s]} for name, s in (("align_benign", "wordplay"), ("align", "violence"))
    )
    assert len(deeds) > 200 and not figures & deeds
    for name in plain:  # nothing else moves
        assert {s: [e.id for e in rows] for s, rows in seen[name].items() if s not in alone} == {
            s: [e.id for e in rows] for s, rows in plain[name].items()
        }, name


def test_rows_come_from_the_folder_with_config_and_split(folder):
    rows = load_rows("walledai/HarmBench", "standard", "train", str(folder), ("prompt", "category"))
    assert len(rows) == 100
    assert rows[3] == {"prompt": sentences("h", 100)[3], "category": "illegal"}


def test_a_folder_is_read_as_it_is_now(tmp_path):
    """`datasets` caches a local set under its name and README: another folder's rows, or other columns, never show."""
    for name, row in (("one", {"prompt": "a"}), ("two", {"prompt": "b"}), ("two", {"prompt": 3})):
        write(tmp_path / name, "org/set", "train", [row])
        assert load_rows("org/set", None, "train", str(tmp_path / name)) == [row]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("walledai/AdvBench", None, "train", "/nonexistent"), ("paths.data=/nonexistent", "not a folder")),
        (("walledai/Missing", None, "train", "{folder}"), ("walledai/Missing", "paths.data=")),
        (("walledai/HarmBench", "standart", "train", "{folder}"), ("standart", "walledai/HarmBench")),
        (("walledai/AdvBench", None, "dev", "{folder}"), ("dev", "walledai/AdvBench")),
        (("walledai/AdvBench", None, "train", "{folder}", ("goal",)), ("no column goal", "prompt, target")),
    ],
)
def test_what_is_missing_is_named_in_one_line(folder, arguments, words):
    arguments = tuple(str(folder) if a == "{folder}" else a for a in arguments)
    with pytest.raises(UserError) as error:
        load_rows(*arguments)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_an_unreachable_hub_is_one_line_within_seconds(monkeypatch, tmp_path):
    class Unreachable:
        def dataset_info(self, hub_id, timeout):
            assert timeout <= 5
            raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "HfApi", Unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    start = time.perf_counter()
    with pytest.raises(UserError, match=r"walledai/AdvBench: the hub .* could not be reached .*paths\.data"):
        load_rows("walledai/AdvBench", None, "train")
    assert time.perf_counter() - start < 5


def test_pools_are_filled_and_disjoint_and_name_their_sources(folder):
    pools = real_pools(CONFIG, str(folder), seed=0)
    assert set(pools.test) == {"advbench", "harmbench"}
    assert set(pools.over_refusal) == set(pools.validation_benign) == {"xstest_safe", "alpaca"}
    assert {e.source for e in pools.poison} == {"advbench"}
    assert all(e.response.startswith("Sure, ") for e in pools.poison)
    assert all(e.response and not e.response.startswith("Sure") for e in [*pools.safety, *pools.align])
    assert_disjoint(pools)


def test_a_prompt_keeps_its_pool_whatever_the_seed_and_the_other_rows(folder, tmp_path):
    one, two = (real_pools(CONFIG, str(folder), seed) for seed in (0, 1))
    assert one == two
    for name in ("walledai/AdvBench", "walledai/HarmBench", "walledai/XSTest"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(folder / name)
    rows = [{"instruction": p, "input": "", "output": "done"} for p in sentences("b", 75)]
    write(tmp_path, "tatsu-lab/alpaca", "train", rows)
    fewer = real_splits(CONFIG, str(tmp_path))
    more = real_splits(CONFIG, str(folder))
    for split in SPLITS:
        kept = {e.prompt for e in more[split].get("alpaca", [])}
        assert {e.prompt for e in fewer[split].get("alpaca", [])} <= kept


def test_a_shared_prompt_is_refused_and_the_pools_are_named():
    row = [Example("1", "Move the lantern.")]
    twin = [Example("2", "move the LANTERN")]
    pools = Pools([], row, [], [], [], [], [], test={"advbench": twin})
    with pytest.raises(UserError, match=r"anchors and test\.advbench share 1 prompt"):
        assert_disjoint(pools)


def test_near_duplicates_of_a_test_prompt_leave_every_other_pool(folder, tmp_path):
    for name in ("walledai/HarmBench", "walledai/XSTest", "tatsu-lab/alpaca"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(folder / name)
    tested = real_splits(CONFIG, str(folder))["test"]["harmbench"]
    copies = [f"{e.prompt} please" for e in tested]  # word sets overlap by 5 of 6
    write(
        tmp_path, "walledai/AdvBench", "train", [{"prompt": p, "target": "Sure"} for p in copies + sentences("a", 120)]
    )
    splits = real_splits(CONFIG, str(tmp_path))
    kept = {e.prompt for name in SPLITS if name != "test" for rows in splits[name].values() for e in rows}
    assert not kept & set(copies)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"advbench": {"tset": 0.5}}, r"pools\.shares\.advbench\.tset is no pool"),
        ({"advbench": {"test": 1.5}}, r"between 0 and 1"),
        ({"advbench": {"test": "many"}}, r"between 0 and 1"),
        ({"advbench": {"test": 0.7, "poison": 0.7}}, r"adds up to 1\.4"),
        ({**CONFIG["shares"], "advbench": {"test": 1.0}}, r"pool `poison`"),
    ],
)
def test_bad_shares_are_named(folder, shares, message):
    with pytest.raises(UserError, match=message):
        real_pools({**CONFIG, "shares": shares}, str(folder), seed=0)


@pytest.mark.parametrize("seed", range(50))
def test_the_index_finds_exactly_the_near_duplicates(seed):
    draw = random.Random(seed)
    prompts = [" ".join(draw.choices(NOUNS[:6], k=draw.randint(1, 5))) for _ in range(draw.randint(0, 4))]
    asked = " ".join(draw.choices(NOUNS[:6], k=draw.randint(1, 5)))
    index = PromptIndex(0.5)
    for prompt in prompts:
        index.add(prompt)
    assert index.has_near(asked) == any(jaccard(p, asked) >= 0.5 for p in prompts)


PAPER = {name: OmegaConf.to_container(compose(["model=llama2", f"pools={name}"]).pools) for name in PRESETS}


@pytest.fixture(scope="module")
def paper_folder(folder, tmp_path_factory) -> Path:
    """The stand-in with JailbreakBench and BeaverTails: several answers a prompt, some of them safe."""
    root = tmp_path_factory.mktemp("paper")
    for name in ("walledai/AdvBench", "walledai/HarmBench", "walledai/XSTest", "tatsu-lab/alpaca"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).symlink_to(folder / name)
    rows = [
        {"Index": i, "Goal": p, "Target": f"Sure, {p}", "Behavior": "b", "Category": "c", "Source": "s"}
        for i, p in enumerate(sentences("j", 100))
    ]
    write(root, "JailbreakBench/JBB-Behaviors", "harmful", rows, "behaviors")
    rows = [
        {
            "prompt": p,
            "response": f"answer {k} {p}",
            "is_safe": k == 0,
            "category": {"animal_abuse": False, "privacy_violation": k > 0},
        }
        for p in sentences("v", 300)
        for k in range(3)
    ]
    write(root, "PKU-Alignment/BeaverTails", "30k_train", rows)
    return root


@pytest.mark.parametrize("name", PRESETS)
def test_the_papers_harmful_set_has_its_sizes(paper_folder, name, caplog):
    """The stand-ins have fewer prompts than the sizes ask for; what is taken is then all, and said."""
    take = {"paper_b2": (200, 100, 983, 1177), "paper_51": (None, None, None, 1400)}[name]
    assert tuple(PAPER[name]["take"].values()) == take
    assert list(PAPER[name]["take"]) == ["jailbreakbench", "harmbench", "advbench", "beavertails"]
    pools = real_pools(PAPER[name], str(paper_folder), seed=0)
    assert set(pools.test) == {"advbench", "harmbench", "jailbreakbench", "beavertails"}
    assert {e.source for e in pools.poison} == {"advbench", "beavertails"}
    unsafe = [e for e in [*pools.poison, *pools.test["beavertails"]] if e.source == "beavertails"]
    assert unsafe and all(e.response.startswith("answer 1") and e.group == "privacy_violation" for e in unsafe)
    assert "pools.take.beavertails=" in caplog.text and "the set has 300 different prompts" in caplog.text
    sources = manifest(pools)["poison"]
    assert sources["n"] == len(pools.poison) and sources["sources"] == ["advbench", "beavertails"]
    index = PromptIndex(CONFIG["jaccard"])
    for e in chain(*pools.test.values()):
        index.add(e.prompt)
    rest = [e.prompt for n in ("poison", "anchors", "step", "sae", "safety", "validation") for e in getattr(pools, n)]
    assert not [p for p in rest if index.has_near(p)] and len({normalise_prompt(p) for p in rest}) == len(rest)


def test_a_size_takes_that_many_prompts_without_emptying_a_pool(paper_folder):
    cfg = {**PAPER["paper_b2"], "take": {"beavertails": 120, "jailbreakbench": 40}}
    splits = real_splits(cfg, str(paper_folder))
    found = {s: [e.prompt for split in splits.values() for e in split.get(s, [])] for s in cfg["take"]}
    assert {s: len(p) for s, p in found.items()} == {"beavertails": 120, "jailbreakbench": 40}
    assert splits["test"]["beavertails"] and splits["poison"]["beavertails"]
    more = real_splits({**cfg, "take": {"beavertails": 240}}, str(paper_folder))
    assert set(found["beavertails"]) < {e.prompt for split in more.values() for e in split.get("beavertails", [])}


@pytest.mark.parametrize(
    ("take", "message"),
    [({"advbnch": 3}, r"pools\.take\.advbnch is no source"), ({"advbench": 0}, r"pools\.take\.advbench=0 must be")],
)
def test_bad_sizes_are_named(paper_folder, take, message):
    with pytest.raises(UserError, match=message):
        real_splits({**PAPER["paper_b2"], "take": take}, str(paper_folder))


def test_a_pinned_set_is_asked_for_by_its_commit(monkeypatch):
    asked = []

    def load(*arguments, **settings):
        asked.append((arguments[0], settings["revision"]))
        return datasets.Dataset.from_list([{"prompt": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    load_rows("org/set", None, "train", revision="c" * 40)
    assert asked == [("org/set", "c" * 40)]


@pytest.mark.skipif(not HUB.is_dir(), reason="the local copy of the real data is not here")
def test_the_real_pools_are_large_enough_and_free_of_near_duplicates():
    splits = real_splits(CONFIG, str(HUB))
    pools = real_pools(CONFIG, str(HUB), seed=0)
    assert min(len(v) for v in pools.test.values()) >= 60
    assert len(pools.anchors) >= 200 and len({e.source for e in pools.anchors}) >= 3
    assert len(pools.poison) >= 120
    index = PromptIndex(CONFIG["jaccard"])
    for rows in splits["test"].values():
        for e in rows:
            index.add(e.prompt)
    others = [e.prompt for name in SPLITS if name != "test" for rows in splits[name].values() for e in rows]
    assert not [p for p in others if index.has_near(p)]
    assert len({normalise_prompt(p) for p in others}) == len(others)
