"""A weight of a layer with the variables of its technique."""

from typing import Any

import keras
import tensorflow as tf

from sos import keras_compat


class SparseWeight:
    """One weight of a layer with the variables of its technique.

    It is not a Keras object: Keras would track variables in lists or
    dictionaries of a layer twice.

    Attributes:
        variable: The dense weight, a `keras.Variable` of the layer. Sparsity
            does not change its value.
        path: Path of the weight, in the original model if there is one.
        technique: The technique that makes it sparse.
        state: The technique's variables for this weight by name.

    Example:
    >>> import keras, sos
    >>> layer = sos.MagnitudePruning(keras.layers.Dense(2), sparsity=0.5)
    >>> layer.build((None, 4))
    >>> (weight,) = layer.sparse_weights
    >>> weight.variable.name, weight.value.shape, list(weight.state)
    ('kernel', TensorShape([4, 2]), ['mask'])
    """

    def __init__(
        self, variable: keras.Variable, path: str, technique: Any
    ) -> None:
        self.variable = variable
        self.path = path
        self.technique = technique
        self.state: dict[str, keras.Variable] = {}

    @property
    def value(self) -> tf.Tensor:
        """The dense weight as a tensor, in the dtype in which it is stored."""
        return keras_compat.stored_value(self.variable)


class SparseWeights:
    """A list of sparse weights that Keras does not track."""

    def __init__(self) -> None:
        self.items: list[SparseWeight] = []


def is_technique(layer: keras.layers.Layer) -> bool:
    """Returns whether a layer is a technique (a `SparseWrapper`)."""
    return hasattr(type(layer), "training_weight")
