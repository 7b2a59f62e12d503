r"""The recipe of configs/imagenet.py in small, on Fashion-MNIST as JPEGs.

The same task, input, recipe and techniques, on a network of 1,600,000 weights
and all 70,000 images, 10 epochs. Everything that the recipe states in steps
scales with `train_steps`. The images, once, and one run on two replicas:

    export TFDS_DATA_DIR=data
    python -m models.write_fashion_mnist --directory=$TFDS_DATA_DIR
    python -m models.train --workdir=runs/imagenet_small --cpu_replicas=2 \
        --config=configs/imagenet_small.py:magnitude,seed=0

Hyperparameters may follow the technique: the `sparsity` of pruning is 0.9 by
default; variational dropout and L0 take `penalty_weight` instead. All runs, one
after the other:

    for seed in 0 1; do
      for technique in dense magnitude extended_magnitude random \
          variational_dropout l0; do
        python -m models.train --workdir=runs/imagenet_small \
            --cpu_replicas=2 \
            --config=configs/imagenet_small.py:$technique,seed=$seed
      done
    done
"""

from typing import Any

import ml_collections

from configs import imagenet
from configs.arguments import Overrides, Techniques, make_config
from models.imagenet import ImageNet

_TRAIN_EXAMPLES = 60_000


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config of one run.

    Args:
        arg: A technique and values, such as `magnitude,sparsity=0.9,seed=1`, or
            a branch and values, such as `scratch,parent=DIRECTORY`.

    Raises:
        UsageError: If `arg` has another form, or a name or value is invalid.
    """
    config = ImageNet.default_config()
    config.model.depth = 18
    config.model.width = 0.375
    config.data.name = "fashion_mnist_jpeg"
    config.data.image_size = 56
    # The images show one thing each, which fills them.
    config.data.min_area = 0.7
    config.batch_size = 128
    # So short a training learns more with twice the rate of the recipe.
    config.learning_rate.base = 0.2
    config.train_steps = 4700
    return make_config(arg, config, TECHNIQUES)


def _smoothed(overrides: Overrides) -> Overrides:
    """Trains with label smoothing, as all runs of this file."""
    loss = {**overrides.get("loss", {}), "label_smoothing": 0.1}
    return {**overrides, "loss": loss}


def _magnitude(
    config: ml_collections.ConfigDict, /, **values: Any
) -> Overrides:
    return _smoothed(imagenet.TECHNIQUES["magnitude"](config, **values))


def _extended_magnitude(
    config: ml_collections.ConfigDict, /, **values: Any
) -> Overrides:
    # The published setting of 91 %.
    overrides = imagenet.TECHNIQUES["extended_magnitude"](config)
    overrides["sparsity"].update({"sparsity": 0.9, **values})
    return _smoothed(overrides)


def _random(config: ml_collections.ConfigDict, /, **values: Any) -> Overrides:
    return _smoothed(imagenet.TECHNIQUES["random"](config, **values))


def _variational_dropout(
    config: ml_collections.ConfigDict, /, **values: Any
) -> Overrides:
    overrides = imagenet.TECHNIQUES["variational_dropout"](config)
    # In so few steps log sigma^2 could not grow from -15, nor with the learning
    # rate of the weights.
    overrides["sparsity"].update(
        initial_log_sigma2=-8.0, penalty_weight=0.25 / _TRAIN_EXAMPLES
    )
    overrides["sparsity"].update(values)
    overrides["learning_rate"] = {"technique_multiplier": 500.0}
    return _smoothed(overrides)


def _l0(config: ml_collections.ConfigDict, /, **values: Any) -> Overrides:
    overrides = imagenet.TECHNIQUES["l0"](config)
    # Nor would gates close.
    overrides["sparsity"].update(penalty_weight=0.15 / _TRAIN_EXAMPLES)
    overrides["sparsity"].update(values)
    overrides["learning_rate"] = {"technique_multiplier": 50000.0}
    return _smoothed(overrides)


TECHNIQUES: Techniques = {
    "dense": imagenet.TECHNIQUES["dense"],
    "magnitude": _magnitude,
    "extended_magnitude": _extended_magnitude,
    "random": _random,
    "variational_dropout": _variational_dropout,
    "l0": _l0,
}
