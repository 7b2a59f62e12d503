"""Classification of Fashion-MNIST."""

import functools

import keras
import ml_collections

from models import convnet, residual
from sos.datasets import fashion_mnist
from sos.errors import UsageError
from sos.experiments.image_classification import (
    ArraySource,
    ImageClassification,
)

_DATA = {
    "fashion_mnist": fashion_mnist.load,
    "fashion_mnist_full": fashion_mnist.load_full,
}
_NETWORKS = {"convnet": convnet.build, "residual": residual.build}


class FashionMnist(ImageClassification):
    """Classifies images of clothes with a small network."""

    runtime_entries = (
        "seed",
        "sparsity.num_examples",
        "sparsity.penalty_weight",
        "sparsity.seed",
        "sparsity.sparsity",
    )
    layer_kinds = (
        ("first convolution", "^conv1/"),
        ("1x1 convolution", "_shortcut/"),
        ("3x3 convolution", "conv"),
        ("hidden dense layer", "^hidden/"),
        ("classifier", "^logits/"),
    )

    @classmethod
    def default_config(cls) -> ml_collections.ConfigDict:
        """Returns the entries of a config, with their defaults.

        - `model.name`: "convnet" or "residual"; see the modules of these names.
        - `model.synchronized_batch_norm`: Whether "residual" computes batch
          statistics over all replicas.
        - `data.name`: "fashion_mnist", the 10,000 embedded images, or
          "fashion_mnist_full", all 70,000; see `sos.datasets.fashion_mnist`.
        """
        config = super().default_config()
        config.model.name = "convnet"
        config.model.synchronized_batch_norm = False
        config.data.name = "fashion_mnist"
        config.batch_size = 128
        config.train_steps = 700
        config.learning_rate.base = 0.01
        return config

    def load_source(self) -> ArraySource:
        """Returns the images selected by `config.data.name`."""
        data = _load(self.config.data.name)
        if self.config.batch_size > len(data.y_train):
            raise UsageError(
                "`config.batch_size` must be at most the number of training "
                f"images, {len(data.y_train)}. "
                f"Received: {self.config.batch_size}"
            )
        return ArraySource(
            {"image": data.x_train, "label": data.y_train},
            {"image": data.x_test, "label": data.y_test},
            classes=len(data.class_names),
            seed=self.config.seed,
            batch_size=self.config.batch_size,
        )

    def build_network(self) -> keras.Model:
        """Returns the network selected by `config.model.name`."""
        options = self.config.model.to_dict()
        name = options.pop("name")
        if name not in _NETWORKS:
            raise UsageError(
                f"`config.model.name` must be one of {', '.join(_NETWORKS)}. "
                f"Received: {name!r}"
            )
        if name == "convnet" and options.pop("synchronized_batch_norm"):
            raise UsageError(
                "The network 'convnet' has no batch normalisation to "
                "synchronise. Received: "
                "config.model.synchronized_batch_norm=True"
            )
        try:
            return _NETWORKS[name](
                self.source.image_shape,
                self.source.classes,
                self.config.seed,
                **options,
            )
        except TypeError as error:
            raise UsageError(f"`config.model`: {error}") from error


@functools.cache
def _load(name: str) -> fashion_mnist.FashionMnist:
    """Reads a data set once per process."""
    if name not in _DATA:
        raise UsageError(
            f"`config.data.name` must be one of {', '.join(_DATA)}. "
            f"Received: {name!r}"
        )
    try:
        return _DATA[name]()
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(f"`config.data.name`: {error}") from error
