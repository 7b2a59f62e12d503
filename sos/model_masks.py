"""The masks of a whole model, by the paths of its weights."""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from sos.arguments import format_values
from sos.errors import ArgumentError, UsageError
from sos.wrappers.base import check_keras_layer, weights_by_path
from sos.wrappers.effective import effective_value
from sos.wrappers.masked import MaskedWrapper, check_mask
from sos.wrappers.sparse_weight import SparseWeight


def get_masks(model: keras.layers.Layer) -> dict[str, np.ndarray]:
    """Returns the masks of a model's sparse weights.

    A technique without masks, such as `sos.VariationalDropout`, keeps the
    elements that are not zero in evaluation. `numpy.savez(path, **masks)`
    writes the masks to a file.

    Args:
        model: A Keras 3 model or layer, built.

    Returns:
        uint8 arrays of the weights' shapes, 1 = kept, by the paths that
        `sos.sparsity_report` prints, in the order of the model's weights. Empty
        if the model has no sparse weights.

    Raises:
        TypeError: If `model` is not a Keras 3 model or layer.

    Example:
    >>> import keras, sos
    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(2, name="hidden")]
    ... )
    >>> masks = sos.get_masks(sos.prune(model, 0.5))
    >>> masks["hidden/kernel"].shape, int(masks["hidden/kernel"].sum())
    ((4, 2), 4)
    """
    check_keras_layer(model, "get_masks")
    return {
        path: _mask(weight) for path, weight in weights_by_path(model).items()
    }


def _mask(weight: SparseWeight) -> np.ndarray:
    if isinstance(weight.technique, MaskedWrapper):
        mask = keras.ops.convert_to_numpy(weight.state["mask"])
        return np.array(mask, "uint8")
    value = keras.ops.convert_to_numpy(effective_value(weight, training=False))
    return (value != 0).astype("uint8")


def set_masks(
    model: keras.layers.Layer, masks: Mapping[str, np.ndarray]
) -> None:
    """Sets the masks of a model's sparse weights.

    Compiled functions use the new masks at once. `sos.FixedMask` keeps them
    throughout training. Techniques with a schedule, such as
    `sos.MagnitudePruning`, replace them at their next update.

    Args:
        model: A Keras 3 model or layer with sparse weights, built.
        masks: Arrays of zeros and ones, 1 = kept, of the weights' shapes, by
            path as `sos.get_masks` returns them. Other weights keep their
            masks.

    Raises:
        TypeError: If `model` is not a Keras 3 model or layer, or `masks` not a
            mapping.
        UsageError: If the model has no sparse weight of a path, its technique
            has no masks, or an array has another shape or other values. Then no
            mask changes.

    Example: a lottery ticket (Frankle and Carbin 2019), with the masks of a
    trained model and the weights from before training.
    >>> import keras, sos
    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(2, name="hidden")]
    ... )
    >>> trained = keras.models.clone_model(model)
    >>> ticket = sos.sparsify(model, "FixedMask")
    >>> sos.set_masks(ticket, sos.get_masks(sos.prune(trained, 0.5)))
    >>> sos.sparsity_report(ticket).sparsity
    0.5
    """
    check_keras_layer(model, "set_masks")
    if not isinstance(masks, Mapping):
        raise ArgumentError(
            "`masks` must be a dictionary from paths of weights to arrays, as "
            "`sos.get_masks` returns it. "
            f"Received: masks={masks!r} of type {type(masks).__name__}"
        )
    weights = weights_by_path(model)
    arrays = {path: _check(weights, path, mask) for path, mask in masks.items()}
    for path, array in arrays.items():
        weights[path].state["mask"].assign(array)


def _check(weights: dict[str, SparseWeight], path: Any, mask: Any) -> Any:
    """Returns a mask as an array; raises `UsageError` if it is invalid."""
    if path not in weights:
        raise UsageError(
            f"The model has no sparse weight {path!r}. Its sparse weights: "
            f"{format_values(weights) or 'none'}. `sos.sparsity_report` "
            "prints all weights with their techniques. Give layers names: "
            "Keras numbers those without one anew in each model."
        )
    technique = weights[path].technique
    if not isinstance(technique, MaskedWrapper):
        raise UsageError(
            f"The technique of {path!r}, {type(technique).__name__}, has no "
            "masks to set. Use a technique with masks, such as "
            '`sos.sparsify(model, "FixedMask")`.'
        )
    return check_mask(weights[path], mask)
