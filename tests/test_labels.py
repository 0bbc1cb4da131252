"""Labelled answers: the sample, the readings, and judges against labels; planted agreement and planted bias."""

import json

import numpy as np
import pandas as pd
import pytest

from analysis import agreement, labels, stats
from cwac.core.errors import UserError
from cwac.core.jsonl import append_jsonl
from experiments import label_answers


def test_kappa_of_three_classes_by_hand():
    table = np.array([[20, 5, 0], [5, 10, 5], [0, 0, 5]])
    # agreed 35/50; by chance (25 * 25 + 20 * 15 + 5 * 10) / 50^2 = 0.39
    assert stats.kappas(table) == pytest.approx((0.7 - 0.39) / (1 - 0.39))
    assert stats.kappas(np.array([table, table])).shape == (2,)
    assert np.isnan(stats.kappas(np.diag([9, 0, 0])))
    two = np.array([20, 5, 10, 15])
    assert stats.kappas(two.reshape(2, 2)) == pytest.approx(float(stats.kappa(two)))


def run(runs, name: str, method: str, verdicts: list[str], step: int = 9) -> None:
    """A finished run with one answer to each of `len(verdicts)` requests of two sets."""
    folder = runs / name
    (folder / "gen").mkdir(parents=True)
    (folder / "judge").mkdir()
    (folder / "status.json").write_text(json.dumps({"status": "done", "run_id": name, "evaluations": {"e1": []}}))
    for which in ("advbench", "harmbench"):
        answers = [
            {"id": f"{which}-{i}", "prompt": f"{which} {i}", "response": f"{name} {i}"} for i in range(len(verdicts))
        ]
        rows = [{"id": a["id"], "verdict": v, "judge": "keyword"} for a, v in zip(answers, verdicts, strict=True)]
        append_jsonl(folder / "gen" / f"{which}@{step}-e1.jsonl", answers)
        append_jsonl(folder / "judge" / f"{which}@{step}-e1.jsonl", rows)
        at = {"metric": "HS", "set": which, "step": step, "eval": "e1", "judge": "keyword", "n": len(verdicts)}
        at |= {"model": "smollm2", "method": method, "harmful_ratio": 0.1, "run_id": name}
        append_jsonl(folder / "metrics.jsonl", [at, {**at, "metric": "OR"}])


@pytest.fixture
def runs(tmp_path):
    run(tmp_path / "runs", "a", "sft", ["harmful", "other", *["refusal"] * 20])
    run(tmp_path / "runs", "b", "cwac", ["harmful", "other", *["refusal"] * 20])
    run(tmp_path / "runs", "c", "sft", ["refusal"] * 20, step=0)
    return tmp_path / "runs"


def test_the_sample_takes_rare_verdicts_and_every_method(runs):
    found = label_answers.answers(runs)
    assert len(found) == 2 * (22 + 22 + 20) and set(found["method"]) == {"sft", "cwac", "aligned"}
    drawn = label_answers.draw(found, 20, 0)
    assert drawn["stratum"].value_counts().to_dict() == {"refusal": 12, "harmful": 4, "other": 4}
    assert set(drawn["method"]) == {"sft", "cwac", "aligned"}
    assert drawn.equals(label_answers.draw(found, 20, 0)) and not drawn.equals(label_answers.draw(found, 20, 1))
    with pytest.raises(UserError, match="--n 1000 is more than the 128"):
        label_answers.draw(found, 1000, 0)


def test_two_samples_are_apart(runs, tmp_path, capsys):
    first, second = tmp_path / "dev", tmp_path / "test"
    common = ["draw", "--runs", str(runs), "--n", "40"]
    assert label_answers.main([*common, "--out", str(first), "--sets", "advbench"]) == 0
    dev = pd.read_csv(first / "sample.csv")
    assert set(dev["set"]) == {"advbench"} and len(dev) == 40
    assert label_answers.main([*common, "--out", str(second), "--apart", str(first)]) == 0
    other = pd.read_csv(second / "sample.csv")
    assert not set(other["sha256"]) & set(dev["sha256"]) and set(other["set"]) == {"advbench", "harmbench"}
    left = label_answers.answers(runs).query("sha256 not in @dev.sha256")
    both = len(set(left["id"]) & set(dev["id"]))
    assert both and f"40 texts left out; {both} requests are in both" in capsys.readouterr().out
    third = str(tmp_path / "third")
    assert label_answers.main([*common, "--out", third, "--sets", "validation"]) == 2
    assert "--sets validation: no answer" in (said := capsys.readouterr().err) and "advbench, harmbench" in said
    assert label_answers.main([*common, "--out", third, "--apart", str(tmp_path / "none")]) == 2
    assert "sample.csv is missing; name the folder of a sample" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()


def test_models_take_turns_like_methods(runs):
    found = label_answers.answers(runs).query("method == 'sft' and stratum == 'refusal'")
    few = found[found["id"].str.endswith("-2")].assign(model="qwen")
    drawn = label_answers.draw(pd.concat([found, few], ignore_index=True), 8, 0)
    assert (drawn["model"] == "qwen").sum() == len(few) == 2


def test_a_hash_ties_a_label_to_its_text():
    assert label_answers.digest("p", "r") == "213768496aa58558"
    assert len({label_answers.digest(*pair) for pair in (("p", "r"), ("p", "q"), ("q", "r"))}) == 3


class Planted:
    name, settings, is_model, batch_size = "planted", "", True, 100

    def judge(self, prompts, responses):
        from cwac.data.refusals import Judgement

        found = ["harmful" if r.startswith("a") else "refusal" for r in responses]
        return [Judgement(v, 0.5, "", {"refusal": 0.3, "harmful": 0.5, "other": 0.2}) for v in found]


def test_from_runs_to_agreement(runs, tmp_path, capsys, monkeypatch):
    out, common = tmp_path / "judging", ["--runs", str(runs), "--out", str(tmp_path / "judging")]
    assert label_answers.main(["judge", *common]) == 2
    assert "labels.csv is missing; first: python -m experiments.label_answers join" in capsys.readouterr().err
    assert label_answers.main(["draw", *common, "--n", "40"]) == 0
    text = (out / "sample.csv").read_text()
    assert "bench 1" not in text and "a 1" not in text  # ids and hashes only
    sheets = []
    for reader in (1, 2):
        path = tmp_path / f"sheet{reader}.csv"
        assert label_answers.main(["sheet", *common, "--reader", str(reader), "--sheet", str(path)]) == 0
        sheet = pd.read_csv(path, dtype=str, keep_default_na=False)
        sheet["label"] = ["h" if r.startswith("a") else "r" for r in sheet["response"]]
        sheets.append(sheet)
    assert list(sheets[0]["sha256"]) != list(sheets[1]["sha256"])
    first = sheets[1].index[sheets[1]["response"].str.startswith("b")][:2]
    sheets[1].loc[first, "label"] = "o"
    sheets[1]["settled"] = ""
    sheets[1].loc[first[0], "settled"] = "r"
    for reader, sheet in enumerate(sheets, 1):
        sheet.to_csv(tmp_path / f"sheet{reader}.csv", index=False)
    names = [str(tmp_path / f"sheet{reader}.csv") for reader in (1, 2)]
    assert label_answers.main(["join", *names, *common]) == 0
    assert "95.0% read alike, n = 40" in capsys.readouterr().out
    table = pd.read_csv(out / "labels.csv", keep_default_na=False)
    assert (
        set(table["empty"]) == {"no"}
        and (table["label"] == "").sum() == 1
        and (table["first"] != table["second"]).sum() == 2
    )
    monkeypatch.setattr(label_answers, "instantiate", lambda cfg: Planted())
    for _ in range(2):  # the same judge again takes the place of its earlier verdicts
        assert label_answers.main(["judge", *common]) == 0
    assert len(pd.read_csv(out / "verdicts.csv")) == 40
    assert agreement.main([str(out), "--human", "--out", str(tmp_path / "report.md")]) == 0
    report = (tmp_path / "report.md").read_text()
    assert "39 answers; the two readings agree on 97.4 %" in report and "left out: 1" in report
    assert "planted |    100.0 [" in report.replace("  ", " ").replace("  ", " ") or "100.0 [" in report
    assert label_answers.main(["draw", *common, "--n", "40"]) == 2
    assert "would orphan its labels" in capsys.readouterr().err


def test_a_sheet_with_another_letter_is_refused(runs, tmp_path):
    sample = pd.DataFrame({"sha256": ["x"]})
    pd.DataFrame({"sha256": ["x"], "label": ["q"]}).to_csv(tmp_path / "s.csv", index=False)
    with pytest.raises(UserError, match="'q' is no label; use r, h or o"):
        label_answers.join(tmp_path / "s.csv", tmp_path / "s.csv", sample)
    sheet = pd.DataFrame({"sha256": ["x"], "response": [" \n"], "label": ["o"], "settled": [""]})
    sheet.to_csv(tmp_path / "s.csv", index=False)
    assert label_answers.join(tmp_path / "s.csv", tmp_path / "s.csv", sample)["empty"].tolist() == ["yes"]
    pd.DataFrame({"sha256": ["y"], "label": ["r"]}).to_csv(tmp_path / "s.csv", index=False)
    with pytest.raises(UserError, match="1 answers of the sample have no label"):
        label_answers.join(tmp_path / "s.csv", tmp_path / "s.csv", sample)


def labelled(errors: dict[str, int], n: int = 50) -> labels.Labelled:
    """n harmful and n refused answers of each method; a judge misses `errors` of a method's harmful ones."""
    rows, verdicts = [], []
    for method, wrong in errors.items():
        for i in range(2 * n):
            label = "harmful" if i < n else "refusal"
            key = f"{method}-{i}"
            rows.append({"sha256": key, "set": "s", "id": f"{i}", "method": method, "label": label})
            said = "refusal" if i < wrong else label
            verdicts.append({"sha256": key, "judge": "j", "verdict": said})
    frame = pd.DataFrame(rows)
    return labels.Labelled(frame.assign(first=frame["label"], second=frame["label"]), pd.DataFrame(verdicts), 0)


def test_a_judge_that_errs_for_one_method_only_is_found_out():
    biased = labelled({"sft": 0, "cwac": 20, "lisa": 0})
    table = labels.by_method(biased, "j").set_index("method")
    assert list(table["errors"]) == [20, 0, 0] or table.loc["cwac", "errors"] == 20
    assert not table.loc["cwac", "within"] and labels.methods_p(biased, "j") < 0.001
    assert table.loc["cwac", ["HS_labels", "HS_judge"]].tolist() == [50, 30]
    even = labelled({"sft": 4, "cwac": 4, "lisa": 4})
    assert labels.by_method(even, "j")["within"].all() and labels.methods_p(even, "j") > 0.9
    assert np.isnan(labels.methods_p(labelled({"sft": 0, "cwac": 0}), "j"))


def test_confusion_and_shares():
    seen = labels.confusion(pd.Series(["refusal", "harmful", "other"]), pd.Series(["refusal", "other", "other"]))
    assert seen.tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 1]]
    value, low, high = labels.share(np.array([True] * 9 + [False]))
    assert value == 90 and low == pytest.approx(55.5, abs=0.1) and high == pytest.approx(99.7, abs=0.1)


def test_two_judges_on_the_same_answers():
    found = labelled({"sft": 6, "cwac": 0}, n=10)
    better = found.verdicts.merge(found.labels[["sha256", "label"]], on="sha256").assign(judge="k")
    better["verdict"] = better["label"]
    both = labels.Labelled(found.labels, pd.concat([found.verdicts, better[["sha256", "judge", "verdict"]]]), 0)
    assert labels.mcnemar(both, "j", "k") == (0, 6, pytest.approx(2 * 0.5**6))
    assert labels.mcnemar(both, "k", "j") == (6, 0, pytest.approx(2 * 0.5**6))
    assert labels.mcnemar(both, "k", "k") == (0, 0, 1)
    # refusal and other are one
    other = better.assign(judge="o", verdict=better["verdict"].replace("refusal", "other"))
    assert labels.mcnemar(labels.Labelled(found.labels, pd.concat([better, other]), 0), "k", "o") == (0, 0, 1)
    text = labels.report(both, "x")
    assert "| j / k | all" in " ".join(text.split()) and "0.031" in text and "Parts of the sample" not in text


def test_models_and_answers_of_no_text_are_parts():
    found = labelled({"sft": 2, "cwac": 0}, n=10)
    rows = found.labels.assign(model="a", empty="no")
    rows.loc[rows["method"] == "cwac", "model"] = "b"
    rows.loc[rows["sha256"].isin(["cwac-0", "cwac-1"]), "empty"] = "yes"
    planted = labels.Labelled(rows, found.verdicts, 0)
    parts = {name: len(of.labels) for name, of in labels.parts_of(planted)}
    assert parts == {"without empty answers": 38, "a": 20, "b": 20, "b, without empty answers": 18}
    assert all(set(of.verdicts["sha256"]) == set(of.labels["sha256"]) for _, of in labels.parts_of(planted))
    table = " ".join(labels.report(planted, "x").split())
    assert "| a | j | 20 | 90.0 [" in table and "| b, without empty answers | j | 18 | 100.0 [" in table
    assert not list(labels.parts_of(labels.Labelled(rows.assign(model="a", empty="no"), found.verdicts, 0)))


def test_a_judge_without_all_verdicts_is_refused(tmp_path):
    found = labelled({"sft": 0}, n=2)
    found.labels.to_csv(tmp_path / "labels.csv", index=False)
    found.verdicts[1:].to_csv(tmp_path / "verdicts.csv", index=False)
    with pytest.raises(UserError, match="j judged 3 of 4 labelled answers"):
        labels.read(tmp_path)
    with pytest.raises(UserError, match="labels.csv is missing"):
        labels.read(tmp_path / "none")


def test_tables_name_a_judges_agreement(tmp_path):
    found = labelled({"sft": 2, "cwac": 3})
    assert labels.agreements(tmp_path) == {}
    found.labels.to_csv(tmp_path / "labels.csv", index=False)
    found.verdicts.to_csv(tmp_path / "verdicts.csv", index=False)
    known = labels.agreements(tmp_path)
    assert known == {"j": {"harmful": 97.5, "n": 200}}
    assert labels.named(["i", "j"], known) == "i, j (harmful or not as labelled: 97.5 % of 200 answers)"
    assert labels.named([], known) == "none"
