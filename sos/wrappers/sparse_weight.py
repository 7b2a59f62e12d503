"""A weight of a wrapped layer, with what its technique adds."""

import keras
import tensorflow as tf


class SparseWeight:
    """One weight of the wrapped layer, with what its technique adds to it.

    A plain object: Keras would count variables that it finds in lists or
    dictionaries of a layer twice.

    Attributes:
        variable: The weight, a `keras.Variable` of the wrapped layer. Its value
            is never changed to apply sparsity.
        path: Its path, in the original model where there was one.
        state: The technique's variables for this weight by name.
    """

    def __init__(self, variable: keras.Variable, path: str) -> None:
        self.variable = variable
        self.path = path
        self.state: dict[str, keras.Variable] = {}

    @property
    def value(self) -> tf.Tensor:
        """The dense weight, in the dtype in which it is stored."""
        return tf.convert_to_tensor(self.variable.value)


class SparseWeights:
    """Hides a list of sparse weights from Keras's tracking."""

    def __init__(self) -> None:
        self.items: list[SparseWeight] = []
