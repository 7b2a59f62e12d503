"""Effective weights: the values that a layer's call uses."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import tensorflow as tf

from sos import keras_compat, noise
from sos.errors import UsageError
from sos.keras_compat import SubstitutionScope
from sos.wrappers.sparse_weight import SparseWeight, is_technique

_local = threading.local()


class EffectiveWeights(SubstitutionScope):
    """Scope in which sparse weights have their effective values.

    A value is computed when it is read, so that a rematerialised block computes
    it again, with its gradient.

    Args:
        weights: The sparse weights by the `id` of their variables.
        training: Whether the values are those of training.
        whole: Whether sublayers use this scope instead of opening their own.
    """

    def __init__(
        self,
        weights: Mapping[int, SparseWeight],
        training: bool,
        *,
        whole: bool = False,
    ) -> None:
        super().__init__()
        self._weights = weights
        self._training = training
        self.whole = whole
        self._values: dict[int, tf.Tensor] = {}

    def holds(self, weights: Mapping[int, SparseWeight]) -> bool:
        """Returns whether the scope includes all these weights."""
        return self._weights.keys() >= weights.keys()

    def compute_all(self) -> None:
        """Computes all values now, for a layer that reads them in a loop."""
        for weight in self._weights.values():
            key = id(weight.variable)
            # Through the scope, which hides itself from the computation.
            self._values[key] = self.get_current_value(weight.variable)

    def substitute(self, variable: keras.Variable) -> tf.Tensor | None:
        """Returns the effective value of a sparse weight."""
        weight = self._weights.get(id(variable))
        if weight is None:
            return None
        value = self._values.get(id(variable))
        if value is not None:
            return value
        return effective_value(weight, self._training)

    def assigned_value(self, variable: keras.Variable, value: Any) -> Any:
        """Returns the dense value for an assigned effective value."""
        weight = self._weights.get(id(variable))
        if weight is None:
            return value
        self._values.pop(id(variable), None)
        return weight.technique.assigned_weight(weight, value)


def effective_value(weight: SparseWeight, training: bool) -> tf.Tensor:
    """Returns the effective value of a weight, in the weight's dtype.

    Args:
        weight: The weight.
        training: Whether the value is that of training.

    Raises:
        UsageError: In training, inside `sos.frozen` or `sos.sampled`.
        RuntimeError: In training, if no updater is bound.
    """
    if training:
        check_training(weight)
        value = weight.technique.training_weight(weight)
    else:
        value = _scope_value(weight)
        if value is None:
            value = weight.technique.evaluation_weight(weight)
    return tf.cast(value, weight.value.dtype)


def check_training(weight: SparseWeight) -> None:
    """Raises an error if a weight cannot be used in training now.

    Args:
        weight: The weight.

    Raises:
        UsageError: Inside `sos.frozen` or `sos.sampled`.
        RuntimeError: If no updater is bound.
    """
    for scope in getattr(_local, "scopes", ()):
        if id(weight.variable) in scope.values:
            raise UsageError(
                f"The weight {weight.path} was used with `training=True` "
                f"inside `sos.{scope.name}`, which is for inference. Close the "
                "scope before training."
            )
    weight.technique.check_updated()


@contextlib.contextmanager
def frozen(model: keras.layers.Layer) -> Iterator[None]:
    """Computes the evaluation weights of a model once for all calls inside.

    Without it, every call computes them, which for a batch of one token costs
    more than the call itself. Use it in decoding loops. In a `tf.function`,
    open the scope inside the function.

    Weights that code reads directly (`layer.kernel`) have their evaluation
    values inside, too. Scopes nest.

    Args:
        model: A model, with or without sparse layers.

    Yields:
        Nothing.

    Raises:
        UsageError: If a layer is called with `training=True` inside, or a
            `tf.function` traced inside would keep values from outside of it.

    Example:
    >>> import keras, sos
    >>> import tensorflow as tf
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4)])
    >>> sparse = sos.sparsify(model, "L0Regularization", penalty_weight=1e-3)
    >>> @tf.function
    ... def decode(state):
    ...     with sos.frozen(sparse):
    ...         for _ in tf.range(10):
    ...             state = sparse(state)
    ...     return state
    >>> decode(tf.ones((1, 4))).shape
    TensorShape([1, 4])
    """
    with _value_scope(
        model, lambda weight: effective_value(weight, False), "frozen"
    ):
        yield


@contextlib.contextmanager
def sampled(model: keras.layers.Layer, seed: int | tf.Tensor) -> Iterator[None]:
    """Draws one sample of the weights' posterior for all calls inside.

    All calls inside use the same weights: with variational dropout theta +
    sigma * noise, with L0 regularisation the weights times sampled gates. Call
    the model as in inference. Weights with masks have no distribution, and
    their evaluation values.

    Args:
        model: A model in which at least one technique has a posterior.
        seed: Seed of the sample, an integer or int32 scalar. Equal seeds give
            equal weights.

    Yields:
        Nothing.

    Raises:
        UsageError: If no technique in the model has a posterior, if the scope
            is opened outside of the replicas of a `tf.distribute.Strategy`, or
            as for `sos.frozen`.

    Example:
    >>> import keras, numpy as np, sos
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> sparse = sos.sparsify(
    ...     model, "VariationalDropout", penalty_weight=1e-3
    ... )
    >>> outputs = []
    >>> for seed in range(20):
    ...     with sos.sampled(sparse, seed=seed):
    ...         outputs.append(sparse(np.ones((3, 4))))
    >>> bool(np.std(outputs, axis=0).min() > 0)
    True
    """
    weights = _sparse_weights(model)
    if not any(weight.technique.has_posterior for weight in weights):
        raise UsageError(
            "`sampled` needs a technique with a posterior over weights, such "
            "as VariationalDropout or L0Regularization. The techniques of "
            f"{model.name!r}: "
            f"{sorted({type(w.technique).__name__ for w in weights})}"
        )
    on_replica = (
        tf.distribute.has_strategy()
        and not tf.distribute.in_cross_replica_context()
    )
    if not on_replica and (
        tf.distribute.has_strategy()
        or any(keras_compat.is_distributed(w.variable) for w in weights)
    ):
        raise UsageError(
            "`sampled` must be opened in the function that runs on the "
            "replicas, as it does not reach other threads. Move the scope into "
            "the function that `strategy.run` calls. For methods such as "
            "`predict`, use a model created without a strategy."
        )

    def sample(weight: SparseWeight) -> tf.Tensor:
        if not weight.technique.has_posterior:
            return effective_value(weight, False)
        with noise.posterior_sample(seed):
            value = weight.technique.training_weight(weight)
        return tf.cast(value, weight.value.dtype)

    with (
        keras_compat.without_compiled_functions(model),
        _value_scope(model, sample, "sampled"),
    ):
        yield


def _sparse_weights(model: keras.layers.Layer) -> list[SparseWeight]:
    return [
        weight
        for layer in keras_compat.all_layers(model)
        if is_technique(layer)
        for weight in layer.sparse_weights
    ]


class _ScopeValues:
    """The values of weights inside a `frozen` or `sampled` scope."""

    def __init__(self, name: str, values: dict[int, tf.Tensor]) -> None:
        self.name = name
        self.values = values


@contextlib.contextmanager
def _value_scope(
    model: keras.layers.Layer,
    compute: Callable[[SparseWeight], tf.Tensor],
    name: str,
) -> Iterator[None]:
    weights = {id(w.variable): w for w in _sparse_weights(model)}
    values = {key: compute(weight) for key, weight in weights.items()}
    outer = getattr(_local, "scopes", ())
    _local.scopes = (_ScopeValues(name, values), *outer)
    try:
        with EffectiveWeights(weights, training=False):
            yield
    finally:
        _local.scopes = outer


def _scope_value(weight: SparseWeight) -> tf.Tensor | None:
    for scope in getattr(_local, "scopes", ()):
        value = scope.values.get(id(weight.variable))
        if value is None:
            continue
        if hasattr(value, "numpy") and not tf.executing_eagerly():
            raise UsageError(
                f"A `tf.function` was traced inside `sos.{scope.name}`, and "
                "would keep the present values of the weights. Open the scope "
                "inside the function. For methods that compile their own "
                "function (`predict`, `generate`), use the model without the "
                "scope, or `sos.strip` it."
            )
        return value
    return None
