"""The variable of a mask."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from sos.errors import UsageError

# Averages of masks of ones may differ from 1 by rounding.
_TOLERANCE = 1e-5


class MaskVariable(keras.Variable):
    """A uint8 variable of zeros and ones, which checks assigned values.

    Otherwise Keras would truncate them: 0.99, as in averages of
    `get_weights()`, to 0, a pruned weight.
    """

    def assign(self, value: Any) -> Any:
        """Assigns zeros and ones.

        Args:
            value: Zeros and ones of any dtype. In a traced function, where
                values cannot be checked, the dtype must be an integer or bool.

        Returns:
            The new value.

        Raises:
            UsageError: If other values are assigned, or floats in a traced
                function.
        """
        return super().assign(self._check(value))

    def _check(self, value: Any) -> Any:
        if isinstance(value, MaskVariable):
            return value
        if tf.is_tensor(value):
            dtype = keras.backend.standardize_dtype(value.dtype)
            if tf.is_symbolic_tensor(tf.convert_to_tensor(value)):
                if "float" in dtype:
                    raise UsageError(
                        f"The mask {self.path} cannot be assigned {dtype} "
                        "values in a traced function, where they cannot be "
                        "checked to be zeros and ones. Cast them to bool or "
                        f"uint8. {_ADVICE}"
                    )
                return value
            if dtype == "bool":
                return value
            if dtype == "uint8" and tf.executing_eagerly():
                # Copies only one number from the device.
                if int(tf.reduce_max(value)) <= 1:
                    return value
        array = keras.ops.convert_to_numpy(value)
        if array.dtype == np.uint8 and array.max(initial=0) <= 1:
            return array
        rounded = array
        if array.dtype.kind not in "bui":
            array = np.asarray(array, "float64")
            rounded = np.rint(array)
        invalid = (rounded != 0) & (rounded != 1)
        if rounded is not array:
            with np.errstate(invalid="ignore"):  # infinity - infinity
                invalid |= np.abs(array - rounded) > _TOLERANCE
        if invalid.any():
            examples = np.unique(array[invalid])[:3].tolist()
            raise UsageError(
                f"The mask {self.path} must hold zeros and ones. {_ADVICE} "
                f"Received: {invalid.sum()} other values of {invalid.size}, "
                f"such as {', '.join(f'{number:.4g}' for number in examples)}. "
                "`set_weights` may have set other variables before this one."
            )
        return rounded.astype("uint8")


_ADVICE = (
    "To average models, average their `trainable_variables`, and copy the "
    "masks (the other variables) from one of them."
)
