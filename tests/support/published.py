"""Makes the published results in the package, and docs/published.md.

    python -m tests.support.published --tables=FOLDER
    python -m tests.support.published [--write]

The first command packs the tables of the authors of the paper, from a copy of
https://github.com/google-research/google-research, folder
state_of_sparsity/results, into sos/experiments/data. The second makes the table
of the best results, the page and its figures from the packed tables, and
compares them with those of the checkout, or writes them.
"""

import argparse
import collections
import csv
import dataclasses
import decimal
import io
import lzma
import pathlib
import statistics
import sys

from sos.experiments import published
from sos.experiments.published import BEST, REFERENCES, RESULTS

ROOT = pathlib.Path(__file__).resolve().parents[2]
DATA = ROOT / "sos/experiments/data"
PAGE = ROOT / "docs/published.md"

COLUMNS = (
    *("model", "label", "technique", "branch", "table", "row", "run"),
    *("sparsity", "score", "threshold", "begin_step", "end_step", "frequency"),
    *("penalty_weight", "ramp", "ramp_begin_step", "ramp_end_step"),
    *("initial_log_alpha", "label_smoothing", "weight_decay"),
    *("regularization", "train_steps", "batch_size", "multiplier"),
)

# Names of columns, by the names that any of the tables gives them.
RENAMED = {
    "Accuracy": "score",
    "accuracy": "score",
    "MOSES BLEU": "score",
    "Moses BLEU": "score",
    "Sparsity": "sparsity",
    "Target Sparsity": "sparsity",
    "global sparsity": "sparsity",
    "global_sparsity": "sparsity",
    "begin": "begin_step",
    "begin_pruning_step": "begin_step",
    "end": "end_step",
    "end_pruning_step": "end_step",
    "freq": "frequency",
    "pruning_frequency": "frequency",
    "label smoothing": "label_smoothing",
    "DKL loss begin": "ramp_begin_step",
    "DKL loss saturate": "ramp_end_step",
    "DKL loss coeff": "penalty_weight",
    "dkl_weight": "penalty_weight",
    "l0_norm_weight": "penalty_weight",
    "dkl_weight_fn": "ramp",
    "l0_norm_weight_fn": "ramp",
    "dkl_weight_start": "ramp_begin_step",
    "time multiplier": "multiplier",
    "Training Steps": "train_steps",
    "Batch Size": "batch_size",
}
# Columns that say nothing: the same value in every row.
LEFT_OUT = (
    *("Tensor2Tensor HParams", "Tensor2Tensor Hparams", "HParams"),
    *("threshold_decay", "Dataset"),
)
MAGNITUDE, RANDOM = "MagnitudePruning", "RandomPruning"
# Label, technique and branch, by the name of the table without its model. Of a
# branch, the technique is the one that found its masks.
SERIES = {
    "baselines": ("dense", "", ""),
    "magnitude_pruning": ("magnitude pruning", MAGNITUDE, ""),
    "random_pruning": ("random pruning", RANDOM, ""),
    "variational_dropout": ("variational dropout", "VariationalDropout", ""),
    "l0_regularization": ("L0 regularization", "L0Regularization", ""),
    "lottery_ticket": ("lottery ticket", MAGNITUDE, "lottery_ticket"),
    "scratche": ("scratch-e", MAGNITUDE, "scratch"),
    "scratchb": ("scratch-b", MAGNITUDE, "scratch"),
    "scratche_augmented_init": ("augmented init", MAGNITUDE, "augmented_init"),
    "scratchb_augmented_init": (
        "augmented init, scratch-b",
        MAGNITUDE,
        "augmented_init",
    ),
}
# Label of the scratch runs of ResNet-50, by table and multiplier.
SCRATCH = {
    ("scratch_lr_scaled", "1"): ("scratch-e", MAGNITUDE),
    ("scratch_lr_scaled", "2"): ("scratch-b", MAGNITUDE),
    ("scratch_lr_constant_final", "2"): ("scratch-b, hold", MAGNITUDE),
    # Their pruning steps are the best of random pruning, not of magnitude.
    ("scratch_lr_constant_decay", "2"): (
        "scratch-b of random masks, constant decay",
        RANDOM,
    ),
    ("scratch_lr_continual_decay", "2"): (
        "scratch-b of random masks, continual decay",
        RANDOM,
    ),
}

# The README of the tables names these runs; no table has them. Sparsity counts
# the dense first layer.
NONUNIFORM = (
    # Target, accuracy, begin, end, frequency, label smoothing.
    (0.8, 76.52, 12500, 40000, 2000, 0.1),
    (0.9, 75.16, 12500, 36000, 2000, 0.1),
    (0.95, 72.71, 7500, 36000, 1000, 0.0),
    (0.965, 69.26, 12500, 36000, 500, 0.0),
)


def tidy(folder):
    """Yields the rows of the packed file, one for every score.

    Args:
        folder: The folder `results` of the authors.
    """
    for path in sorted(pathlib.Path(folder).rglob("*.csv")):
        prefix, _, name = path.stem.partition("_")
        with path.open(newline="", encoding="utf-8") as file:
            header, *lines = csv.reader(file)
        if path.stem == "rn50_scratch_lr_constant_decay":
            header[2] = "init method"
        if path.stem == "rn50_l0_regularization":
            # The names of these two are swapped in the table.
            assert header[2:4] == ["label_smoothing", "weight_decay"]
            header[2:4] = ["weight_decay", "label_smoothing"]
        for number, line in enumerate(lines, 1):
            row = dict(zip(header, line, strict=True))
            for left_out in LEFT_OUT:
                row.pop(left_out, None)
            model = {"rn50": "resnet50", "transformer": "transformer"}[prefix]
            entries = {
                "model": model,
                "table": path.stem,
                "row": str(number),
                **_series(name, row),
            }
            for scores in _split(row):
                renamed = {RENAMED.get(k, k): v for k, v in scores.items()}
                _convert(model, renamed)
                assert set(renamed) <= set(COLUMNS), renamed
                yield {**entries, **renamed}


def _series(name, row):
    if name in SERIES:
        label, technique, branch = SERIES[name]
    else:
        label, technique = SCRATCH[name, row["time multiplier"]]
        branch = "scratch"
        if row.pop("init method") == "sparse":
            branch = "augmented_init"
            label = f"augmented init, {label}"
            label = label.removesuffix(", scratch-e")
    return {"label": label, "technique": technique, "branch": branch}


def _split(row):
    """Yields a row for every score of a row, with its threshold or run."""
    shared = {k: v for k, v in row.items() if not k.startswith("Run ")}
    runs = {k: v for k, v in row.items() if k.startswith("Run ")}
    for name, score in runs.items():
        yield {**shared, "run": name.removeprefix("Run "), "score": score}
    thresholds = [
        name.partition(":")[2] for name in row if name.startswith("Sparsity:")
    ]
    shared = {k: v for k, v in row.items() if ":" not in k}
    for threshold in thresholds:
        yield {
            **shared,
            "threshold": threshold,
            "score": row[f"MOSES BLEU:{threshold}"],
            "sparsity": row[f"Sparsity:{threshold}"],
        }
    if not runs and not thresholds:
        yield row


def _convert(model, row):
    """Gives all scores one unit, and all ramps their last step."""
    score = decimal.Decimal(row["score"])
    if model == "resnet50" and score < 1:
        # A fraction of 50,000 images, in float32; baselines are in percent.
        row["score"] = str((100 * score).quantize(decimal.Decimal("0.001")))
    if "dkl_weight_diff" in row:
        steps = int(row.pop("dkl_weight_diff"))
        row["ramp_end_step"] = str(int(row["ramp_begin_step"]) + steps)


def to_csv(rows, columns):
    """The text of a CSV file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def pack(rows):
    """The packed file of all scores."""
    text = to_csv(rows, COLUMNS).encode()
    return lzma.compress(text, preset=lzma.PRESET_EXTREME | 9)


TARGETS = {
    "resnet50": (0.5, 0.7, 0.8, 0.9, 0.95, 0.98),
    "transformer": (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98),
}
# Of the table of the best. Scratch runs of random masks are not in it: they were
# not repeated, and no other branch has their masks.
ORDER = (
    *("dense", "magnitude pruning", "random pruning", "variational dropout"),
    *("L0 regularization", "scratch-e", "scratch-b", "scratch-b, hold"),
    *("augmented init", "augmented init, scratch-b"),
    *("augmented init, scratch-b, hold", "lottery ticket"),
)
# Scores count as those of a sparsity within this distance, as in the README.
WINDOW = 0.003
SHOWN = (
    *("begin_step", "end_step", "frequency", "penalty_weight", "ramp"),
    *("ramp_begin_step", "ramp_end_step", "threshold", "label_smoothing"),
    *("weight_decay", "regularization"),
)


def best_points(model):
    """The rows of the table of the best scores of a model."""
    collapsed = REFERENCES[model].collapsed
    series = collections.defaultdict(list)
    for score in published.load(model):
        series[score.label].append(score)
    for label in filter(series.get, ORDER):
        scores = series[label]
        first = scores[0]
        repeated = not first.technique or first.branch
        for target in TARGETS[model] if first.technique else (0.0,):
            near = [s for s in scores if abs(s.sparsity - target) <= WINDOW]
            kept = [s for s in near if s.score >= collapsed]
            if not kept:
                continue
            top = max(kept, key=lambda s: s.score)
            values = [s.score for s in kept]
            yield {
                "model": model,
                "label": label,
                "technique": first.technique,
                "branch": first.branch,
                "target_sparsity": target,
                "sparsity": f"{top.sparsity:.6g}",
                "score": f"{statistics.mean(values):.3f}"
                if repeated
                else f"{top.score:g}",
                "sd": f"{statistics.stdev(values):.3f}" if repeated else "",
                "runs": len(near),
                "collapsed": len(near) - len(kept) if repeated else 0,
                "settings": " ".join(
                    f"{name}={top.hyperparameters[name]}"
                    for name in SHOWN
                    if name in top.hyperparameters
                ),
                "source": first.table,
            }
        if model == "resnet50" and label == "magnitude pruning":
            yield from _nonuniform()


def _nonuniform():
    for target, score, begin, end, frequency, smoothing in NONUNIFORM:
        yield {
            "model": "resnet50",
            "label": "non-uniform magnitude pruning",
            "technique": MAGNITUDE,
            "branch": "",
            "target_sparsity": target,
            "sparsity": target,
            "score": score,
            "sd": "",
            "runs": 1,
            "collapsed": 0,
            "settings": f"begin_step={begin} end_step={end} "
            f"frequency={frequency} label_smoothing={smoothing:g}",
            "source": "README",
        }


def best_table():
    """The text of the table of the best scores."""
    columns = [
        "model",
        *(field.name for field in dataclasses.fields(published.PublishedPoint)),
    ]
    return to_csv([row for m in REFERENCES for row in best_points(m)], columns)
