"""The masks of a whole model, by the paths of its weights."""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from sos.arguments import listed
from sos.errors import ArgumentError, UsageError
from sos.wrappers.base import check_keras_layer, weights_by_path
from sos.wrappers.effective import effective_value
from sos.wrappers.masked import MaskedWrapper, check_mask
from sos.wrappers.sparse_weight import SparseWeight


def get_masks(model: keras.layers.Layer) -> dict[str, np.ndarray]:
    """Returns which elements of its sparse weights a model keeps.

    `numpy.savez(path, **masks)` writes the masks to a file.

    Args:
        model: A Keras 3 model or layer, built.

    Returns:
        One uint8 array for each weight that a technique makes sparse, with the
        weight's shape, 1 = kept. The keys are the paths that
        `sos.sparsity_report` prints, in the order of the model's weights.
        Techniques without masks, such as `sos.VariationalDropout`, keep what is
        not zero in evaluation. Without sparse weights the result is empty.

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
    """Sets masks of a model, for example those of another one.

    Compiled functions use the new masks at once. `sos.FixedMask` keeps them for
    all of training; `sos.MagnitudePruning` and other techniques with a schedule
    replace them at the next update of their schedule.

    Args:
        model: A Keras 3 model or layer with sparse weights, built.
        masks: Arrays of zeros and ones, 1 = kept, of the shapes of the weights,
            by path as `sos.get_masks` returns them. Weights that are not named
            keep their masks.

    Raises:
        TypeError: If `model` is not a Keras 3 model or layer, or `masks` not a
            mapping.
        UsageError: If a path names no sparse weight of the model, its technique
            has no masks, or an array has another shape or other values. No mask
            is changed then.

    Example:
    A lottery ticket (Frankle and Carbin 2019) has the masks of a trained model
    and the weights from before training:
    >>> import keras, numpy as np, sos
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
    checked = {
        path: _checked(weights, path, mask) for path, mask in masks.items()
    }
    for path, mask in checked.items():
        weights[path].state["mask"].assign(mask)


def _checked(weights: dict[str, SparseWeight], path: Any, mask: Any) -> Any:
    """Returns the mask that is to be set at a path."""
    if path not in weights:
        raise UsageError(
            f"The model has no sparse weight {path!r}. Its sparse weights: "
            f"{listed(weights) or 'none'}. `sos.sparsity_report` prints all "
            "weights with their techniques."
        )
    technique = weights[path].technique
    if not isinstance(technique, MaskedWrapper):
        raise UsageError(
            f"The technique of {path!r}, {type(technique).__name__}, has no "
            "masks that could be set. Use one that has, such as "
            '`sos.sparsify(model, "FixedMask")`.'
        )
    return check_mask(weights[path], mask)
