"""What a run was made of is compared with what is there now: data, model folders, templates, judges, ratios."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest

from analysis import demo, records, restore
from analysis.collect import collect, data_sets, mixed_code, read_exported
from cwac.core import identity, method_code
from cwac.core.config import compose
from cwac.core.errors import UserError
from cwac.core.identity import eval_id, run_id
from cwac.core.inputs import NAME
from cwac.core.paths import PACKAGE
from cwac.core.run_dir import Run
from cwac.data.examples import Example
from cwac.data.mix import mix
from cwac.data.refusals import Judgement
from cwac.evaluation.judge import KeywordJudge, judge_answers
from tests.conftest import call
from tests.test_analysis import cell_of, row, write_run
from tests.test_bad_input import GOOD, sst2
from tests.test_hub import write
from tests.test_runs import overrides

SPLITS = {"train": 60, "validation": 20}


def said(capfd) -> str:
    logging.getLogger().handlers.clear()  # Hydra's, on this test's captured stream
    return "".join(capfd.readouterr())


def write_sst2(hub: Path, **changed: list[dict]) -> None:
    """SST-2 with two splits; changed: other rows of a split."""
    folder = hub / "stanfordnlp" / "sst2"
    for split, n in SPLITS.items():
        write(hub, "stanfordnlp/sst2", split, changed.get(split, GOOD[:n] if split == "train" else GOOD[60:]))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        + "".join(f"  - split: {s}\n    path: data/{s}-*.parquet\n" for s in SPLITS)
        + "---\n"
    )


@pytest.fixture
def finished(tmp_path, random_model, capfd):
    """A finished run on data of one's own: its command and its folder."""
    write_sst2(tmp_path / "hub")
    command = sst2(tmp_path, random_model)
    assert call(*command) == 0, said(capfd)
    (folder,) = [p.parent for p in (tmp_path / "runs").glob("*/status.json")]
    said(capfd)
    return command, folder


# --- data sets -----------------------------------------------------------------------------------------
CHANGES = {
    "a training row's text": ("train", lambda rows: [{**r, "sentence": r["sentence"] + " again"} for r in rows]),
    "a training row's label": ("train", lambda rows: [{**r, "label": 1 - r["label"]} for r in rows]),
    "a test row's text": ("validation", lambda rows: [{**r, "sentence": "so " + r["sentence"]} for r in rows]),
    "a test row's label": ("validation", lambda rows: [{**r, "label": 1 - r["label"]} for r in rows]),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_finished_run_is_not_done_with_other_rows(case, finished, tmp_path, capfd):
    command, folder = finished
    assert call(*command) == 0 and "is done; nothing to do" in said(capfd)
    split, change = CHANGES[case]
    write_sst2(tmp_path / "hub", **{split: change(GOOD[:60] if split == "train" else GOOD[60:])})
    before = (folder / "metrics.jsonl").read_bytes()
    assert call(*command) == 1
    printed = said(capfd)
    assert "is done, but with other data" in printed and "force=true" in printed and "Traceback" not in printed
    assert printed.count("error: ") == 1 and (folder / "metrics.jsonl").read_bytes() == before
    assert call(*command, "force=true") == 0, said(capfd)
    assert call(*command) == 0 and "is done; nothing to do" in said(capfd)


def test_a_new_evaluation_of_kept_weights_is_refused_on_other_rows(tmp_path, random_model, capfd):
    write_sst2(tmp_path / "hub")
    command = sst2(tmp_path, random_model, "keep_weights=true")
    assert call(*command) == 0, said(capfd)
    write_sst2(tmp_path / "hub", train=[{**r, "label": 1 - r["label"]} for r in GOOD[:60]])
    assert call(*command, "eval.n_task=3") == 1
    assert "was trained on other data (encoded_rows of" in said(capfd)


def test_files_that_hold_the_same_rows_are_no_change(finished, tmp_path, capfd, monkeypatch):
    """A touched file costs its hash; a copy elsewhere and a README cost one reading; none of them a training."""
    command, folder = finished
    recorded = json.loads((folder / NAME).read_text())["data"]["stanfordnlp/sst2"]
    for path in (tmp_path / "hub").rglob("*.parquet"):
        os.utime(path, (1, 1))
    assert call(*command) == 0 and "is done; nothing to do" in said(capfd)
    assert json.loads((folder / NAME).read_text())["data"]["stanfordnlp/sst2"] == recorded  # nothing was prepared
    readme = tmp_path / "hub" / "stanfordnlp" / "sst2" / "README.md"
    readme.write_text(readme.read_text() + "\nA note.\n")
    assert call(*command) == 0 and "is done; nothing to do" in said(capfd)
    assert json.loads((folder / NAME).read_text())["data"]["stanfordnlp/sst2"] != recorded  # and is known from now on
    shutil.copytree(tmp_path / "hub", tmp_path / "copy")
    moved = [o.replace(f"{tmp_path}/hub", f"{tmp_path}/copy") for o in command]
    assert call(*moved) == 0 and "is done; nothing to do" in said(capfd)

    def never(*_):
        raise AssertionError("a finished run whose files are unchanged is not prepared")

    monkeypatch.setattr("cwac.training.run.prepare", never)
    assert call(*moved) == 0 and "is done; nothing to do" in said(capfd)


def test_an_unfinished_run_does_not_go_on_with_rows_of_another_text(finished, tmp_path, capfd):
    """Ids count rows, so a row that was edited keeps its id."""
    command, folder = finished
    status = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps({**status, "status": "running"}))
    write_sst2(tmp_path / "hub", train=[{**r, "sentence": r["sentence"] + " again"} for r in GOOD[:60]])
    assert call(*command) == 1
    assert "was begun on other data (encoded_rows of" in said(capfd)


def test_a_run_from_before_its_files_were_recorded_is_done(finished, capfd):
    command, folder = finished
    (folder / NAME).unlink()
    assert call(*command) == 0 and "is done; nothing to do" in said(capfd)


def test_a_table_does_not_average_seeds_of_different_data(tmp_path):
    for seed, sha in enumerate(("aaa", "aaa", "bbb")):
        folder = write_run(tmp_path, cell_of("sft", 0.1, seed), [row(cell_of("sft", 0.1, seed), "FA", 50.0)])
        read = {"org/set (default, train)": {"sha256": sha, "rows": 9}}
        (folder / "data.json").write_text(json.dumps({"datasets": read}))
    with pytest.raises(UserError, match=r"org/set \(default, train\).*s2-.*Remedy"):
        collect(tmp_path)
    shutil.rmtree(folder)
    assert collect(tmp_path).account() == []


def test_a_table_does_not_average_seeds_of_different_commits(tmp_path):
    for seed in (0, 1):
        folder = write_run(tmp_path, cell_of("sft", 0.1, seed), [row(cell_of("sft", 0.1, seed), "FA", 50.0)])
        (folder / "env.json").write_text(json.dumps({"model": {"hub_id": "me/model", "revision": f"c{seed}"}}))
    with pytest.raises(UserError, match=r"me/model \(model\) was another one"):
        collect(tmp_path)


def test_what_a_run_read_survives_a_freeze(tmp_path):
    folder = write_run(tmp_path, cell_of("sft", 0.1, 0), [])
    read = {"org/set (default, train)": {"sha256": "aaa", "rows": 9}}
    (folder / "data.json").write_text(json.dumps({"datasets": read}))
    records.export(records.read_all(tmp_path, [folder.name]), tmp_path / records.NAME)
    again = tmp_path / "thawed"
    again.mkdir()
    restore.write_record(records.read_exported(tmp_path / records.NAME)[folder.name], again)
    assert data_sets(again) == {"org/set (default, train)": "aaa"}


def test_a_table_names_methods_of_different_data(tmp_path):
    for method, sha in (("sft", "aaa"), ("cwac", "bbb")):
        folder = write_run(tmp_path, cell_of(method, 0.1, 0), [row(cell_of(method, 0.1, 0), "FA", 50.0)])
        read = {"org/set (default, train)": {"sha256": sha, "rows": 9}}
        (folder / "data.json").write_text(json.dumps({"datasets": read}))
    (line,) = collect(tmp_path).account()
    assert "org/set (default, train)" in line and "2 versions" in line


# --- the code of a method ------------------------------------------------------------------------------
MINE = "cwac.methods.mine.Mine"
SOURCE = """from cwac.methods.cwac import CWAC


class Mine(CWAC):
    def penalty(self, model, step):
        return 2.0
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The methods' folder of a copy of the package, with a method of one's own; and the hash of that method's code."""
    folder = Path(shutil.copytree(method_code.PACKAGE / "methods", tmp_path / "cwac" / "methods"))
    monkeypatch.setattr(method_code, "PACKAGE", tmp_path / "cwac")
    (folder / "mine.py").write_text(SOURCE)

    def code(target: str = MINE) -> str | None:
        method_code.of.cache_clear()
        return method_code.of(target)

    yield folder, code
    method_code.of.cache_clear()


def test_code_is_what_a_method_does_and_derives_from(package):
    folder, code = package
    first, sft = code(), code("cwac.methods.base.Method")
    (folder / "mine.py").write_text(f'"""A defence."""\n{SOURCE}        # no more\n')
    (folder / "lisa.py").write_text("")
    assert code() == first
    (folder / "mine.py").write_text(SOURCE.replace("2.0", "3.0"))
    second = code()
    assert second != first
    relative = SOURCE.replace("cwac.methods.cwac", ".cwac")
    (folder / "mine.py").write_text(relative)
    third = code()
    (folder / "cwac.py").write_text((folder / "cwac.py").read_text() + "\nMORE = 1\n")
    assert code() not in (first, second, third) and code("cwac.methods.base.Method") == sft
    (folder / "mine.py").write_text("class Mine(:")
    assert code() not in (None, first, second, third)
    assert code("cwac.methods.none.None") is code("nowhere.at.all") is code(None) is None
    assert code(f"{__name__}.Elsewhere") is not None  # a class of a package of one's own


def test_a_constraint_is_code_of_its_methods_and_the_contract_of_none(package):
    folder, code = package
    constraints = Path(shutil.copytree(PACKAGE / "constraints", folder.parent / "constraints"))
    targets = ("cwac.methods.cwac.CWAC", "cwac.methods.nullspace.NullSpace", "cwac.methods.lisa.Lisa")
    before = [code(target) for target in targets]
    with (constraints / "subspace.py").open("a") as file:
        file.write("\nMORE = 1\n")
    assert [code(target) == was for target, was in zip(targets, before, strict=True)] == [False, False, True]
    (constraints / "subspace.py").write_text((PACKAGE / "constraints" / "subspace.py").read_text())
    with (folder / "base.py").open("a") as file:
        file.write("\nMORE = 1\n")
    assert [code(target) for target in targets] == before and None not in before


def test_what_went_on_under_other_code_counts_each_and_nothing_unknown():
    assert method_code.joined("a", None) == "a" and method_code.joined(None, "a") is None
    assert method_code.joined("a", "b") == "a+b" == method_code.joined("a+b", "b")
    methods = dict.fromkeys(("r0", "r1"), "mine")
    (line,) = mixed_code({"r0": "a", "r1": "a+b"}, methods)
    assert line.startswith("mine: its runs were made with 2 versions of its code, first r0 and r1 (")


def test_the_code_is_no_part_of_a_runs_id(package):
    folder, code = package
    cfg = compose(["method=cwac"])
    before, hashed = run_id(cfg), code(cfg.method._target_)
    (folder / "cwac.py").write_text((folder / "cwac.py").read_text() + "\nMORE = 1\n")
    assert run_id(cfg) == before and code(cfg.method._target_) != hashed


def test_a_finished_run_of_other_code_is_done_and_says_so(random_model, tmp_path, capfd):
    command = overrides(random_model, tmp_path, "method=sft", "train.max_steps=1")
    assert call(*command) == 0, said(capfd)
    (folder,) = [p.parent for p in (tmp_path / "runs").glob("*/status.json")]
    env = json.loads((folder / "env.json").read_text())
    assert env["method_code"] == method_code.of("cwac.methods.base.Method")
    said(capfd)
    assert call(*command) == 0 and "other code" not in said(capfd)
    (folder / "env.json").write_text(json.dumps({**env, "method_code": "0" * 16}))
    rows = (folder / "metrics.jsonl").read_bytes()
    assert call(*command) == 0
    printed = said(capfd)
    line = (
        f"{folder.name} was trained with other code of method=sft, which has changed since; force=true trains it again"
    )
    assert printed.count(line) == 1 and "is done; nothing to do" in printed
    assert (folder / "metrics.jsonl").read_bytes() == rows
    del env["method_code"]  # of a run from before it was recorded
    (folder / "env.json").write_text(json.dumps(env))
    assert call(*command) == 0 and "other code" not in said(capfd)


def test_a_run_that_goes_on_with_other_code_says_so_and_records_both(tmp_path, caplog):
    cfg = compose(["method=sft", f"paths.runs={tmp_path}"])
    now = method_code.of(cfg.method._target_)

    def start(before: str | None) -> str | None:
        caplog.clear()
        with Run(cfg) as run:
            (run.dir / "env.json").write_text(json.dumps({"method_code": before} if before else {}))
            run.start()
            return run.environment["method_code"]

    (tmp_path / Run(cfg).id).mkdir()
    assert start("0" * 16) == now and "other code" not in caplog.text  # nothing to go on from
    checkpoint = tmp_path / Run(cfg).id / "checkpoint-5" / "complete.json"
    checkpoint.parent.mkdir()
    checkpoint.write_text("{}")
    assert start(now) == now and start(None) is None and "other code" not in caplog.text
    assert start("0" * 16) == f"{'0' * 16}+{now}"
    assert "was begun with other code of method=sft" in caplog.text and "force=true" in caplog.text
    assert start(f"{'0' * 16}+{now}") == f"{'0' * 16}+{now}" and "other code" in caplog.text


def test_a_table_names_a_method_of_different_code_and_so_does_what_came_back(tmp_path):
    codes = {("sft", 0): "a", ("sft", 1): "a", ("mine", 0): None, ("mine", 1): "a", ("mine", 2): "b", ("mine", 3): "b"}
    runs, cells = tmp_path / "runs", {key: cell_of(key[0], 0.1, key[1]) for key in codes}
    for key, code in codes.items():
        folder = write_run(runs, cells[key], [row(cells[key], "FA", 50.0)])
        if code:
            (folder / "env.json").write_text(json.dumps({"method_code": code}))
    line = (
        f"mine: its runs were made with 2 versions of its code, first {cells['mine', 1].run_id} and "
        f"{cells['mine', 2].run_id} (force=true trains a run again)"
    )
    assert collect(runs).account() == [line]
    assert demo.main(["--runs", str(runs), "--out", str(tmp_path / "out")]) == 0
    assert line in (tmp_path / "out" / "table.md").read_text()
    assert read_exported(tmp_path / "out").account() == [line]
    restore.restore(tmp_path / "out", tmp_path / "again")
    assert collect(tmp_path / "again").account() == [line]


# --- models --------------------------------------------------------------------------------------------
@pytest.fixture
def model(random_model, tmp_path):
    return Path(shutil.copytree(random_model, tmp_path / "model"))


def named(path, *more: str) -> str:
    return run_id(compose(["method=sft", "model.kind=folder", f"+model.path={path}", *more]))


def test_a_folder_is_known_by_its_content_and_not_by_its_path(model, tmp_path):
    plain = named(model)
    (tmp_path / "link").symlink_to(model)
    shutil.copytree(model, tmp_path / "copy")
    for path in (f"{model}/", tmp_path / "link", tmp_path / "copy", f"{model}/../model"):
        assert named(path) == plain, path
    (model / "README.md").write_text("a note")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "transformers_version": "9", "_name_or_path": "x"}))
    assert named(model) == plain
    assert run_id(compose(["method=sft", "model=qwen_05b", "train=tiny", "task=toy_sentiment", "pools=toy"])) != plain


PARTS = {
    "chat_template.jinja": lambda text: text.replace("<assistant>", "<system>"),
    "config.json": lambda text: text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-02'),
    "generation_config.json": lambda text: text.replace('"eos_token_id"', '"repetition_penalty": 1.1, "eos_token_id"'),
    "tokenizer.json": lambda text: text.replace('"<unk>"', '"<pad>"'),
}


@pytest.mark.parametrize("part", PARTS)
def test_all_that_decides_what_a_model_says_is_in_its_name_and_its_artifacts_key(part, model):
    cfg = compose(["method=sft", "model.kind=folder", f"+model.path={model}"])
    before, key = run_id(cfg), identity.origin(cfg.model)
    text = (model / part).read_text()
    assert PARTS[part](text) != text
    (model / part).write_text(PARTS[part](text))
    assert run_id(cfg) != before and identity.origin(cfg.model) != key


def test_a_template_that_changed_gives_another_run_and_fresh_artifacts(model, tmp_path, capfd):
    command = [
        "method=weight_only",
        "model.kind=folder",
        f"+model.path={model}",
        "train.max_steps=2",
        "task.n_train=16",
    ]
    command += ["task.n_test=4", "eval.n_harmful=4", "eval.n_benign=4", "eval.max_new_tokens=2", "eval.drift=false"]
    command += [f"paths.artifacts={tmp_path / 'artifacts'}", f"paths.runs={tmp_path / 'runs'}"]
    with pytest.MonkeyPatch.context() as patch:  # a random model refuses nothing
        patch.setattr(KeywordJudge, "judge", lambda self, prompts, _: [Judgement("refusal", 0.0, "")] * len(prompts))
        assert call(*command) == 0, said(capfd)
        first = {p.parent.name for p in (tmp_path / "artifacts" / "subspace").glob("*/artifact.json")}
        template = model / "chat_template.jinja"
        template.write_text(template.read_text().replace("<assistant>", "<system>"))
        assert call(*command) == 0
    assert "is done" not in said(capfd)
    second = {p.parent.name for p in (tmp_path / "artifacts" / "subspace").glob("*/artifact.json")}
    assert len(first) == 1 and len(second) == 2
    assert len(list((tmp_path / "runs").glob("*/status.json"))) == 2


def test_a_hub_id_that_is_a_folder_is_that_folder(model):
    as_hub = ["method=sft", "model=qwen_05b", f"model.hub_id={model}", "pools=toy"]
    as_kind = ["method=sft", "model=qwen_05b", "model.kind=folder", f"+model.path={model}", "pools=toy"]
    assert run_id(compose(as_hub)) == run_id(compose(as_kind))
    from cwac.models.loading import load

    loaded = load(compose(as_hub).model, model.parent)
    assert loaded.source == str(model) and loaded.hub_id is None and loaded.base is None
    assert loaded.key["origin"] == identity.origin(compose(as_kind).model)


def test_what_an_option_says_of_its_own_weights_is_not_said_of_others(model):
    over = ["model=qwen_05b", "model.kind=folder", f"+model.path={model}"]
    assert compose(["model=qwen_05b"]).model.base == "Qwen/Qwen2.5-0.5B"
    cfg = compose(over).model
    assert [cfg.base, cfg.base_revision, cfg.revision, cfg.license] == [None] * 4
    assert compose([*over, "model.base=Qwen/Qwen2.5-0.5B"]).model.base == "Qwen/Qwen2.5-0.5B"  # a copy on disk
    other = compose(["model=qwen_05b", "model.hub_id=me/other"]).model
    assert other.base is None and other.revision is None


def test_a_base_and_a_judge_in_a_folder_are_known_by_their_content(model, tmp_path):
    shutil.copytree(model, tmp_path / "base")
    judge = ["eval/judge=strongreject", f"eval.judge.hub_id={tmp_path / 'base'}"]
    command = ["method=sft", "model.kind=folder", f"+model.path={model}", f"+model.base={tmp_path / 'base'}", *judge]
    before = run_id(compose(command)), eval_id(compose(command))
    again = [o.replace("/base", "/base/") for o in command]
    assert (run_id(compose(again)), eval_id(compose(again))) == before
    template = tmp_path / "base" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    after = run_id(compose(command)), eval_id(compose(command))
    assert after[0] != before[0] and after[1] != before[1]


def test_a_script_with_another_template_shares_no_artifact(random_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from cwac.training.library import speaks

    tokenizer = AutoTokenizer.from_pretrained(random_model)
    loaded = AutoModelForCausalLM.from_pretrained(random_model)
    before = speaks(loaded, tokenizer)
    tokenizer(["a", "b c"], padding=True)
    assert speaks(loaded, tokenizer) == before
    loaded.generation_config.repetition_penalty = 1.1
    changed = speaks(loaded, tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("<assistant>", "<system>")
    assert len({before, changed, speaks(loaded, tokenizer)}) == 3


def test_verdicts_are_of_the_answers_they_stand_for(tmp_path):
    """An answer that was generated again keeps its id; its old verdict is not kept with it."""
    answers = [{"id": "1", "prompt": "how to bake", "response": "I cannot help with that."}]
    assert judge_answers(KeywordJudge(), answers, tmp_path / "v.jsonl")[0]["verdict"] == "refusal"
    other = [{**answers[0], "response": "Sure, here is how to bake: step 1."}]
    assert judge_answers(KeywordJudge(), other, tmp_path / "v.jsonl")[0]["verdict"] == "harmful"


# --- ratios --------------------------------------------------------------------------------------------
ROWS = [Example(f"t{i}", f"p{i}", "a") for i in range(200)]
POISON = [Example(f"h{i}", f"q{i}", "b") for i in range(200)]


@pytest.mark.parametrize(
    ("ratio", "n", "mode", "harmful"),
    [
        (0.0, 7, "replace", 0),
        (0.1, 64, "replace", 6),
        (0.25, 16, "replace", 4),
        (0.05, 20, "additive", 1),
        (1.0, 3, "replace", 3),
    ],
)
def test_a_ratio_that_can_be_had_within_a_tenth_is_mixed(ratio, n, mode, harmful):
    assert sum(e.id.startswith("h") for e in mix(ROWS[:n], POISON, ratio, 0, mode)) == harmful


@pytest.mark.parametrize(("ratio", "n"), [(0.05, 16), (0.1, 9), (0.1, 16), (0.01, 150), (0.001, 200)])
@pytest.mark.parametrize("mode", ["replace", "additive"])
def test_a_ratio_that_cannot_be_had_is_refused(ratio, n, mode):
    with pytest.raises(UserError, match=f"harmful_ratio={ratio:g} cannot be had: task.n_train={n} rows hold"):
        mix(ROWS[:n], POISON, ratio, 0, mode)


def test_rows_that_are_too_long_do_not_change_the_ratio(random_model, tmp_path, capfd):
    """At 19 tokens every benign row is left out and the harmful ones stay: no run at 0.25."""
    command = ["method=sft", "model.kind=folder", f"+model.path={random_model}", "harmful_ratio=0.25"]
    command += [
        "task.n_train=64",
        "train.max_steps=1",
        f"paths.artifacts={tmp_path}",
        f"paths.runs={tmp_path / 'runs'}",
    ]
    assert call(*command, "train.max_length=19") == 1
    printed = said(capfd)
    assert "harmful_ratio=0.25 cannot be had: train.max_length=19 leaves out" in printed
    assert not list((tmp_path / "runs").glob("*/status.json"))


# --- what a finished run is asked for ------------------------------------------------------------------
def test_weights_that_were_not_kept_are_not_passed_over(finished, capfd):
    command, folder = finished
    assert call(*command, "keep_weights=true") == 1
    printed = said(capfd)
    assert "its weights were not kept" in printed and "force=true keep_weights=true" in printed
    assert call(*command, "keep_weights=true", "force=true") == 0, said(capfd)
    assert (folder / "model" / "model.safetensors").is_file()
    assert call(*command, "keep_weights=true") == 0 and "is done; nothing to do" in said(capfd)
