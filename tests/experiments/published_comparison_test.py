import csv
import math

import pytest

from sos.errors import StorageError, UsageError
from sos.experiments.config import resolve
from sos.experiments.published import best
from sos.experiments.published_comparison import FIELDS, compare
from tests.support import toy_experiment
from tests.support.results import make_run

PRUNED = toy_experiment.MAGNITUDE
SCRATCH = {"name": "scratch", "multiplier": 1, "learning_rate": "scale"}


def toy_run(accuracy, achieved, sparsity, *, branch=None, parent=None, **other):
    """A run that achieved an accuracy and a sparsity."""
    config = {**toy_experiment.CONFIG, "sparsity": sparsity, **other}
    run = make_run(
        resolve(config), parent=parent, accuracy=accuracy, sparsity=achieved
    )
    if branch is not None:
        run.config["branch"] = branch
    return run


def pruned(accuracy, achieved, **other):
    sparsity = {**toy_experiment.MAGNITUDE, "sparsity": achieved}
    return toy_run(accuracy, achieved, sparsity, **other)


def branch_of(parent, accuracy, **branch):
    sparsity = {"technique": "FixedMask"}
    achieved = parent.result.sparsity
    return toy_run(accuracy, achieved, sparsity, branch=branch, parent=parent)


def dense(accuracy, **other):
    return toy_run(accuracy, None, {"technique": None}, **other)


def only(runs, model="resnet50", **options):
    (point,) = compare(runs, model, **options).points
    return point


def published(model, label, target):
    (point,) = (
        p
        for p in best(model)
        if (p.label, p.target_sparsity) == (label, target)
    )
    return point


def test_compare_dense_runs_counts_published_standard_deviations():
    point = only([dense(0.768, seed=0), dense(0.770, seed=1)])
    assert (point.runs, point.sparsity) == (2, 0)
    assert point.score == pytest.approx(76.9)
    assert (point.published_label, point.match) == ("dense", "mean of 3 runs")
    # The baselines are 76.67, 76.80 and 76.59.
    assert point.deviations == pytest.approx((76.9 - 76.687) / 0.106, abs=0.01)


def test_compare_a_technique_counts_points():
    point = only([pruned(0.729, 0.9)])
    assert point.difference == pytest.approx(72.9 - 73.91)
    assert point.deviations is None
    assert point.match == "best of 51 runs"


@pytest.mark.parametrize("achieved", [0.8975, 0.9025])
def test_compare_within_the_window_takes_the_published_point(achieved):
    assert only([pruned(0.7, achieved)]).published_score == 73.91


def test_compare_between_two_sparsities_joins_them():
    # Half way in the logarithm of the density.
    point = only([pruned(0.7, 1 - math.sqrt(0.1 * 0.2))])
    assert point.published_score == pytest.approx((75.576 + 73.91) / 2)
    assert point.match == "between 80% and 90%"


def test_compare_between_two_sparsities_joins_standard_deviations():
    parent = pruned(0.7, 1 - math.sqrt(0.1 * 0.2))
    point = only([branch_of(parent, 0.7, **SCRATCH)])
    sds = [published("resnet50", "scratch-e", s).sd for s in (0.8, 0.9)]
    assert point.published_sd == pytest.approx(sum(sds) / 2)


@pytest.mark.parametrize("achieved", [0.4, 0.99])
def test_compare_outside_of_the_sparsities_finds_nothing(achieved):
    point = only([pruned(0.7, achieved)])
    assert point.published_score is point.difference is point.deviations is None
    assert point.match == "nothing at this sparsity"


def test_compare_pruning_with_rules_takes_the_nonuniform_one():
    sparsity = {**toy_experiment.MAGNITUDE, "rules": {"^a/": None}}
    run = toy_run(0.75, 0.9, sparsity)
    assert only([run]).published_score == 75.16
    # There is none for the Transformer.
    point = only([run], "transformer", metric="accuracy")
    assert point.published_label == "magnitude pruning"


@pytest.mark.parametrize(
    ("branch", "label"),
    [
        (SCRATCH, "scratch-e"),
        ({**SCRATCH, "multiplier": 2.0}, "scratch-b"),
        (
            {**SCRATCH, "multiplier": 2.0, "learning_rate": "hold"},
            "scratch-b, hold",
        ),
        ({"name": "augmented_init"}, "augmented init"),
        (
            {"name": "augmented_init", "multiplier": 2},
            "augmented init, scratch-b",
        ),
        ({"name": "lottery_ticket", "step": 0}, "lottery ticket"),
        ({"name": "lottery_ticket", "step": 5}, ""),
        ({**SCRATCH, "multiplier": 2.0, "learning_rate": "drop"}, ""),
        ({"name": "random_mask"}, ""),
    ],
)
def test_compare_a_branch_takes_the_one_of_its_options(branch, label):
    point = only([branch_of(pruned(0.74, 0.9), 0.7, **branch)])
    assert point.published_label == label
    if label:
        assert point.published_sd == published("resnet50", label, 0.9).sd
    else:
        assert point.match == "nothing of this kind"


def test_compare_a_branch_of_other_masks_finds_nothing():
    random = toy_run(0.65, 0.9, toy_experiment.TECHNIQUES["random"])
    assert only([branch_of(random, 0.6, **SCRATCH)]).published_score is None


def test_compare_a_model_sparse_by_rules_alone_finds_nothing():
    run = toy_run(0.7, 0.9, {"technique": None, "rules": {"a": None}})
    assert only([run]).match == "nothing of this kind"


def test_compare_transformers_reads_their_bleu():
    run = pruned(0.7, 0.9)
    run.result.metrics["study_bleu"] = 23.0
    point = only([run], "transformer")
    assert point.difference == pytest.approx(23.0 - 23.26)


def test_compare_without_the_metric_raises():
    with pytest.raises(
        UsageError, match=r"'study_bleu'.*--metric.*accuracy, loss"
    ):
        compare([dense(0.7)], "transformer")


def test_compare_accuracy_in_percent_raises():
    with pytest.raises(UsageError, match=r"fraction in \[0, 1\].*: 76\.9"):
        compare([dense(76.9)], "resnet50")
    run = dense(0.769)
    run.result.metrics["study_bleu"] = 27.3
    assert only([run], "transformer").score == 27.3


def test_compare_some_runs_without_the_metric_counts_them():
    runs = [dense(0.7), dense(math.nan, seed=1)]
    comparison = compare(runs, "resnet50")
    assert (comparison.points[0].runs, comparison.left_out) == (1, 1)
    words = " ".join(str(comparison).split())
    assert "without the metric: 1 runs" in words


def test_compare_unknown_model_raises():
    with pytest.raises(UsageError, match="'vgg'"):
        compare([dense(0.7)], "vgg")


def test_comparison_printed_has_a_row_for_each_point():
    parent = pruned(0.74, 0.95)
    runs = [
        *(pruned(0.73, 0.9), dense(0.76), parent),
        branch_of(parent, 0.62, **SCRATCH),
    ]
    lines = str(compare(runs, "resnet50")).splitlines()
    rows = [" ".join(line.split()) for line in lines]
    assert "Top-1 accuracy (%)" in rows[0]
    start = rows.index(
        "magnitude pruning 1 90.0% 73.00 73.91 -0.91 best of 51 runs"
    )
    assert rows[start + 1 : start + 4] == [
        "magnitude pruning 1 95.0% 74.00 70.59 +3.41 best of 22 runs",
        "dense 1 0.0% 76.00 76.69 ± 0.11 -6.5 sd mean of 3 runs",
        "fixed mask 1 95.0% 62.00 62.63 ± 0.09 -7.0 sd mean of 9 runs: "
        "scratch-e",
    ]


def test_comparison_printed_keeps_brackets_of_labels():
    run = pruned(0.73, 0.9, label="[/b] :smile: [red]")
    assert "[/b] :smile: [red]" in str(compare([run], "resnet50"))


def test_save_csv_has_a_row_for_each_point(tmp_path):
    comparison = compare([dense(0.76), pruned(0.73, 0.9)], "resnet50")
    comparison.save_csv(tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == FIELDS
    assert [row["published_label"] for row in rows] == [
        *("dense", "magnitude pruning")
    ]
    assert float(rows[1]["difference"]) == pytest.approx(-0.91)
    assert rows[1]["deviations"] == ""


def test_save_csv_to_a_directory_raises(tmp_path):
    with pytest.raises(StorageError, match="could not be written"):
        compare([dense(0.7)], "resnet50").save_csv(tmp_path)
