"""Registry of how the calls of layers use their weights.

Techniques that sample outputs need it: variational dropout draws noise for
every output of a linear map and every row that is looked up, and L0
regularisation draws gates for every occurrence in a look-up. It also serves to
count multiply-adds.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import keras
import numpy as np
import tensorflow as tf

from sos.errors import ArgumentError, UsageError

F = TypeVar("F", bound=Callable)


def _unknown() -> None:
    return None


def _unchanged(outputs: tf.Tensor) -> tf.Tensor:
    return outputs


@dataclasses.dataclass(frozen=True)
class Use:
    """A use of a weight of which only the cost is known.

    Techniques sample such a weight itself, once per step.

    Attributes:
        weight: The weight.
        positions: Function that returns the number of multiply-adds per element
            of the weight for one example, None if unknown.

    Example: multiply-adds of a convolution on an image of 28 x 28.
    >>> import keras, sos
    >>> kernel = keras.Variable(keras.ops.ones((3, 3, 1, 16)))
    >>> use = sos.extend.Use(kernel, positions=lambda: 28 * 28)
    >>> use.positions() * 3 * 3 * 16
    112896
    """

    weight: keras.Variable
    positions: Callable[[], int | None] = _unknown


@dataclasses.dataclass(frozen=True)
class LinearMap(Use):
    """A call that returns `finish(function(weight, inputs))`.

    Attributes:
        weight: The weight.
        inputs: The inputs of the linear map, a floating-point tensor.
        function: `function(weight, inputs)`, linear in both arguments. They
            have the shapes of `weight` and `inputs` and the dtype of `inputs`.
            It may read variables of the layer, but must not use other tensors
            that depend on trainable variables. It should not refer to the
            layer, but to its arguments: TensorFlow frees neither the function
            nor what it refers to once gradients were computed.
        finish: Function that turns the outputs of `function` into those of the
            call, for example by adding a bias and applying an activation.
        fast_in_bfloat16: Whether `function` also takes arguments of bfloat16,
            and is faster with them on CPUs that multiply bfloat16 natively.
        positions: As for `Use`.

    Example:
    >>> import keras, sos
    >>> layer = keras.layers.Dense(2)
    >>> inputs = keras.ops.ones((3, 4))
    >>> outputs = layer(inputs)
    >>> use = sos.extend.LinearMap(
    ...     layer.kernel,
    ...     inputs=inputs,
    ...     function=lambda kernel, x: keras.ops.matmul(x, kernel),
    ...     finish=lambda outputs: outputs + layer.bias,
    ...     positions=lambda: 1,
    ... )
    >>> use.finish(use(layer.kernel.value, inputs)).shape
    TensorShape([3, 2])
    """

    inputs: Any = None
    function: Callable[[Any, Any], Any] = None
    finish: Callable[[Any], Any] = _unchanged
    fast_in_bfloat16: bool = False

    def __call__(self, weight: tf.Tensor, inputs: tf.Tensor) -> tf.Tensor:
        """Applies `function`, with the weight cast to the inputs' dtype."""
        return self.function(tf.cast(weight, inputs.dtype), inputs)


@dataclasses.dataclass(frozen=True)
class LookUp(Use):
    """A call that returns `finish(rows of the weight)`.

    Attributes:
        weight: The table, of shape [rows, units].
        indices: Indices of the rows, int32 of any shape.
        finish: Function that turns float32 rows of shape [*indices.shape,
            units] into the outputs of the call, for example by a cast.
        positions: As for `Use`; 0, as a look-up multiplies nothing.

    Example:
    >>> import keras, sos
    >>> table = keras.Variable(keras.ops.reshape(keras.ops.arange(6.0), (3, 2)))
    >>> use = sos.extend.LookUp(table, indices=keras.ops.array([2, 0]))
    >>> use.rows(table.value)[0].numpy().tolist()
    [[4.0, 5.0], [0.0, 1.0]]
    """

    indices: Any = None
    finish: Callable[[Any], Any] = _unchanged
    positions: Callable[[], int | None] = lambda: 0

    def rows(self, *tables: tf.Tensor) -> list[tf.Tensor]:
        """Looks up the rows of one or several tables.

        Args:
            *tables: Tensors of the shape of `weight`.

        Returns:
            One float32 tensor of shape [*indices.shape, units] per table.
        """
        return [
            tf.cast(keras.ops.take(table, self.indices, axis=0), tf.float32)
            for table in tables
        ]


_describers: dict[type, Callable[..., Any]] = {}


def register_use(*classes: type) -> Callable[[F], F]:
    """Registers how the calls of layer classes use a weight.

    The decorated function takes the layer and the arguments of one call
    (`training` only if it has that parameter, or `**kwargs`). It returns a
    `sos.extend.LinearMap`, a `sos.extend.LookUp`, a `sos.extend.Use`, a list of
    these, or None if nothing is known. Subclasses that do not override `call`
    inherit it. It runs inside the call, so that other weights, such as a bias,
    have the values that they have there.

    Without a registration, techniques sample the weight itself, once per step.

    Args:
        *classes: Layer classes.

    Returns:
        A decorator, which returns the function unchanged.

    Raises:
        TypeError: If a class is not a class of Keras 3 layers.

    Example:
    >>> import keras, sos
    >>> class Scaled(keras.layers.Layer):
    ...     def build(self, shape):
    ...         self.kernel = self.add_weight(shape=(shape[-1], 4))
    ...
    ...     def call(self, inputs):
    ...         return 2 * keras.ops.matmul(inputs, self.kernel)
    >>> @sos.extend.register_use(Scaled)
    ... def describe(layer, inputs):
    ...     return sos.extend.LinearMap(
    ...         layer.kernel,
    ...         inputs=inputs,
    ...         function=lambda kernel, x: keras.ops.matmul(x, kernel),
    ...         finish=lambda outputs: 2 * outputs,
    ...         positions=lambda: 1,
    ...     )
    >>> sos.extend.check_use(Scaled(), keras.ops.ones((2, 3)))
    """
    for cls in classes:
        if not (isinstance(cls, type) and issubclass(cls, keras.layers.Layer)):
            raise ArgumentError(
                "`register_use` takes classes of Keras 3 layers. "
                f"Received: {cls!r}"
            )

    def decorate(describe: F) -> F:
        for cls in classes:
            _describers[cls] = describe
        return describe

    return decorate


def describer(cls: type) -> Callable[..., Any] | None:
    """Returns the function registered for a layer class, None without one."""
    for base in cls.__mro__:
        if base in _describers:
            return _describers[base] if cls.call is base.call else None
    return None


def describe(
    cls: type, layer: keras.layers.Layer, *args: Any, **kwargs: Any
) -> list[Use]:
    """Returns how one call of a layer uses its weights.

    Args:
        cls: Class of the layer, before it was made sparse.
        layer: The layer.
        *args: Arguments of the call.
        **kwargs: Keyword arguments of the call.

    Returns:
        The uses; empty if none is known.
    """
    function = describer(cls)
    if function is None:
        return []
    if "training" in kwargs and not _takes_training(function):
        kwargs.pop("training")
    uses = function(layer, *args, **kwargs)
    if uses is None:
        return []
    return list(uses) if isinstance(uses, list | tuple) else [uses]


def _takes_training(function: Callable) -> bool:
    parameters = inspect.signature(function).parameters
    return "training" in parameters or any(
        parameter.kind == inspect.Parameter.VAR_KEYWORD
        for parameter in parameters.values()
    )


def check_use(layer: keras.layers.Layer, *args: Any, **kwargs: Any) -> None:
    """Compares a registered use with what the layer computes.

    Args:
        layer: A layer whose class is registered.
        *args: Arguments of a call, eager tensors.
        **kwargs: Keyword arguments of the call.

    Raises:
        UsageError: If the class is not registered, the outputs differ from the
            layer's, or a function is not linear.

    Example:
    >>> import keras, sos
    >>> sos.extend.check_use(keras.layers.Dense(2), keras.ops.ones((3, 4)))
    """
    expected = layer(*args, **kwargs)
    cls = getattr(layer, "plain_class", type(layer))
    uses = describe(cls, layer, *args, **kwargs)
    if not uses:
        raise UsageError(
            f"Calls of {cls.__name__} are not described for these arguments. "
            "Register a function with `@sos.extend.register_use`."
        )
    for use in uses:
        if not isinstance(use, LinearMap | LookUp):
            continue
        weight = tf.convert_to_tensor(use.weight.value)
        if isinstance(use, LookUp):
            outputs = use.finish(use.rows(weight)[0])
        else:
            outputs = use.finish(use(weight, use.inputs))
            _check_linear(cls, use, weight)
        _check_close(cls, "outputs", outputs, expected)


def _check_linear(cls: type, use: LinearMap, weight: tf.Tensor) -> None:
    other = tf.reverse(use.inputs, [0]) + 1
    both = use(weight, use.inputs + other)
    each = use(weight, use.inputs) + use(weight, other)
    _check_close(cls, "sum of two inputs", both, each)
    _check_close(
        cls,
        "outputs at a weight twice as large",
        use(2 * weight, use.inputs),
        2 * use(weight, use.inputs),
    )


def _check_close(cls: type, name: str, received: Any, expected: Any) -> None:
    received = keras.ops.convert_to_numpy(keras.ops.cast(received, "float32"))
    expected = keras.ops.convert_to_numpy(keras.ops.cast(expected, "float32"))
    scale = np.abs(expected).max(initial=1e-6)
    equal = received.shape == expected.shape and np.allclose(
        received, expected, rtol=0.02, atol=0.02 * scale
    )
    if not equal:
        raise UsageError(
            f"The registered use of {cls.__name__} does not match its call: "
            f"the {name} differ. Received: shape {received.shape}, first "
            f"values {received.ravel()[:4]}. Expected: shape {expected.shape}, "
            f"{expected.ravel()[:4]}"
        )
