r"""The study of Gale, Elsen and Hooker 2019 on ResNet-50 and ImageNet.

One run, with the best published setting of its technique at this sparsity:

    python -m models.train --workdir=runs/imagenet \
        --config=configs/imagenet.py:magnitude,sparsity=0.9,seed=0

The argument after the colon is a key of `TECHNIQUES` ("dense", "magnitude",
"extended_magnitude", "random", "variational_dropout" or "l0"), followed by
`sparsity`, hyperparameters of the technique, which replace published ones,
`seed` and `train_steps`. Steps of a technique scale with `train_steps`, as the
boundaries of the learning rate do. docs/imagenet.md has all commands, from an
empty machine on. Other runs start from the masks of a finished one, as in
configs/fashion_mnist.py:

    python -m models.train --workdir=runs/imagenet \
        --config=configs/imagenet.py:scratch,multiplier=2,parent=DIRECTORY

Published top-1 accuracy in percent, on the 50,000 validation images. Each is
the best of up to 54 runs, except that of the dense network, 76.69, a mean of
three (standard deviation 0.11):

    sparsity               0.5   0.7   0.8   0.9  0.95  0.98
    magnitude            76.53 76.38 75.58 73.91 70.59 57.90
    random               74.59 72.22 70.21 65.00 58.08 44.00
    variational_dropout  76.55 76.21 75.28 73.84 71.82 67.36

A penalty determines the sparsity only roughly. These runs of variational
dropout had 0.500, 0.703 (the nearest to 0.7, but not within 0.003 as the
others), 0.800, 0.903, 0.952 and 0.979. The authors' README names 71.91 % at
0.95, for a run that is in none of their tables.

Magnitude pruning with a dense first layer, 80 % sparsity in the last one, and
1.5 times as many images ("extended", or non-uniform). Its `sparsity` is that of
all other layers:

    sparsity              0.8  0.91  0.96  0.98
    of all weights      0.800 0.901 0.947 0.965
    extended_magnitude  76.52 75.16 72.71 69.26

L0 regularization never worked on this network: of 323 runs, those with a
sparsity above 0.1 reached at most 3.7 %, and the best, 40.5 %, has no zero
weight. `l0` is this run. It takes no `sparsity`, but `penalty_weight` and
`initial_log_alpha`. The L2 coefficient is corrected for gates that are open
with a probability below 1: 1e-4 / sigmoid(initial_log_alpha). The tables do not
say when the penalty grows; 5,000 to 8,000 are the defaults of the authors'
program.

Sources: the tables and the README in google-research/state_of_sparsity, which
`sos.experiments.published` holds, and the program there. It trains on 8 TPU
cores by default, that is with 128 images in each batch statistic; the tables do
not name the hardware. This can be had on G GPUs by
`--config.gradient_accumulation_steps` of 8 / G. The learning rate of extended
magnitude pruning is not public. Ours has every boundary after 1.5 times as many
images: 7.5 epochs of warm-up, and drops after 45, 90 and 120.

Nobody has trained a run of this file to its end. The recipe was run in small
instead (configs/imagenet_small.py).

The published grids, 1,008 runs of 128,000 steps, and three dense runs:

    python -m models.sweep --workdir=runs/imagenet --config=configs/imagenet.py

Few can afford this. All these runs have seed 0. The best of each technique at
each sparsity are repeated with the seeds 1 and 2, so this trains the best
settings only, once (24 runs):

    python -m models.sweep --workdir=runs/imagenet \
        --config=configs/imagenet.py --select=_seed-1_
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ml_collections

from configs.arguments import (
    Overrides,
    Techniques,
    check_dense,
    dense,
    make_config,
)
from configs.published_settings import (
    distinct,
    find_penalty,
    find_pruning,
    scaled_pruning_steps,
    scaled_window,
)
from models.imagenet import TRAIN_EXAMPLES, ImageNet
from sos.arguments import check_number
from sos.errors import UsageError
from sos.experiments import parse_argument, published

# Training steps for which the authors chose the steps of a technique.
_STEPS = 128_000
# Those of extended magnitude pruning, with batches 4 times as large.
_EXTENDED_STEPS = 48_000
_EXTENDED_BATCHES = 4

_L2 = 1e-4


class _Pruning(NamedTuple):
    begin_step: int
    end_step: int
    frequency: int
    label_smoothing: float


class _Penalty(NamedTuple):
    begin_step: int
    end_step: int
    # Penalty weight in units of 1 / training examples.
    penalty: float
    label_smoothing: float


# The best published settings by sparsity.
_MAGNITUDE = {
    0.5: _Pruning(40_000, 100_000, 2_000, 0.1),
    0.7: _Pruning(40_000, 100_000, 4_000, 0.1),
    0.8: _Pruning(40_000, 100_000, 2_000, 0.1),
    0.9: _Pruning(40_000, 76_000, 2_000, 0.1),
    0.95: _Pruning(40_000, 68_000, 2_000, 0.0),
    0.98: _Pruning(40_000, 100_000, 2_000, 0.1),
}
# By the sparsity of all layers except the first and the last.
_EXTENDED_MAGNITUDE = {
    0.8: _Pruning(12_500, 40_000, 2_000, 0.1),
    0.91: _Pruning(12_500, 36_000, 2_000, 0.1),
    0.96: _Pruning(7_500, 36_000, 1_000, 0.0),
    0.98: _Pruning(12_500, 36_000, 500, 0.0),
}
_RANDOM = {
    0.5: _Pruning(20_000, 40_000, 4_000, 0.1),
    0.7: _Pruning(8_000, 40_000, 8_000, 0.1),
    0.8: _Pruning(0, 40_000, 8_000, 0.0),
    0.9: _Pruning(0, 40_000, 2_000, 0.0),
    0.95: _Pruning(0, 40_000, 2_000, 0.0),
    0.98: _Pruning(20_000, 40_000, 8_000, 0.0),
}
_VARIATIONAL_DROPOUT = {
    0.5: _Penalty(8_000, 68_000, 0.01, 0.1),
    # No run is within 0.003. This one, the nearest, has 0.7034.
    0.7: _Penalty(40_000, 100_000, 0.05, 0.0),
    0.8: _Penalty(40_000, 68_000, 0.05, 0.0),
    0.9: _Penalty(20_000, 68_000, 0.1, 0.0),
    0.95: _Penalty(40_000, 76_000, 0.5, 0.0),
    0.98: _Penalty(8_000, 76_000, 1.0, 0.1),
}
# The best published run, at a sparsity of 0. The steps are the defaults of the
# authors' program, as the table does not have them.
_L0_LOG_ALPHA = 2.197
_L0 = _Penalty(5_000, 8_000, 400.0, 0.0)

# Seeds of the best settings, and of the dense network.
_SEEDS = (0, 1, 2)


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config of one run.

    Args:
        arg: A technique and values, such as `magnitude,sparsity=0.9,seed=1`, or
            a branch and values, such as `scratch,parent=DIRECTORY`.

    Raises:
        UsageError: If `arg` has another form, a name or value is invalid, or
            there is no published setting and the hyperparameters are not all
            given.
    """
    config = ImageNet.default_config()
    name, values = parse_argument(arg, default="dense")
    if name == "extended_magnitude" and "parent" not in values:
        config.update(_extended_length(config))
    return make_config(arg, config, TECHNIQUES)


def sweep(config: ml_collections.ConfigDict) -> Iterator[Overrides]:
    """Yields the overrides of every published run, and of repeated ones.

    The grids have seed 0. The dense network and the best settings follow with
    the seeds 0 to 2.

    Args:
        config: A dense config. Steps scale with its `train_steps`.

    Raises:
        UsageError: If the config has a technique.
    """
    check_dense(config)
    yield from distinct(_all_runs(config))


def _all_runs(config: ml_collections.ConfigDict) -> Iterator[Overrides]:
    for score in published.load("resnet50"):
        if score.technique and not score.branch:
            yield {**_published_run(config, score), "seed": 0}
    length = _extended_length(config)
    extended = config.copy_and_resolve_references()
    extended.update(length)
    for seed in _SEEDS:
        yield {**dense(config), "seed": seed}
        for name, settings in _BY_SPARSITY.items():
            for sparsity in settings:
                overrides = TECHNIQUES[name](config, sparsity=sparsity)
                yield {**overrides, "seed": seed}
        yield {**_l0(config), "seed": seed}
        for sparsity in _EXTENDED_MAGNITUDE:
            overrides = _extended_magnitude(extended, sparsity=sparsity)
            yield {**length, **overrides, "seed": seed}


def _published_run(
    config: ml_collections.ConfigDict, score: published.PublishedScore
) -> Overrides:
    """Returns the overrides of a row of the authors' tables."""
    row = score.hyperparameters
    smoothing = float(row["label_smoothing"])
    if score.technique in ("MagnitudePruning", "RandomPruning"):
        names = ("begin_step", "end_step", "frequency")
        setting = _Pruning(*(int(row[name]) for name in names), smoothing)
        return _pruned(config, score.technique, score.sparsity, setting)
    # The tables round the quotient.
    penalty = round(float(row["penalty_weight"]) * TRAIN_EXAMPLES, 4)
    if score.technique == "VariationalDropout":
        steps = (int(row["ramp_begin_step"]), int(row["ramp_end_step"]))
        return _dropped(config, _Penalty(*steps, penalty, smoothing))
    setting = _L0._replace(penalty=penalty, label_smoothing=smoothing)
    return _gated(
        config,
        setting,
        float(row["initial_log_alpha"]),
        decayed=float(row["weight_decay"]) > 0,
    )


def _magnitude(
    config: ml_collections.ConfigDict, /, **values: Any
) -> Overrides:
    sparsity = values.setdefault("sparsity", 0.9)
    setting = _find_pruning(config, "magnitude", _MAGNITUDE, values)
    return _pruned(config, "MagnitudePruning", sparsity, setting, values)


def _extended_magnitude(
    config: ml_collections.ConfigDict, /, **values: Any
) -> Overrides:
    sparsity = values.setdefault("sparsity", 0.91)
    setting = _find_pruning(
        config,
        "extended_magnitude",
        _EXTENDED_MAGNITUDE,
        values,
        _EXTENDED_STEPS,
    )
    rules = (("^initial_conv/", None), ("^final_dense/", {"sparsity": 0.8}))
    overrides = _pruned(
        config,
        "MagnitudePruning",
        sparsity,
        setting,
        {"rules": rules, **values},
        reference_steps=_EXTENDED_STEPS,
    )
    return {"label": "extended magnitude", **overrides}


def _random(config: ml_collections.ConfigDict, /, **values: Any) -> Overrides:
    sparsity = values.setdefault("sparsity", 0.9)
    setting = _find_pruning(config, "random", _RANDOM, values)
    return _pruned(config, "RandomPruning", sparsity, setting, values)


def _variational_dropout(
    config: ml_collections.ConfigDict, /, **values: Any
) -> Overrides:
    setting = find_penalty("variational_dropout", _VARIATIONAL_DROPOUT, values)
    return _dropped(config, setting, values)


def _l0(config: ml_collections.ConfigDict, /, **values: Any) -> Overrides:
    if "sparsity" in values:
        raise UsageError(
            "l0 takes no `sparsity`: every published run with a sparsity above "
            "0.1 learned next to nothing. Pass penalty_weight and "
            "initial_log_alpha, or nothing for the best published run, which "
            f"has no zero weight. Received: sparsity={values['sparsity']!r}"
        )
    log_alpha = check_number(
        "initial_log_alpha",
        values.get("initial_log_alpha", _L0_LOG_ALPHA),
        "[-20, 20]",
    )
    return _gated(config, _L0, log_alpha, values)


def _find_pruning(
    config: ml_collections.ConfigDict,
    name: str,
    settings: Mapping[float, _Pruning],
    values: Mapping[str, Any],
    reference_steps: int = _STEPS,
) -> _Pruning | None:
    return find_pruning(
        config,
        name,
        settings,
        values,
        reference_steps=reference_steps,
        format_rest=lambda each: (
            f" with --config.loss.label_smoothing={each.label_smoothing:g}"
        ),
    )


def _pruned(
    config: ml_collections.ConfigDict,
    technique: str,
    sparsity: float,
    setting: _Pruning | None,
    values: Mapping[str, Any] | None = None,
    reference_steps: int = _STEPS,
) -> Overrides:
    entries: Overrides = {"technique": technique, "sparsity": sparsity}
    if setting is None:
        return {"sparsity": {**entries, **(values or {})}}
    entries |= scaled_pruning_steps(config, setting, reference_steps)
    return {
        "loss": {"label_smoothing": setting.label_smoothing},
        "sparsity": {**entries, **(values or {})},
    }


def _dropped(
    config: ml_collections.ConfigDict,
    setting: _Penalty,
    values: Mapping[str, Any] | None = None,
) -> Overrides:
    return {
        "loss": {"label_smoothing": setting.label_smoothing},
        "sparsity": {
            "technique": "VariationalDropout",
            **_penalized(config, setting),
            "initial_log_sigma2": -15.0,
            "threshold": 0.5,
            **(values or {}),
        },
    }


def _gated(
    config: ml_collections.ConfigDict,
    setting: _Penalty,
    log_alpha: float,
    values: Mapping[str, Any] | None = None,
    decayed: bool = True,
) -> Overrides:
    # Divided by the mean of a gate before it is stretched and clipped.
    l2 = _L2 * (1 + math.exp(-log_alpha))
    return {
        "label": "L0",
        "loss": {
            "label_smoothing": setting.label_smoothing,
            "l2": l2 if decayed else 0.0,
        },
        "sparsity": {
            "technique": "L0Regularization",
            **_penalized(config, setting),
            "initial_log_alpha": log_alpha,
            **(values or {}),
        },
    }


def _penalized(
    config: ml_collections.ConfigDict, setting: _Penalty
) -> dict[str, Any]:
    return {
        "penalty_weight": setting.penalty / TRAIN_EXAMPLES,
        "ramp": "linear",
        **scaled_window(config, setting, _STEPS),
    }


def _extended_length(config: ml_collections.ConfigDict) -> Overrides:
    """Returns steps and batch size of extended magnitude pruning."""
    return {
        "train_steps": max(
            1, round(config.train_steps * _EXTENDED_STEPS / _STEPS)
        ),
        "batch_size": _EXTENDED_BATCHES * config.batch_size,
    }


TECHNIQUES: Techniques = {
    "dense": dense,
    "magnitude": _magnitude,
    "extended_magnitude": _extended_magnitude,
    "random": _random,
    "variational_dropout": _variational_dropout,
    "l0": _l0,
}

# Those with a setting for each sparsity and the usual length of training.
_BY_SPARSITY = {
    "magnitude": _MAGNITUDE,
    "random": _RANDOM,
    "variational_dropout": _VARIATIONAL_DROPOUT,
}
