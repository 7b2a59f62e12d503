r"""The study of configs/fashion_mnist.py on a residual network and all images.

    python -m models.sweep --config=configs/fashion_mnist_full.py \
        --workdir=runs/fashion_mnist_full

or `make study-full`. It trains 153 networks, ResNet-20 of He et al. 2016, on
the 60,000 training images of Fashion-MNIST, which are not part of this package;
see `sos.datasets.fashion_mnist.load_full`. With
`--config.data.name=fashion_mnist` it uses the embedded 6,000 images.

On 2 busy CPU cores a step took 0.3 seconds, with L0 0.4 and with variational
dropout 0.8, so the study takes about three days; Ctrl-C stops it, and the same
command continues. It has not been run from end to end. These parts were run
with seed 0: 1,000 steps of the dense network (test accuracy 92.1 %) and of
magnitude pruning to 90 % (90.5 %); and 500 steps with a penalty, which are too
few for variational dropout with batch normalization (L0: 87.4 % at 89 %
sparsity, variational dropout: 48 % at 78 %).
"""

from collections.abc import Iterator
from typing import Any

import ml_collections

from configs import fashion_mnist
from configs.arguments import Overrides, make_config
from models.fashion_mnist import FashionMnist


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config of one run.

    Args:
        arg: As in configs/fashion_mnist.py.
    """
    config = FashionMnist.default_config()
    config.model.name = "residual"
    config.data.name = "fashion_mnist_full"
    # 8.5 epochs.
    config.train_steps = 4000
    return make_config(arg, config, TECHNIQUES)


def sweep(config: ml_collections.ConfigDict) -> Iterator[Overrides]:
    """Yields the overrides of every run of the study.

    The grids of penalties are coarse: they are based on the result of one
    penalty per technique after 500 and 1,000 steps.

    Args:
        config: A dense config.
    """
    return fashion_mnist.make_sweep(
        config,
        seeds=(0, 1, 2),
        sparsities=(0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99),
        variational_dropout=(0.1, 0.3, 1.0, 2.0, 4.0, 8.0, 16.0),
        l0=(1.0, 3.0, 6.0, 12.0, 25.0, 50.0, 100.0),
        branched=(0.8, 0.9, 0.95),
        techniques=TECHNIQUES,
    )


def _variational_dropout(
    config: ml_collections.ConfigDict, /, **values: Any
) -> Overrides:
    # There are enough steps for the technique's default.
    values = {"initial_log_sigma2": -10.0, **values}
    return fashion_mnist.TECHNIQUES["variational_dropout"](config, **values)


def _l0(config: ml_collections.ConfigDict, /, **values: Any) -> Overrides:
    overrides = fashion_mnist.TECHNIQUES["l0"](config, **values)
    return {**overrides, "learning_rate": {"technique_multiplier": 3.0}}


TECHNIQUES = {
    **fashion_mnist.TECHNIQUES,
    "variational_dropout": _variational_dropout,
    "l0": _l0,
}
