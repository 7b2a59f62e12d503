"""A weight of a layer, with what its technique adds."""

from typing import Any

import keras
import tensorflow as tf

from sos import keras_compat


class SparseWeight:
    """One weight of a layer, with what its technique adds to it.

    A plain object: Keras would count variables that it finds in lists or
    dictionaries of a layer twice.

    Attributes:
        variable: The weight, a `keras.Variable` of the layer. Its value is
            never changed to apply sparsity.
        path: Its path, in the original model where there was one.
        technique: The technique that makes it sparse.
        state: The technique's variables for this weight by name.
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
        """The dense weight, in the dtype in which it is stored."""
        return keras_compat.stored_value(self.variable)


class SparseWeights:
    """Hides a list of sparse weights from Keras's tracking."""

    def __init__(self) -> None:
        self.items: list[SparseWeight] = []


def is_technique(layer: keras.layers.Layer) -> bool:
    """Returns whether a layer is a technique, or wrapper, of `sos`."""
    return hasattr(type(layer), "training_weight")
