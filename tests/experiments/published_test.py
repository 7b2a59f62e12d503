"""The published results, against figures that are typed in here."""

import collections

import pytest

from sos.errors import UsageError
from sos.experiments import published
from tests.support import published as maker

# Rows of the authors' tables.
ROWS = {
    "rn50_baselines": 3,
    "rn50_magnitude_pruning": 236,
    "rn50_random_pruning": 288,
    "rn50_variational_dropout": 161,
    "rn50_l0_regularization": 323,
    "rn50_lottery_ticket": 48,
    "rn50_scratch_lr_scaled": 20,
    "rn50_scratch_lr_constant_final": 10,
    "rn50_scratch_lr_constant_decay": 12,
    "rn50_scratch_lr_continual_decay": 12,
    "transformer_baselines": 5,
    "transformer_magnitude_pruning": 504,
    "transformer_random_pruning": 630,
    "transformer_variational_dropout": 372,
    "transformer_l0_regularization": 930,
    "transformer_scratche": 175,
    "transformer_scratchb": 175,
    "transformer_scratche_augmented_init": 175,
    "transformer_scratchb_augmented_init": 175,
    "transformer_lottery_ticket": 175,
}
# Scores of a row, where there are several.
SCORES = {
    "rn50_scratch_lr_scaled": 9,
    "rn50_scratch_lr_constant_final": 9,
    "transformer_variational_dropout": 11,
}
# Best scores at 50, 60 (Transformer only), 70, 80, 90, 95 and 98 %.
BEST = {
    "resnet50": {
        "magnitude pruning": (76.53, 76.38, 75.58, 73.91, 70.59, 57.90),
        "random pruning": (74.59, 72.22, 70.21, 65.00, 58.08, 44.00),
        "variational dropout": (76.55, None, 75.28, 73.84, 71.82, 67.36),
    },
    "transformer": {
        "magnitude pruning": (26.33, 25.94, 25.21, 24.65, 23.26, 20.75, 16.37),
        "random pruning": (24.56, 24.45, 24.01, 23.15, 20.67, 17.42, 10.94),
        "variational dropout": (
            *(26.26, 25.37, 25.08, 24.33, 21.43, 19.13, 14.45),
        ),
        "L0 regularization": (26.72, 26.16, 25.29, 24.15, 20.05, 19.78, 16.83),
    },
}
# Means without collapsed runs, and some standard deviations: of the sample for
# ResNet-50, of the population for the Transformer.
MEANS = {
    "resnet50": {
        "scratch-e": "74.68 0.09,72.71,71.02,67.31,62.63",
        "augmented init": "74.64 0.09,72.82,71.04,67.21,62.52",
        "scratch-b": "75.67 0.15,74.17,72.59,69.00,64.55",
        "augmented init, scratch-b": "75.68 0.10,74.18,72.55,69.04,64.65",
        "scratch-b, hold": "74.87 0.10,73.08,71.35,67.54,62.81",
        "augmented init, scratch-b, hold": "74.86 0.14,73.04,71.32,67.62,62.85",
        "lottery ticket": "74.64 0.08,72.94 0.11,71.21 0.11,67.38 0.20,"
        "62.86 0.19,51.28 0.33",
    },
    "transformer": {
        "scratch-e": "24.58 0.16,23.96 0.13,23.16 0.15,22.70,20.67 0.22,"
        "17.93 0.25,13.27 0.35",
        "augmented init": "24.43 0.15,23.88 0.10,22.93 0.15,22.47,20.23 0.17,"
        "17.28 0.25,12.74",
        "scratch-b": "26.03 0.12,25.38 0.12,24.56 0.15,22.66 0.15,21.07 0.13,"
        "18.47 0.20,13.93 0.32",
        "augmented init, scratch-b": "24.80 0.20,24.18 0.13,23.30 0.16,"
        "22.46 0.15,20.54 0.19,17.66 0.23,12.98 0.27",
        "lottery ticket": "24.00 0.49,22.54 1.80,23.26 0.37,23.47 0.19,"
        "21.77 0.17,18.89 0.20,13.38 0.39",
    },
}
SETTINGS = {
    ("resnet50", "magnitude pruning", 0.9): "begin_step=40000 end_step=76000 "
    "frequency=2000 label_smoothing=0.1",
    ("resnet50", "random pruning", 0.8): "begin_step=0 end_step=40000 "
    "frequency=8000 label_smoothing=0",
    (
        "resnet50",
        "variational dropout",
        0.98,
    ): "penalty_weight=7.80538368534e-7 "
    "ramp_begin_step=8000 ramp_end_step=76000 label_smoothing=0.1",
    ("transformer", "variational dropout", 0.9): "penalty_weight="
    "8.88888888889e-8 ramp=cubic ramp_begin_step=0 ramp_end_step=200000 "
    "threshold=2.5 regularization=label_smoothing",
    ("transformer", "L0 regularization", 0.5): "penalty_weight="
    "2.888888888888889e-7 ramp=cubic ramp_begin_step=100000 "
    "ramp_end_step=300000 regularization=label_smoothing",
}


def scores():
    return [s for model in published.REFERENCES for s in published.load(model)]


def points(model, label):
    return [p for p in published.best(model) if p.label == label]


def test_load_both_models_has_all_rows_of_all_tables():
    rows = {(score.table, score.row) for score in scores()}
    assert len(rows) == 4429
    assert collections.Counter(table for table, _ in rows) == ROWS
    counts = collections.Counter(score.table for score in scores())
    assert counts == {t: n * SCORES.get(t, 1) for t, n in ROWS.items()}


def test_load_scores_have_one_unit():
    assert min(s.sparsity for s in scores()) == 0
    assert max(s.sparsity for s in scores()) < 1
    pruned = [
        score.score
        for score in published.load("resnet50")
        if score.technique not in ("L0Regularization", "RandomPruning")
    ]
    # In percent, from tables with percent and tables with fractions.
    assert 50 < min(pruned) < max(pruned) < 77
    # An image of 50,000.
    assert all(round(score / 0.002, 6) % 1 == 0 for score in pruned)


def test_load_l0_of_resnet50_has_columns_by_their_right_names():
    found = [
        s.hyperparameters
        for s in published.load("resnet50")
        if s.technique == "L0Regularization"
    ]
    assert {h["label_smoothing"] for h in found} == {"0", "0.1"}
    assert max(float(h["weight_decay"]) for h in found) < 2e-4


def test_load_variational_dropout_has_eleven_thresholds():
    found = [
        s.hyperparameters["threshold"]
        for s in published.load("transformer")
        if s.technique == "VariationalDropout"
    ]
    assert collections.Counter(found) == {
        str(threshold / 2): 372 for threshold in range(11)
    }


def test_load_scratch_runs_of_random_masks_say_so():
    tables = collections.Counter(
        score.table
        for score in scores()
        if score.branch and score.technique == "RandomPruning"
    )
    assert tables == {
        "rn50_scratch_lr_constant_decay": 12,
        "rn50_scratch_lr_continual_decay": 12,
    }


@pytest.mark.parametrize("read", [published.load, published.best])
def test_read_unknown_model_raises(read):
    with pytest.raises(UsageError, match="resnet50 or transformer.*'resnet'"):
        read("resnet")


@pytest.mark.parametrize("model", BEST)
def test_best_of_techniques_are_those_of_the_paper(model):
    for label, expected in BEST[model].items():
        targets = zip(maker.TARGETS[model], expected, strict=True)
        assert {
            p.target_sparsity: round(p.score + 1e-9, 2)
            for p in points(model, label)
        } == {target: score for target, score in targets if score is not None}
        assert all(
            abs(p.sparsity - p.target_sparsity) <= 0.003 and p.sd is None
            for p in points(model, label)
        )


def test_best_l0_of_resnet50_has_no_points():
    assert not points("resnet50", "L0 regularization")


@pytest.mark.parametrize(("model", "label", "target"), SETTINGS)
def test_best_has_the_hyperparameters_of_the_paper(model, label, target):
    (point,) = (p for p in points(model, label) if p.target_sparsity == target)
    assert point.settings == SETTINGS[model, label, target]


@pytest.mark.parametrize("model", MEANS)
def test_best_of_branches_are_means_with_standard_deviations(model):
    for label, text in MEANS[model].items():
        found = points(model, label)
        for point, cell in zip(found, text.split(","), strict=True):
            mean, *sd = map(float, cell.split())
            assert point.score == pytest.approx(mean, abs=0.0061)
            if sd:
                found_sd = point.sd
                if model == "transformer":
                    found_sd *= ((point.runs - 1) / point.runs) ** 0.5
                assert found_sd == pytest.approx(sd[0], abs=0.0061)
    branches = {p.label for p in published.best(model) if p.branch}
    assert branches == set(MEANS[model])


@pytest.mark.parametrize(
    ("model", "mean", "sd", "runs"),
    [("resnet50", 76.69, 0.11, 3), ("transformer", 27.29, 0.17, 5)],
)
def test_best_dense_is_the_mean_of_the_baselines(model, mean, sd, runs):
    (dense,) = points(model, "dense")
    assert (round(dense.score, 2), round(dense.sd, 2)) == (mean, sd)
    assert (dense.runs, dense.sparsity) == (runs, 0)


def test_best_counts_collapsed_runs():
    collapsed = {
        (p.label, p.target_sparsity): p.collapsed
        for p in published.best("transformer")
        if p.collapsed
    }
    assert collapsed == {
        ("scratch-e", 0.8): 1,
        ("augmented init", 0.8): 1,
        ("augmented init", 0.98): 1,
    }
    assert not any(p.collapsed for p in published.best("resnet50"))


def test_best_nonuniform_pruning_is_that_of_the_readme():
    found = points("resnet50", "non-uniform magnitude pruning")
    assert [(p.target_sparsity, p.score) for p in found] == [
        *((0.8, 76.52), (0.9, 75.16), (0.95, 72.71), (0.965, 69.26)),
    ]
    assert {p.source for p in found} == {"README"}


# What is made of the tables.


def test_small_table_and_page_are_what_the_command_writes():
    message = "`python -m tests.support.published --write` updates them."
    small = (maker.DATA / published.BEST).read_text("utf-8")
    assert small == maker.best_table(), message
    assert maker.PAGE.read_text("utf-8") == maker.page(), message


def test_files_of_the_results_are_small():
    assert (maker.DATA / published.RESULTS).stat().st_size < 120_000
    pictures = list(maker.PAGE.parent.glob("published_*.png"))
    assert len(pictures) == 4
    assert max(picture.stat().st_size for picture in pictures) < 250_000


def tidy(tmp_path, name, text):
    (tmp_path / f"{name}.csv").write_text(text, "utf-8")
    return list(maker.tidy(tmp_path))


def test_tidy_l0_of_resnet50_swaps_two_names(tmp_path):
    (row,) = tidy(
        tmp_path,
        "rn50_l0_regularization",
        "initial_log_alpha,l0_norm_weight,label_smoothing,weight_decay,"
        "global_sparsity,accuracy\n4.6,0.003,0.0001,0.1,0.2,0.005319999997\n",
    )
    assert (row["label_smoothing"], row["weight_decay"]) == ("0.1", "0.0001")
    assert row["score"] == "0.532"


def test_tidy_scratch_runs_splits_repeated_ones(tmp_path):
    rows = tidy(
        tmp_path,
        "rn50_scratch_lr_scaled",
        "sparsity,time multiplier,init method,begin,Run 1,Run 2\n"
        "0.5,2,sparse,40000,0.75,0.76\n",
    )
    assert [(r["run"], r["score"]) for r in rows] == [
        *(("1", "75.000"), ("2", "76.000"))
    ]
    assert rows[0]["label"] == "augmented init, scratch-b"
    assert rows[0]["row"] == rows[1]["row"] == "1"


def test_tidy_scratch_runs_without_a_name_of_a_column_has_it(tmp_path):
    (row,) = tidy(
        tmp_path,
        "rn50_scratch_lr_constant_decay",
        "sparsity,time multiplier,,accuracy\n0.5,2,baseline,0.72\n",
    )
    assert (row["branch"], row["technique"]) == ("scratch", "RandomPruning")


def test_tidy_variational_dropout_splits_thresholds(tmp_path):
    rows = tidy(
        tmp_path,
        "transformer_variational_dropout",
        "dkl_weight_start,dkl_weight_diff,regularization,MOSES BLEU:0.0,"
        "Sparsity:0.0,MOSES BLEU:0.5,Sparsity:0.5\n"
        "100000,200000,none,0.17,0.98,20.1,0.9\n",
    )
    assert [(r["threshold"], r["score"], r["sparsity"]) for r in rows] == [
        *(("0.0", "0.17", "0.98"), ("0.5", "20.1", "0.9"))
    ]
    assert rows[0]["ramp_end_step"] == "300000"


def test_pack_is_what_load_reads(tmp_path, monkeypatch):
    rows = [
        {"model": "resnet50", "label": "dense", "row": "1", "score": "76.5"}
    ]
    (tmp_path / published.RESULTS).write_bytes(maker.pack(rows))
    monkeypatch.setattr(published, "_DATA", tmp_path)
    (score,) = published.load.__wrapped__("resnet50")
    assert (score.label, score.score, score.sparsity) == ("dense", 76.5, 0)
    assert maker.pack(rows) == maker.pack(rows)
