"""The networks and data sets that a config can name."""

import functools

from models import convnet, residual
from sos.datasets import fashion_mnist
from sos.experiments.classification import BuildModel, Data

_DATASETS = {
    "fashion_mnist": fashion_mnist.load,
    "fashion_mnist_full": fashion_mnist.load_full,
}


def load_data(name: str) -> Data:
    """Reads a data set.

    Args:
        name: "fashion_mnist", the embedded part, or "fashion_mnist_full".

    Raises:
        ValueError: If there is no such data set, or it is damaged.
        FileNotFoundError: If it is not on this machine.
    """
    if name not in _DATASETS:
        raise ValueError(
            f"`config.dataset` must be one of {', '.join(_DATASETS)}. "
            f"Received: {name!r}"
        )
    return _DATASETS[name]()


def builder(name: str, synchronized_batch_norm: bool = False) -> BuildModel:
    """Returns what makes a network.

    Args:
        name: "convnet" or "residual".
        synchronized_batch_norm: Whether batch statistics are those of all
            replicas together.

    Raises:
        ValueError: If there is no such network, or it has no batch norm to
            synchronise.
    """
    if name == "convnet":
        if synchronized_batch_norm:
            raise ValueError(
                "The network convnet has no batch normalisation to "
                "synchronise. Received: synchronized_batch_norm=True"
            )
        return convnet.build
    if name == "residual":
        return functools.partial(
            residual.build, synchronized_batch_norm=synchronized_batch_norm
        )
    raise ValueError(
        f"`config.model` must be one of convnet, residual. Received: {name!r}"
    )
