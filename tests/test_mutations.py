"""The tests test: a bug planted in each function that a result hangs on fails the test named beside it."""

import pytest

from tests.forked import FORKS
from tests.mutate import run

pytestmark = [pytest.mark.slow, pytest.mark.faults]

BUGS = [
    # the weight constraint
    ("cwac.constraints.subspace:project_", "alpha=-1", "alpha=1", "test_constraints.py::test_project_matches", "sign"),
    (
        "cwac.constraints.subspace:project_",
        "beta=-1",
        "beta=0",
        "test_properties.py::test_projected_weights",
        "W_0 V left out",
    ),
    (
        "cwac.constraints.subspace:rank_for",
        "(share < energy).sum()) + 1",
        "(share < energy).sum())",
        "test_properties.py::test_the_rank",
        "off by one",
    ),
    (
        "cwac.constraints.subspace:fit_subspace",
        "V.flip(1)",
        "V.flip(0)",
        "test_constraints.py::test_subspace_is_orthonormal",
        "wrong axis",
    ),
    (
        "cwac.constraints.subspace:Counted.__init__",
        "places[places >= 0]",
        "places.flatten()",
        "test_constraints.py::test_padding_never_enters",
        "padding kept",
    ),
    (
        "cwac.constraints.subspace:Constraint.project_gradients_",
        "alpha=-1",
        "alpha=1",
        "test_constraints.py::test_gradient_projection",
        "sign",
    ),
    (
        "cwac.evaluation.drift:weight_leak",
        "(out[name] / total[name]) ** 0.5",
        "(out[name] / total[name])",
        "test_faults.py::test_the_bound_of",
        "root left out",
    ),
    # the activation constraint
    (
        "cwac.constraints.sae.target:SafetyTarget.loss",
        "(q - base)",
        "(q + base)",
        "test_sae.py::test_the_unchanged_model_has_no_loss",
        "sign",
    ),
    (
        "cwac.constraints.sae.target:SafetyTarget.loss",
        "(active | (a > tau * (1 + MARGIN)), a, 0.0)",
        "(active | (a > tau * (1 + MARGIN)), a.detach(), 0.0)",
        "test_sae.py::test_a_dropped_latent",
        "detached",
    ),
    (
        "cwac.constraints.sae.target:SafetyTarget._mean",
        "sum(1) / mask.sum(1)",
        "sum(0) / mask.sum(0)",
        "test_sae.py::test_loss_does_not_depend_on_the_batch",
        "wrong axis",
    ),
    # training
    (
        "cwac.training.engine:MethodTrainer.compute_loss",
        "loss + penalty",
        "loss - penalty",
        "test_invariance.py::test_the_penalty_counts_once",
        "sign",
    ),
    (
        "cwac.training.engine:MethodTrainer.compute_loss",
        "penalty * (",
        "penalty.detach() * (",
        "test_invariance.py::test_the_penalty_counts_once",
        "detached",
    ),
    (
        "cwac.data.tokenize:encode_example",
        "[IGNORE] * len(prompt)",
        "[IGNORE] * (len(prompt) - 1)",
        "test_data.py::test_prompts_carry_no_loss",
        "off by one",
    ),
    (
        "cwac.data.tokenize:Collator.__call__",
        "mask[i, :n] = 1",
        "mask[i, : n - 1] = 1",
        "test_data.py::test_padding_is_masked",
        "off by one",
    ),
    (
        "cwac.data.mix:mix",
        "len(train) - n_harmful",
        "len(train) - n_harmful - 1",
        "test_properties.py::test_mix_has_exactly",
        "off by one",
    ),
    # measuring
    (
        "cwac.evaluation.judge:KeywordJudge.judge_one",
        "overlap >= self",
        "overlap < self",
        "test_data.py::test_the_judge_has_three",
        "sign",
    ),
    (
        "cwac.data.harmful:assert_disjoint",
        "if prompt in owner",
        "if prompt not in owner",
        "test_properties.py::test_pools_are_disjoint",
        "sign",
    ),
    (
        "cwac.core.identity:identity",
        "key not in NOT_IDENTITY",
        "key in NOT_IDENTITY",
        "test_properties.py::test_a_key_that_is",
        "sign",
    ),
    (
        "cwac.core.run_dir:Run.add_rows",
        "have.add(key)",
        "have.add(None)",
        "test_runs.py::test_a_row_is_never_written_twice",
        "rows twice",
    ),
    (
        "analysis.stats:half_width",
        "for v in values) / (n - 1)",
        "for v in values) / n",
        "test_analysis.py::test_t_interval_is_scipys",
        "off by one",
    ),
]


def outcome(bug, test: str, log) -> int:
    file, _, name = test.partition("::")
    process = FORKS.Process(target=run, args=(bug, [f"tests/{file}", "-k", name], str(log)))
    process.start()
    process.join(600)
    return process.exitcode


@pytest.mark.parametrize("bug", BUGS, ids=lambda b: f"{b[0].rpartition(':')[2]} {b[4]}")
def test_a_planted_bug_fails_its_test(bug, tmp_path):
    *planted, test, _ = bug
    assert outcome(tuple(planted), test, tmp_path / "log") == 1, (tmp_path / "log").read_text()[-3000:]


@pytest.mark.parametrize("test", sorted({b[3] for b in BUGS}))
def test_without_a_bug_the_same_test_passes(test, tmp_path):
    assert outcome(None, test, tmp_path / "log") == 0, (tmp_path / "log").read_text()[-3000:]
