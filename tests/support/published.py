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
import os
import pathlib
import statistics
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from sos import startup

with startup.quiet():
    from sos.experiments import published
    from sos.experiments.figures import published as drawing
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

SOURCE = (
    "https://github.com/google-research/google-research/tree/master/"
    "state_of_sparsity/results"
)
TEXT = """\
# The published results

Gale, Elsen and Hooker published with their paper ([arXiv
1902.09574](https://arxiv.org/abs/1902.09574)) the results of their runs:
{rows:,} rows of {tables} tables, for ResNet-50 on ImageNet and a Transformer on
WMT 2014 English-German. They are part of this package, so that the figures of
the paper can be made from its data, and your runs compared with them.

`python -m tests.support.published --write` writes this page.

## The figures of the paper

```console
python -m sos figures --reference=resnet50
python -m sos figures --reference=transformer
```

draws two figures each, as PNG files in the current directory or in
`--out=DIRECTORY`. The first shows all scores. A line joins those of a technique
that none of its other scores exceeds at the same sparsity or a higher one.

![All scores of ResNet-50 against sparsity](published_resnet50.png)

![All scores of the Transformer against sparsity](published_transformer.png)

The second shows whether a sparse network needs the weights that pruning found:
networks that are trained again with the final masks of magnitude pruning. They
start from new initial weights and train as long as it (scratch-e) or longer
(scratch-b), also with a variance that is divided by the density (augmented
init), or start from the initial weights of the pruned network (lottery ticket).

![Networks of ResNet-50 trained again](published_resnet50_branches.png)

![Transformers trained again](published_transformer_branches.png)

## Your runs beside them

```console
python -m sos figures runs/imagenet --reference=resnet50
python -m sos compare runs/imagenet --reference=resnet50 --csv=distances.csv
```

Here `runs/imagenet` is a work directory of yours. The first command draws its
finished runs over the best published results. The second prints how far each of
your points, a mean over seeds, lies from the published one: in published
standard deviations where the authors repeated a run (dense models, scratch
runs, lottery tickets), otherwise in points of accuracy or BLEU.

- *Metric*: `accuracy` for ResNet-50, a fraction that is shown in percent, and
  `study_bleu` for the Transformer, from 0 to 100: BLEU as the authors computed
  it (`sos.experiments.bleu.study_bleu`). `--metric` names another one.
- *Kind*: by technique, or by branch and its options. Magnitude pruning with
  rules is compared with the published non-uniform one, and branches only if
  their masks are of magnitude pruning, as the published ones are.
- *Sparsity*: the published result within {window}. Between two of them, the
  line that joins them in the figures; outside of them, none.
- A published result without a standard deviation is the best of up to {most}
  runs with different hyperparameters: expect a single run of yours below it.

## The best results

The best score among runs within {window} of a sparsity. Of what was repeated
({resnet50_runs} runs of ResNet-50, {transformer_runs} of the Transformer), the
mean and the standard deviation (n - 1); {collapsed} runs of a BLEU below 1 are
left out.

### ResNet-50: top-1 accuracy in percent

Dense: {resnet50_dense}

{resnet50}

### Transformer: BLEU

Dense: {transformer_dense}

{transformer}

Non-uniform magnitude pruning has a dense first layer and 80 % in the last one.
Scratch-b runs of ResNet-50 train twice as long, with the schedule of the
learning rate scaled, or, in the rows "hold", its last value kept; how much
longer those of the Transformer train is not published. L0 regularization found
no sparse ResNet-50: runs with a sparsity of more than 10 % reach {l0:.1f} % at
most.

In Python, with the hyperparameters and the table of each:

```python
from sos.experiments import published

for point in published.best("resnet50"):
    if point.technique == "VariationalDropout":
        print(point.sparsity, point.score, point.settings)
scores = published.load("transformer")
print(len(scores), scores[0].hyperparameters)
```

## What to know of the tables

- In the table of L0 regularization on ResNet-50, the names of the columns of
  label smoothing and weight decay are swapped. They are right in the package.
- The tables `rn50_scratch_lr_constant_decay` and
  `rn50_scratch_lr_continual_decay` have the pruning steps of the best *random*
  pruning, so their masks are random. They are not comparable with the other
  scratch runs: they are points of the first figure, and not in other figures
  and tables of this page.
- The masks of ResNet-50 at 95 % are not those of the best run of magnitude
  pruning at this sparsity.
- The README of the tables names a result of variational dropout on ResNet-50
  (71.91 % at a sparsity of 95 %) that no table has: {missing} of its 180
  configurations are missing.
- The best of variational dropout and of L0 at a sparsity depends on which runs
  happen to end near it; at some sparsities there is one.
- Lottery tickets of the Transformer at 60 % vary more than all others: from
  {low} to {high} BLEU.

`sos/experiments/data/published.NOTICE.txt` says what else was changed. The
tables are from [the authors'
repository]({source}), under the Apache License 2.0.
"""

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
# Of the table of the best. Scratch runs of random masks are not in it: they
# were not repeated, and no other branch has their masks.
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


def results_table(model):
    """The table of the best results of a model on the page."""
    rows = collections.defaultdict(dict)
    for point in published.best(model):
        if point.technique:
            rows[point.label][point.target_sparsity] = _cell(point)
    columns = sorted(
        {sparsity for cells in rows.values() for sparsity in cells}
    )
    heads = [f"{100 * sparsity:g} %" for sparsity in columns]
    lines = [f"| | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for label, cells in rows.items():
        texts = [cells.get(column, "") for column in columns]
        lines.append(f"| {label} | {' | '.join(texts)} |")
    return "\n".join(lines)


def _cell(point):
    sd = "" if point.sd is None else f" ± {point.sd:.2f}"
    return f"{point.score:.2f}{sd}"


def page():
    """The text of the page."""
    scores = {model: published.load(model) for model in REFERENCES}
    best = [point for model in REFERENCES for point in published.best(model)]
    rows = {(s.table, s.row) for model in scores.values() for s in model}
    configurations = [
        s for s in scores["resnet50"] if s.technique == "VariationalDropout"
    ]
    tickets = [
        s.score
        for s in scores["transformer"]
        if s.branch == "lottery_ticket" and abs(s.sparsity - 0.6) < WINDOW
    ]
    return TEXT.format(
        source=SOURCE,
        rows=len(rows),
        tables=len({table for table, _ in rows}),
        window=WINDOW,
        most=max(point.runs for point in best),
        **{
            f"{model}_runs": _numbers(
                p.runs for p in published.best(model) if p.sd is not None
            )
            for model in REFERENCES
        },
        collapsed=sum(point.collapsed for point in best),
        **{model: results_table(model) for model in REFERENCES},
        **{
            f"{model}_dense": _cell(published.best(model)[0])
            for model in REFERENCES
        },
        l0=max(
            s.score
            for s in scores["resnet50"]
            if s.technique == "L0Regularization" and s.sparsity > 0.1
        ),
        missing=180 - len(configurations),
        low=min(tickets),
        high=max(tickets),
    )


def _numbers(numbers):
    return " or ".join(map(str, sorted(set(numbers))))


def figures():
    """The figures of the page, by the names of their files."""
    for model in REFERENCES:
        yield f"published_{model}.png", drawing.draw_all_scores(model)
        name = f"published_{model}_branches.png"
        yield name, drawing.draw_branches(model)


def main():
    """Writes or compares what is made; exits with 1 if something differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", metavar="FOLDER", help="pack these tables")
    parser.add_argument("--write", action="store_true", help="write the files")
    options = parser.parse_args()
    if options.tables:
        (DATA / RESULTS).write_bytes(pack(tidy(options.tables)))
        return
    if options.write:
        (DATA / BEST).write_text(best_table(), "utf-8")
        published.best.cache_clear()
        PAGE.write_text(page(), "utf-8")
        for name, figure in figures():
            # Less fine than the command's, for small files.
            figure.savefig(PAGE.with_name(name), dpi=144)
    for path, text in ((DATA / BEST, best_table()), (PAGE, page())):
        if path.read_text("utf-8") != text:
            sys.exit(
                f"{path.name} is out of date. `python -m "
                "tests.support.published --write` updates it."
            )


if __name__ == "__main__":
    main()
