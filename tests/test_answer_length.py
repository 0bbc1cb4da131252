"""How verdicts move with an answer's length: by hand, and on the embedded model."""

import json

import pandas as pd
import pytest

from experiments import answer_length


def test_shares_and_moves_by_hand():
    short = ["refusal", "other", "harmful", "harmful"]
    long = ["refusal", "harmful", "harmful", "other"]
    rows = answer_length.compared({128: long, 64: short})
    assert rows[0] == {
        "tokens": 64,
        "n": 4,
        "HS": 50,
        "refusal": 25,
        "other": 25,
        "moved": 50,
        "appeared": 25,
        "went": 25,
    }
    assert rows[1] == rows[0] | {"tokens": 128, "moved": 0, "appeared": 0, "went": 0}


def test_a_limit_that_ends_no_answer_moves_none(artifacts, tmp_path, capsys):
    """The embedded model's answers have fewer than 16 tokens; four of them are no refusal yet."""
    given = ["tiny", "--names", "aligned", "--pools", "toy", "--limit", "12", "--artifacts", str(artifacts)]
    assert answer_length.main([*given, "--lengths", "16", "4", "32", "--out", str(tmp_path / "out")]) == 0
    frame = pd.read_csv(tmp_path / "out" / "lengths.csv").set_index("tokens")
    assert list(frame.index) == [4, 16, 32] and set(frame["model"]) == {"aligned"} and set(frame["n"]) == {12}
    assert frame.loc[4, "refusal"] < frame.loc[16, "refusal"]
    assert frame.loc[4, "moved"] == pytest.approx(frame.loc[16, "refusal"] - frame.loc[4, "refusal"])
    pd.testing.assert_series_equal(frame.loc[16], frame.loc[32], check_names=False)
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert provenance["judge"] == "keyword" and provenance["overrides"] == ["tiny"]
    assert "aligned" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--lengths", "64", "64"], "--lengths 64 64: give at least two different numbers from 1 on"),
        (["--lengths", "0", "64"], "--lengths 0 64: give at least two different numbers from 1 on"),
        (["--names", "a", "b"], "--names has 2 names for 1 models; give one a model"),
        (["--limit", "0"], "--limit 0 is not a number of at least 1"),
        (["--judge", "keywrd"], "--judge keywrd is unknown; did you mean keyword"),
        (["--data", __file__], "is a file; it takes a folder laid out like the hub (docs/defend.md)"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(given, message, tmp_path, artifacts, capsys):
    out = tmp_path / "out"
    asked = ["tiny", "--pools", "toy", "--artifacts", str(artifacts), "--out", str(out), *given]
    assert answer_length.main(asked) == 2
    assert message in capsys.readouterr().err.splitlines()[-1] and not out.exists()


def test_two_models_of_one_name_and_a_file_for_a_folder_are_refused(tmp_path, capsys):
    file = tmp_path / "out"
    file.write_text("kept")
    for given, message in [
        (["tiny", "tiny", "--out", str(tmp_path / "new")], "--names tiny tiny: give each model a name of its own"),
        (["tiny", "--out", str(file)], f"--out {file} is a file; give a folder"),
    ]:
        assert answer_length.main(given) == 2
        assert message in capsys.readouterr().err
    assert file.read_text() == "kept" and not (tmp_path / "new").exists()
