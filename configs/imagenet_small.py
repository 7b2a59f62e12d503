r"""The recipe of configs/imagenet.py in small, on Fashion-MNIST as JPEGs.

    python -m models.write_fashion_mnist --directory=data
    python -m models.train --config=configs/imagenet_small.py:magnitude,seed=0 \
        --workdir=runs/imagenet_small --cpu_replicas=2
"""

from typing import Any

import ml_collections

from models.imagenet import ImageNet
from sos.errors import UsageError
from sos.experiments import parse_argument

# Of the recipe, to which the settings of techniques belong.
_REFERENCE_STEPS = 128_000


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = ImageNet.default_config()
    config.data.name = "fashion_mnist_jpeg"
    config.data.directory = "data"
    config.data.image_size = 28
    config.data.min_area = 0.5
    config.model.depth = 18
    config.model.width = 0.25
    config.batch_size = 256
    config.train_steps = 2400
    config.dtype_policy = "float32"
    name, values = parse_argument(arg, default="dense")
    if name not in TECHNIQUES:
        raise UsageError(
            f"The technique must be one of {', '.join(TECHNIQUES)}. "
            f"Received: {name!r}"
        )
    for key in ("seed", "train_steps"):
        config[key] = values.pop(key, config[key])
    overrides = TECHNIQUES[name](config)
    overrides["sparsity"].update(values)
    config.update(overrides)
    return config


def _steps(config: ml_collections.ConfigDict, **steps: int) -> dict[str, int]:
    return {
        name: round(step * config.train_steps / _REFERENCE_STEPS)
        for name, step in steps.items()
    }


def _dense(config):
    return {"sparsity": {"technique": None}}


def _magnitude(config):
    return {
        "sparsity": {
            "technique": "MagnitudePruning",
            "sparsity": 0.9,
            **_steps(
                config, begin_step=40_000, end_step=76_000, frequency=2_000
            ),
        }
    }


def _extended_magnitude(config):
    return {
        "label": "extended magnitude",
        "sparsity": {
            "technique": "MagnitudePruning",
            "sparsity": 0.9,
            "rules": (
                ("^initial_conv/", None),
                ("^final_dense/", {"sparsity": 0.8}),
            ),
            **_steps(
                config, begin_step=33_333, end_step=96_000, frequency=5_333
            ),
        },
    }


def _random(config):
    return {
        "sparsity": {
            "technique": "RandomPruning",
            "sparsity": 0.9,
            **_steps(config, begin_step=0, end_step=40_000, frequency=2_000),
        }
    }


TECHNIQUES = {
    "dense": _dense,
    "magnitude": _magnitude,
    "extended_magnitude": _extended_magnitude,
    "random": _random,
}
