import dataclasses
import math

import pytest

from sos.experiments import conclusions
from sos.experiments.scores import ACCURACY, BLEU
from tests.support.results import (
    in_bleu,
    make_branch,
    make_study,
    make_toy_run,
)


def _verdicts(runs, **options):
    return {
        finding.statement: finding.verdict
        for finding in conclusions.findings(runs, **options)
    }


def _finding(runs, words, **options):
    (finding,) = (
        finding
        for finding in conclusions.findings(runs, **options)
        if words in finding.statement
    )
    return finding


def _changed(run, **metrics):
    result = dataclasses.replace(run.result, metrics=metrics)
    return dataclasses.replace(run, result=result)


def test_findings_of_a_known_study():
    assert _verdicts(make_study()) == {
        # Both are equal there.
        "At 50 % sparsity, magnitude pruning is best": "undecided",
        "At 90 % sparsity, l0 regularization is best": "holds",
        "At 98 % sparsity, l0 regularization is best": "holds",
        "Magnitude pruning is above random pruning at high sparsity": "holds",
        "Magnitude pruning matches or beats l0 regularization": (
            "does not hold"
        ),
        "A dense first layer helps magnitude pruning at high sparsity": (
            "not tested"
        ),
        "Sparsity differs more between layers with l0 regularization than with "
        "magnitude pruning": "holds",
        # Only the first one is.
        "L0 regularization keeps the first and the last layer denser than the "
        "network": "undecided",
        "Scratch-e does not reach its trunk": "holds",
        "Scratch-b does not reach its trunk": "holds",
        "Augmented init does not reach its trunk": "holds",
        "Lottery ticket does not reach its trunk": "holds",
        "Augmented initialization does not help": "holds",
        "Longer training from scratch helps": "holds",
        # It is better by half a point.
        "A lottery ticket is no better than fresh weights": "does not hold",
        "The trunk's mask is better than a random one with the same sparsity "
        "of each layer": "not tested",
        "The sparsity of each layer that another technique found helps "
        "magnitude pruning": "not tested",
    }


def test_findings_small_difference_needs_many_test_examples():
    runs, words = make_study(), "no better than fresh weights"
    # The standard error of an accuracy near 81 % is 0.6 and 0.4 points.
    assert _finding(runs, words, eval_examples=4_000).verdict == "holds"
    assert _finding(runs, words, eval_examples=10_000).verdict == (
        "does not hold"
    )
    longer = _finding(runs, "Longer training", eval_examples=1_000)
    assert longer.verdict == "undecided"
    assert longer.estimate == pytest.approx(1)
    assert "standard error" in longer.evidence


def test_findings_estimate_is_the_mean_over_sparsities():
    finding = _finding(make_study(), "above random pruning")
    # 5 points at 90 % and 28 at 98 %; the seeds differ equally.
    assert finding.estimate == pytest.approx(16.5)
    assert finding.interval == pytest.approx((16.5, 16.5))
    assert finding.evidence == (
        "90 %: +5.0 [+5.0, +5.0]; 98 %: +28.0 [+28.0, +28.0] (2 seeds)."
    )


def test_findings_one_seed_decides_nothing():
    verdicts = _verdicts(make_study(seeds=[0]))
    assert set(verdicts.values()) == {"undecided", "not tested"}
    finding = _finding(make_study(seeds=[0]), "above random pruning")
    assert (finding.estimate, finding.interval) == (pytest.approx(16.5), None)
    assert "One seed" in finding.evidence


def test_findings_equal_techniques_match():
    runs = [run for run in make_study() if run.technique != "RandomPruning"]
    equal = []
    for run in runs:
        if run.technique == "L0Regularization":
            accuracy = {0.499: 0.86, 0.899: 0.85, 0.979: 0.78}[
                round(run.result.sparsity, 3)
            ]
            run = _changed(run, accuracy=accuracy + 0.002 * run.config["seed"])
        equal.append(run)
    finding = _finding(equal, "matches or beats", eval_examples=4_000)
    assert finding.verdict == "holds"
    assert finding.estimate == pytest.approx(0, abs=0.1)


def test_findings_missing_techniques_are_not_tested():
    verdicts = _verdicts([make_toy_run("dense", 0.9, 0)])
    assert len(verdicts) == 11
    assert set(verdicts.values()) == {"not tested"}


def test_findings_lost_runs_are_left_out():
    runs = make_study()
    lost = [
        _changed(run, accuracy=math.nan)
        if run.technique == "RandomPruning" and run.config["seed"] == 1
        else run
        for run in runs
    ]
    finding = _finding(lost, "above random pruning")
    assert finding.estimate == pytest.approx(16.6)
    assert finding.interval is None


def test_findings_without_accuracy_are_of_layers_only():
    runs = [_changed(run, loss=1.0) for run in make_study()]
    tested = [s for s, v in _verdicts(runs).items() if v != "not tested"]
    assert len(tested) == 2
    assert all("layer" in statement for statement in tested)


def test_findings_branches_without_their_trunk_are_left_out():
    runs = [dataclasses.replace(run, parent=None) for run in make_study()]
    assert _verdicts(runs)["Longer training from scratch helps"] == "not tested"


def test_findings_dense_first_layer_is_found_by_its_sparsity():
    runs = make_study()
    for run in make_study(branches=False):
        if run.technique != "MagnitudePruning":
            continue
        first, last = run.result.weights
        result = dataclasses.replace(
            run.result,
            metrics={"accuracy": run.result.metrics["accuracy"] + 0.02},
            weights=(dataclasses.replace(first, sparsity=0.0), last),
        )
        sparsity = {**run.config["sparsity"], "rules": [["^a/", None]]}
        config = {**run.config, "sparsity": sparsity, "label": "first dense"}
        runs.append(dataclasses.replace(run, result=result, config=config))
    finding = _finding(runs, "dense first layer")
    assert finding.verdict == "holds"
    assert finding.estimate == pytest.approx(2)


def test_findings_profile_is_compared_at_the_sparsity_it_reaches():
    runs = make_study()
    for trunk in [run for run in runs if run.technique == "L0Regularization"]:
        branch = {"name": "transferred_profile"}
        run = make_branch(trunk, "a profile", -0.01, branch)
        sparsity = make_toy_run("magnitude", 0, 0, 0.5).config["sparsity"]
        runs.append(
            dataclasses.replace(
                run, config={**run.config, "sparsity": sparsity}
            )
        )
    finding = _finding(runs, "sparsity of each layer that l0")
    # 85, 85 and 83 % against magnitude pruning's 86, 85 and 78.
    assert finding.estimate == pytest.approx((-1 + 0 + 5) / 3, abs=0.1)
    assert finding.evidence.startswith("49.9 %: −1.0")


def test_signed_has_a_minus_sign_and_no_negative_zero():
    assert conclusions.signed(-1.25) == "−1.2"
    assert conclusions.signed(-0.01) == "+0.0"


def test_findings_trunks_of_other_sparsity_at_each_seed_are_one_stratum():
    runs = []
    for seed in (0, 1):
        trunk = make_toy_run("l0", 0.86 + 0.01 * seed, seed, 0.9)
        trunk = dataclasses.replace(
            trunk,
            result=dataclasses.replace(
                trunk.result, sparsity=0.88 + 0.02 * seed
            ),
        )
        branch = {"name": "scratch", "multiplier": 1, "learning_rate": "scale"}
        runs += [trunk, make_branch(trunk, "scratch-e", -0.02, branch)]
    finding = _finding(runs, "Scratch-e does not reach")
    assert finding.evidence == "89 %: +2.0 [+2.0, +2.0] (2 seeds)."
    assert finding.verdict == "holds"


def test_findings_of_bleu_have_its_unit_and_no_margin():
    runs = make_study()
    percent = conclusions.findings(runs)
    bleu = conclusions.findings(in_bleu(runs), eval_examples=3_000)
    scored = [(a, b) for a, b in zip(percent, bleu, strict=True) if a.estimate]
    assert scored
    for a, b in scored:
        assert (a.statement, a.verdict) == (b.statement, b.verdict)
        if a.measured.startswith("accuracy, "):
            # 30 times a fraction instead of 100 times.
            assert b.estimate == pytest.approx(0.3 * a.estimate)
            assert b.measured == a.measured.replace("accuracy", "BLEU")
            assert "%" not in b.evidence.partition("Means: ")[2]
        else:
            assert b == a
    assert any("magnitude pruning 25." in b.evidence for _, b in scored)
    assert conclusions.eval_examples(in_bleu(runs)) is None


def test_method_of_bleu_speaks_of_no_standard_error():
    text = " ".join(conclusions.method(BLEU))
    assert "accurac" not in text and "standard error" not in text
    assert "an accuracy" in conclusions.method(ACCURACY)[0]
