"""What holds for every input: the mix, the pools, a run's identity, the projection, rows appended in any order."""

import json
import math
from dataclasses import fields

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from analysis import collect
from cwac.constraints.subspace import project_, rank_for
from cwac.core import config, identity, jsonl, run_dir
from cwac.core.errors import UserError
from cwac.data.examples import Example, Pools
from cwac.data.mix import mix
from cwac.data.near_duplicates import PromptIndex, assert_disjoint, normalise_prompt
from tests.helpers.words import jaccard

settings.register_profile("ours", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("ours")
TEXT = st.text(st.characters(codec="utf-8"), max_size=20)


def examples(source: str, n: int) -> list[Example]:
    return [Example(f"{source}{i}", f"{source} {i}", source=source) for i in range(n)]


# --- mix ------------------------------------------------------------------------------------------------


@given(n=st.integers(1, 60), p=st.floats(0, 1), seed=st.integers(0, 5), mode=st.sampled_from(["replace", "additive"]))
def test_mix_has_exactly_its_share_and_no_row_twice(n, p, seed, mode):
    train, poison = examples("t", n), examples("h", n)
    rows = mix(train, poison, p, seed, mode)
    harmful = [r for r in rows if r.source == "h"]
    assert len(harmful) == math.floor(p * n + 1e-9)
    assert len(rows) == (n if mode == "replace" else n + len(harmful))
    assert len({r.id for r in rows}) == len(rows) and {r.id for r in rows} <= {r.id for r in [*train, *poison]}
    assert rows == mix(train, poison, p, seed, mode)
    assert mode == "replace" or {r.id for r in train} <= {r.id for r in rows}


@given(n=st.integers(2, 40), p=st.floats(0.5, 1), short=st.integers(1, 40))
def test_mix_never_repeats_a_harmful_pair_to_reach_its_share(n, p, short):
    wanted = math.floor(p * n + 1e-9)
    assume(short <= wanted)
    with pytest.raises(UserError, match=f"needs {wanted} harmful pairs"):
        mix(examples("t", n), examples("h", wanted - short), p, 0)


# --- pools ----------------------------------------------------------------------------------------------
FLAT = [f.name for f in fields(Pools) if f.name not in ("test", "over_refusal", "validation_benign")]


@given(
    sizes=st.lists(st.integers(0, 4), min_size=len(FLAT), max_size=len(FLAT)), pair=st.permutations([*FLAT, "test"])
)
def test_pools_are_disjoint_unless_any_two_share_a_prompt(sizes, pair):
    pools = {name: examples(name, n) for name, n in zip(FLAT, sizes, strict=True)}
    pools["test"] = {"set": examples("unseen", 2)}
    assert_disjoint(Pools(**pools))
    first, second = pair[:2]
    for name, prompt in ((first, "The Shared prompt"), (second, "  the shared PROMPT!")):
        group = pools[name]["set"] if name == "test" else pools[name]
        group.append(Example("x", prompt))
    with pytest.raises(UserError, match="share 1 prompts"):
        assert_disjoint(Pools(**pools))


@given(TEXT, TEXT)
def test_jaccard_is_symmetric_bounded_and_one_for_the_same_prompt(a, b):
    assert 0 <= jaccard(a, b) == jaccard(b, a) <= 1
    assert jaccard(a, a) == 1 and normalise_prompt(normalise_prompt(a)) == normalise_prompt(a)


@given(st.lists(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=5).map(" ".join), max_size=8), st.data())
def test_the_index_agrees_with_comparing_all_pairs(held, data):
    near = data.draw(st.sampled_from([0.25, 0.5, 0.75, 1.0]))
    prompt = data.draw(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=5).map(" ".join))
    index = PromptIndex(near)
    for other in held:
        index.add(other)
    assert index.has_near(prompt) == any(jaccard(prompt, other) >= near for other in held)


# --- identity -------------------------------------------------------------------------------------------
BASE = OmegaConf.to_container(config.compose(["method=cwac"]), resolve=True)
TRAINED = sorted(k for k in identity.identity(OmegaConf.create(BASE)) if k not in ("origin", "method.weight.modules"))
NOT_TRAINED = [
    "eval.batch_size",
    "eval.n_harmful",
    "paths.runs",
    "threads",
    "train.save_steps",
    "logger.name",
    "debug",
]


def changed(key: str, value) -> dict:
    cfg = OmegaConf.create(BASE)
    OmegaConf.update(cfg, key, value, merge=False)
    return identity.identity(cfg)


@given(key=st.sampled_from(TRAINED), value=st.integers(1000, 2000))
def test_a_key_that_is_trained_by_names_another_run(key, value):
    assume("base_seed" not in key)  # its weights are hashed, so it stands for a file
    assert changed(key, value) != identity.identity(OmegaConf.create(BASE))
    assert changed(key, value) == changed(key, float(value))


@given(key=st.sampled_from(NOT_TRAINED), value=st.integers(1000, 2000))
def test_a_key_that_is_not_trained_by_names_the_same_run(key, value):
    assert changed(key, value) == identity.identity(OmegaConf.create(BASE))


@given(st.randoms())
def test_the_order_of_keys_names_no_other_run(rng):
    def shuffled(node):
        if not isinstance(node, dict):
            return node
        items = [(k, shuffled(v)) for k, v in node.items()]
        rng.shuffle(items)
        return dict(items)

    assert identity.run_id(OmegaConf.create(shuffled(BASE))) == identity.run_id(OmegaConf.create(BASE))


# --- projection -----------------------------------------------------------------------------------------


@given(out=st.integers(1, 9), dim=st.integers(1, 9), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_projected_weights_agree_on_the_subspace_and_differ_nowhere_else(out, dim, share, seed):
    g = torch.Generator().manual_seed(seed)
    k = round(share * dim)
    V = torch.linalg.qr(torch.randn(dim, dim, generator=g, dtype=torch.float64))[0][:, :k]
    W0, W = (torch.randn(out, dim, generator=g, dtype=torch.float64) for _ in range(2))
    before = W.clone()
    project_(W, V, W0 @ V)
    torch.testing.assert_close(W @ V, W0 @ V)
    free = torch.eye(dim, dtype=torch.float64) - V @ V.T
    torch.testing.assert_close(W @ free, before @ free)
    again = W.clone()
    project_(again, V, W0 @ V)
    torch.testing.assert_close(again, W)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12), st.floats(0.01, 0.999))
def test_the_rank_is_the_smallest_that_holds_the_energy(values, energy):
    values = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    k = rank_for(values, energy)
    share = values.cumsum(0) / values.sum()
    assert 1 <= k <= len(values) and share[k - 1] >= energy - 1e-12
    assert k == 1 or share[k - 2] < energy


# --- rows -----------------------------------------------------------------------------------------------
VALUE = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False)
ROW = st.dictionaries(TEXT.filter(lambda k: k not in ("crc", "warning")), VALUE | TEXT, max_size=5)


@given(ROW)
def test_a_row_survives_its_line(row):
    line = jsonl.to_line(row)
    assert line.endswith("\n") and line.count("\n") == 1 and jsonl.from_line(line) == row


@given(rows=st.lists(ROW, min_size=1, max_size=4), cut=st.integers(1, 30))
def test_a_file_cut_anywhere_is_repaired_to_its_whole_rows(rows, cut, tmp_path_factory):
    path = tmp_path_factory.mktemp("cut") / "rows.jsonl"
    jsonl.append_jsonl(path, rows)
    whole = path.read_bytes()
    path.write_bytes(whole[: max(0, len(whole) - cut)])
    left = jsonl.read_jsonl(path)
    assert left == rows[: len(left)]
    jsonl.repair(path)
    jsonl.append_jsonl(path, rows[len(left) :])
    assert path.read_bytes() == whole


METRICS = [
    {"step": s, "epoch": float(s), "final": s == 2, "metric": m, "set": "x", "value": float(s)}
    for s in (1, 2)
    for m in ("HS", "FA", "OR")
]


@settings(max_examples=8)
@given(attempts=st.lists(st.lists(st.sampled_from(range(len(METRICS))), max_size=6), min_size=1, max_size=4))
def test_rows_added_by_any_attempts_are_each_there_once(attempts, tmp_path_factory):
    """However often a run died and measured again, and in whatever order."""
    folder = tmp_path_factory.mktemp("merge")
    with run_dir.Run(config.compose(["method=sft", f"paths.runs={folder}"])) as run:
        run.start()
        for attempt in attempts:
            run.add_rows(METRICS[i] for i in attempt)
        run.finish()
        found = [(r["step"], r["metric"]) for r in run.rows()]
    seen = dict.fromkeys(i for attempt in attempts for i in attempt)
    assert found == [(METRICS[i]["step"], METRICS[i]["metric"]) for i in seen]
    assert len(collect.collect(folder).rows) == len(seen)


@given(st.lists(st.sampled_from(METRICS), max_size=12), st.randoms())
def test_collecting_keeps_one_row_of_each_identity(rows, rng):
    records = [{"run_id": "r", "judge": "k", "eval": "e", **r, "time": i} for i, r in enumerate(rows)]
    rng.shuffle(records)
    frame, duplicates = collect.tidy(records)
    assert len(frame) + duplicates == len(rows)
    assert len(frame) == len({json.dumps([r["step"], r["metric"]]) for r in rows})
