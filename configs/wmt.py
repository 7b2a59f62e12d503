r"""The study of Gale, Elsen and Hooker 2019 on the Transformer and WMT 2014.

One run, English to German, with the best published setting of its technique at
this sparsity:

    python -m models.learn_vocabulary --data=wmt14_translate/de-en \
        --size=33288 --output=wmt.model
    python -m models.train --workdir=runs/wmt \
        --config=configs/wmt.py:magnitude,sparsity=0.9,seed=0 \
        --config.data.vocabulary=wmt.model

The argument after the colon is a key of `TECHNIQUES` ("dense", "magnitude",
"random", "variational_dropout" or "l0"), followed by `sparsity`,
hyperparameters of the technique, which replace published ones, `seed`,
`train_steps` and these options:

- `regularization`: See `models.wmt.REGULARIZATIONS`.
- `size=tiny`: The network "transformer_tiny" of Tensor2Tensor: 2 layers, width
  128, 4 heads.
- `split_heads=True`: The queries, keys and values of each head are weights of
  their own, and are pruned each by itself.
- `dense_embedding=True`: The table of the embedding and the softmax, 28 % of
  all weights, stays dense.
- `embedding_sparsity=S`: Pruning gives that table this sparsity.

Steps of a technique scale with `train_steps`; the learning rate does not, as it
falls with the square root of the step. docs/translation.md has all commands,
from an empty machine on. Other runs start from the masks of a finished one, as
in configs/fashion_mnist.py:

    python -m models.train --workdir=runs/wmt \
        --config=configs/wmt.py:scratch,multiplier=2,parent=DIRECTORY

Published BLEU, "as the study" (`sos.experiments.bleu.study_bleu`), on the 3,003
sentences of newstest2014. Each is the best of all runs within 0.003 of the
sparsity, except that of the dense network, 27.29, a mean of five (standard
deviation 0.17):

    sparsity               0.5   0.6   0.7   0.8   0.9  0.95  0.98
    magnitude            26.33 25.94 25.21 24.65 23.26 20.75 16.37
    random               24.56 24.45 24.01 23.15 20.67 17.42 10.94
    variational_dropout  26.26 25.37 25.08 24.33 21.43 19.13 14.45
    l0                   26.72 26.16 25.29 24.15 20.05 19.78 16.83

A penalty determines the sparsity only roughly, and few runs of L0
regularization are that near to it: four at 0.5, one at 0.9. The authors
evaluated every network of variational dropout at the thresholds 0, 0.5, ..., 5
of log alpha, and took the best. `sparsity.threshold` is that of the published
score, and `decode.thresholds` are all of them.

The tables say 500,000 steps and a batch size of 2,048, which in the authors'
program is the number of tokens on each core or GPU. They do not say on how many
it ran; the example scripts use one GPU. `batch_size` here is the number of
tokens in a step over all replicas: 8 packed rows of 256.

Sources: the tables in google-research/state_of_sparsity, which
`sos.experiments.published` holds, and the program there. The ramp that its
tables name cubic is a moving average of a cubic one, `smoothed_cubic` here.

Nobody has trained a run of this file to its end. The recipe was run in small
instead (configs/libreoffice_help.py).

The published grids, 2,436 runs, and five dense ones:

    python -m models.sweep --workdir=runs/wmt --config=configs/wmt.py \
        --config.data.vocabulary=wmt.model

Few can afford this. All these runs have seed 0. The best of each technique at
each sparsity are repeated with the seeds 1 and 2, so this trains the best
settings only, once (29 runs):

    python -m models.sweep --workdir=runs/wmt --config=configs/wmt.py \
        --config.data.vocabulary=wmt.model --select=_seed-1_
"""

import functools
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
    PRUNING_STEPS,
    distinct,
    find_penalty,
    find_pruning,
    scaled_pruning_steps,
    scaled_window,
)
from models.wmt import Translation
from sos.arguments import check_number
from sos.errors import UsageError
from sos.experiments import published

# Training steps for which the authors chose the steps of a technique.
_STEPS = 500_000
# About the number of training pairs, by which the authors divided penalties.
_PAIRS = 4_500_000
#: Thresholds of log alpha at which the authors evaluated variational dropout.
THRESHOLDS = tuple(number / 2 for number in range(11))

_NONE = "none"
_SMOOTHING = "label_smoothing"
_DROPOUT = "dropout+label_smoothing"


class _Pruning(NamedTuple):
    begin_step: int
    end_step: int
    frequency: int
    regularization: str


class _Penalty(NamedTuple):
    # Penalty weight in units of 1 / training pairs.
    penalty: float
    ramp: str
    begin_step: int
    end_step: int
    regularization: str


class _Dropout(NamedTuple):
    penalty: _Penalty
    threshold: float


# The best published settings by sparsity.
_MAGNITUDE = {
    0.5: _Pruning(100_000, 400_000, 10_000, _DROPOUT),
    0.6: _Pruning(100_000, 400_000, 1_000, _DROPOUT),
    0.7: _Pruning(100_000, 300_000, 1_000, _DROPOUT),
    0.8: _Pruning(200_000, 400_000, 10_000, _SMOOTHING),
    0.9: _Pruning(0, 400_000, 10_000, _SMOOTHING),
    0.95: _Pruning(100_000, 300_000, 1_000, _SMOOTHING),
    0.98: _Pruning(0, 300_000, 1_000, _NONE),
}
_RANDOM = {
    0.5: _Pruning(200_000, 500_000, 1_000, _SMOOTHING),
    0.6: _Pruning(0, 300_000, 1_000, _SMOOTHING),
    0.7: _Pruning(0, 400_000, 1_000, _SMOOTHING),
    0.8: _Pruning(0, 300_000, 10_000, _SMOOTHING),
    0.9: _Pruning(0, 100_000, 1_000, _SMOOTHING),
    0.95: _Pruning(0, 100_000, 1_000, _NONE),
    0.98: _Pruning(0, 100_000, 1_000, _NONE),
}
_CUBIC = "smoothed_cubic"
_VARIATIONAL_DROPOUT = {
    0.5: _Dropout(_Penalty(0.1, _CUBIC, 400_000, 500_000, _DROPOUT), 2.5),
    0.6: _Dropout(_Penalty(0.1, "linear", 0, 500_000, _SMOOTHING), 2.5),
    0.7: _Dropout(_Penalty(0.1, "linear", 0, 500_000, _NONE), 1.5),
    0.8: _Dropout(_Penalty(0.1, _CUBIC, 0, 300_000, _SMOOTHING), 1.5),
    0.9: _Dropout(_Penalty(0.4, _CUBIC, 0, 200_000, _SMOOTHING), 2.5),
    0.95: _Dropout(_Penalty(1.0, _CUBIC, 0, 200_000, _NONE), 2.5),
    0.98: _Dropout(_Penalty(1.0, "linear", 0, 1, _SMOOTHING), 2.0),
}
_L0 = {
    0.5: _Penalty(1.3, _CUBIC, 100_000, 300_000, _SMOOTHING),
    0.6: _Penalty(3.5, _CUBIC, 200_000, 300_000, _NONE),
    0.7: _Penalty(1.3, _CUBIC, 0, 100_000, _NONE),
    0.8: _Penalty(2.5, "linear", 0, 100_000, _NONE),
    0.9: _Penalty(10.0, _CUBIC, 200_000, 300_000, _DROPOUT),
    0.95: _Penalty(10.0, _CUBIC, 0, 400_000, _NONE),
    0.98: _Penalty(10.0, "linear", 0, 1, _SMOOTHING),
}
# The threshold of networks that are the best at no sparsity is the default of
# the authors' program.
_THRESHOLD = 3.0
_BEST_THRESHOLDS = {
    setting.penalty: setting.threshold
    for setting in _VARIATIONAL_DROPOUT.values()
}

# Seeds of the dense network, which the authors trained five times, and of the
# best settings.
_DENSE_SEEDS = (0, 1, 2, 3, 4)
_SEEDS = (0, 1, 2)

_RAMPS = {"linear": "linear", "cubic": _CUBIC}


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
    return make_config(arg, Translation.default_config(), TECHNIQUES)


def sweep(config: ml_collections.ConfigDict) -> Iterator[Overrides]:
    """Yields the overrides of every published run, and of repeated ones.

    The grids have seed 0. The dense network follows with the seeds 0 to 4, the
    best settings with the seeds 0 to 2.

    Args:
        config: A dense config. Steps scale with its `train_steps`.

    Raises:
        UsageError: If the config has a technique.
    """
    check_dense(config)
    # A network of variational dropout has several scores in the tables.
    yield from distinct(_all_runs(config))


def _all_runs(config: ml_collections.ConfigDict) -> Iterator[Overrides]:
    for score in published.load("transformer"):
        if score.technique and not score.branch:
            yield {**_published_run(config, score), "seed": 0}
    for seed in _DENSE_SEEDS:
        yield {**dense(config), "seed": seed}
    for seed in _SEEDS:
        for name, settings in _BY_SPARSITY.items():
            for sparsity in settings:
                overrides = TECHNIQUES[name](config, sparsity=sparsity)
                yield {**overrides, "seed": seed}


def _published_run(
    config: ml_collections.ConfigDict, score: published.PublishedScore
) -> Overrides:
    """Returns the overrides of a row of the authors' tables."""
    row = score.hyperparameters
    regularization = row["regularization"]
    if score.technique in ("MagnitudePruning", "RandomPruning"):
        setting = _Pruning(
            *(int(row[name]) for name in PRUNING_STEPS), regularization
        )
        # Tables name the sparsity that was reached.
        sparsity = round(score.sparsity, 2)
        return _pruned(config, score.technique, sparsity, setting)
    setting = _Penalty(
        # The tables round the quotient.
        round(float(row["penalty_weight"]) * _PAIRS, 4),
        _RAMPS[row["ramp"]],
        int(row["ramp_begin_step"]),
        int(row["ramp_end_step"]),
        regularization,
    )
    if score.technique == "VariationalDropout":
        threshold = _BEST_THRESHOLDS.get(setting, _THRESHOLD)
        return _dropped(config, _Dropout(setting, threshold))
    return _gated(config, setting)


def _magnitude(
    config: ml_collections.ConfigDict, /, **values: Any
) -> Overrides:
    sparsity = values.setdefault("sparsity", 0.9)
    setting = _find_pruning(config, "magnitude", _MAGNITUDE, values)
    return _pruned(config, "MagnitudePruning", sparsity, setting, values)


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
    setting = find_penalty("l0", _L0, values)
    return _gated(config, setting, values)


def _find_pruning(
    config: ml_collections.ConfigDict,
    name: str,
    settings: Mapping[float, _Pruning],
    values: Mapping[str, Any],
) -> _Pruning | None:
    return find_pruning(
        config,
        name,
        settings,
        values,
        reference_steps=_STEPS,
        format_rest=lambda each: f",regularization={each.regularization}",
    )


def _pruned(
    config: ml_collections.ConfigDict,
    technique: str,
    sparsity: float,
    setting: _Pruning | None,
    values: Mapping[str, Any] | None = None,
) -> Overrides:
    entries: Overrides = {"technique": technique, "sparsity": sparsity}
    if setting is None:
        return {"sparsity": {**entries, **(values or {})}}
    entries |= scaled_pruning_steps(config, setting, _STEPS)
    return {
        "regularization": setting.regularization,
        "sparsity": {**entries, **(values or {})},
    }


def _dropped(
    config: ml_collections.ConfigDict,
    setting: _Dropout,
    values: Mapping[str, Any] | None = None,
) -> Overrides:
    return {
        "regularization": setting.penalty.regularization,
        "decode": {"thresholds": THRESHOLDS},
        "sparsity": {
            "technique": "VariationalDropout",
            **_penalized(config, setting.penalty),
            "threshold": setting.threshold,
            **(values or {}),
        },
    }


def _gated(
    config: ml_collections.ConfigDict,
    setting: _Penalty,
    values: Mapping[str, Any] | None = None,
) -> Overrides:
    return {
        "label": "L0",
        "regularization": setting.regularization,
        "sparsity": {
            "technique": "L0Regularization",
            **_penalized(config, setting),
            **(values or {}),
        },
    }


def _penalized(
    config: ml_collections.ConfigDict, setting: _Penalty
) -> dict[str, Any]:
    return {
        "penalty_weight": setting.penalty / _PAIRS,
        "ramp": setting.ramp,
        **scaled_window(config, setting, _STEPS),
    }


# Networks of Tensor2Tensor by their names there, "transformer_base" and so on.
_SIZES = {
    "base": {"width": 512, "hidden_width": 2048, "heads": 8, "layers": 6},
    "tiny": {"width": 128, "hidden_width": 512, "heads": 4, "layers": 2},
}
# The table of the embedding, which is that of the softmax, too.
_EMBEDDING = "^embedding/"
_LABELS = {
    "dense": "dense",
    "magnitude": "magnitude pruning",
    "random": "random pruning",
    "variational_dropout": "variational dropout",
    "l0": "L0",
}


def with_options(techniques: Techniques) -> Techniques:
    """Adds the options of this file to functions that return overrides.

    Args:
        techniques: The functions, by the names of `TECHNIQUES`.

    Returns:
        Functions that also take `regularization`, `size`, `split_heads`,
        `dense_embedding` and `embedding_sparsity`. With one of the last four,
        the label of the run names it.
    """
    return {
        name: functools.partial(_with_options, name, technique)
        for name, technique in techniques.items()
    }


def _with_options(
    name: str,
    technique: Any,
    config: ml_collections.ConfigDict,
    /,
    *,
    regularization: str | None = None,
    size: str | None = None,
    split_heads: bool = False,
    dense_embedding: bool = False,
    embedding_sparsity: float | None = None,
    **values: Any,
) -> Overrides:
    _check_switch("split_heads", split_heads)
    _check_switch("dense_embedding", dense_embedding)
    overrides = technique(config, **values)
    label = [_LABELS[name]]
    if regularization is not None:
        overrides["regularization"] = regularization
    if size is not None:
        if size not in _SIZES:
            raise UsageError(
                f"`size` must be one of {', '.join(_SIZES)}. "
                f"Received: size={size!r}"
            )
        overrides["model"] = dict(_SIZES[size])
        overrides["learning_rate"] = {
            **overrides.get("learning_rate", {}),
            "hidden_size": _SIZES[size]["width"],
        }
        label.append(size)
    if split_heads:
        overrides.setdefault("model", {})["split_heads"] = True
        label.append("split heads")
    if dense_embedding or embedding_sparsity is not None:
        if (
            (dense_embedding and embedding_sparsity is not None)
            or "rules" in values
            or name == "dense"
        ):
            raise UsageError(
                "`dense_embedding` and `embedding_sparsity` are two rules of "
                "which a technique takes one, without other `rules`. Received: "
                f"{name},{dense_embedding=},{embedding_sparsity=},"
                f"rules={values.get('rules')!r}"
            )
        rule = None
        if dense_embedding:
            label.append("embedding dense")
        else:
            rule = _embedding_rule(name, embedding_sparsity)
            label.append(f"embedding {rule['sparsity']:g}")
        overrides["sparsity"]["rules"] = ((_EMBEDDING, rule),)
    if len(label) > 1:
        overrides["label"] = ", ".join(label)
    return overrides


def _embedding_rule(name: str, sparsity: Any) -> dict[str, float]:
    if name not in ("magnitude", "random"):
        raise UsageError(
            "`embedding_sparsity` is for magnitude and random: the penalty of "
            f"{name} determines its sparsities. Received: {name} with "
            f"embedding_sparsity={sparsity!r}"
        )
    return {"sparsity": check_number("embedding_sparsity", sparsity, "[0, 1)")}


def _check_switch(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise UsageError(
            f"`{name}` must be True or False. Received: {name}={value!r}"
        )


TECHNIQUES: Techniques = with_options(
    {
        "dense": dense,
        "magnitude": _magnitude,
        "random": _random,
        "variational_dropout": _variational_dropout,
        "l0": _l0,
    }
)

# Those with a setting for each sparsity.
_BY_SPARSITY = {
    "magnitude": _MAGNITUDE,
    "random": _RANDOM,
    "variational_dropout": _VARIATIONAL_DROPOUT,
    "l0": _L0,
}
