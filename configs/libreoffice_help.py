r"""The recipe of configs/wmt.py in small, on the help pages of LibreOffice.

The same task and techniques, on a Transformer of 4 million weights and the
20,267 embedded pairs of English and German sentences. It needs no network and
less than half an hour on two CPU cores:

    make translate
    make translate \
        ARGS="--config=configs/libreoffice_help.py:magnitude,sparsity=0.8"

or

    python -m models.train --workdir=runs/translate \
        --config=configs/libreoffice_help.py:magnitude,sparsity=0.8,seed=0

trains, translates the 848 test sentences, prints some of them and scores all.
Hyperparameters may follow the technique: the `sparsity` of pruning is 0.8 by
default; variational dropout and L0 take `penalty_weight` instead. So may the
options of configs/wmt.py. What a run writes is described in
docs/translation.md.
"""

from typing import Any

import ml_collections

from configs import wmt
from configs.arguments import Overrides, Techniques, dense, make_config
from models.wmt import Translation

_TRAIN_PAIRS = 20_267


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config of one run.

    Args:
        arg: A technique and values, such as `magnitude,sparsity=0.8,seed=1`, or
            a branch and values, such as `scratch,parent=DIRECTORY`.

    Raises:
        UsageError: If `arg` has another form, or a name or value is invalid.
    """
    config = Translation.default_config()
    config.model.layers = 3
    config.model.width = 192
    config.model.hidden_width = 768
    config.model.heads = 4
    config.data.name = "libreoffice_help"
    config.data.vocabulary_size = 4000
    # German needs more tokens, so that both sides are full.
    config.data.source_length = 114
    config.data.target_length = 128
    config.data.eval_batch_size = 32
    config.decode.extra_length = 50
    config.decode.samples = 5
    # Random numbers for the other dropouts take a quarter of a step on a CPU.
    config.regularization = "residual_dropout+label_smoothing"
    # Short trainings end better with a rate of zero.
    config.learning_rate.schedule = "cosine"
    config.learning_rate.base = 2e-3
    config.learning_rate.warmup_steps = 400
    config.dtype_policy = "mixed_bfloat16"
    config.batch_size = 2048
    config.train_steps = 4000
    return make_config(arg, config, TECHNIQUES)


def _pruning(
    technique: str, config: ml_collections.ConfigDict, /, **values: Any
) -> Overrides:
    # The parts of training in which the authors pruned to 80 %, but earlier,
    # as the network is still learning at the end of this short training.
    return {
        "sparsity": {
            "technique": technique,
            "sparsity": 0.8,
            "begin_step": round(0.2 * config.train_steps),
            "end_step": max(1, round(0.7 * config.train_steps)),
            "frequency": max(1, round(0.02 * config.train_steps)),
            **values,
        }
    }


def _magnitude(
    config: ml_collections.ConfigDict, /, **values: Any
) -> Overrides:
    return _pruning("MagnitudePruning", config, **values)


def _random(config: ml_collections.ConfigDict, /, **values: Any) -> Overrides:
    return _pruning("RandomPruning", config, **values)


def _penalized(
    technique: str, penalty: float, config: ml_collections.ConfigDict
) -> dict[str, Any]:
    begin = round(0.1 * config.train_steps)
    return {
        "technique": technique,
        "penalty_weight": penalty / _TRAIN_PAIRS,
        "ramp": "linear",
        "begin_step": begin,
        "end_step": max(begin + 1, round(0.7 * config.train_steps)),
    }


def _variational_dropout(
    config: ml_collections.ConfigDict, /, **values: Any
) -> Overrides:
    return {
        "sparsity": {
            **_penalized("VariationalDropout", 0.1, config),
            # From the default, -10, log sigma^2 would not grow enough in so few
            # steps.
            "initial_log_sigma2": -8.0,
            **values,
        },
        "learning_rate": {"technique_multiplier": 5.0},
    }


def _l0(config: ml_collections.ConfigDict, /, **values: Any) -> Overrides:
    return {
        "label": "L0",
        "sparsity": {**_penalized("L0Regularization", 0.3, config), **values},
        # Nor would gates close.
        "learning_rate": {"technique_multiplier": 10.0},
    }


TECHNIQUES: Techniques = wmt.with_options(
    {
        "dense": dense,
        "magnitude": _magnitude,
        "random": _random,
        "variational_dropout": _variational_dropout,
        "l0": _l0,
    }
)
