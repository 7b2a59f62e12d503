"""Warns of weights that lose their last element or cannot be ranked.

Mask updates on the host and on accelerators call `after_update`, so that they
give the same warnings.
"""

import math
import warnings
import weakref
from typing import TYPE_CHECKING

import keras

from sos.masks import keep_count
from sos.rankings import PerTensorRanking
from sos.wrappers.base import SparseWrapper, find_wrappers
from sos.wrappers.sparse_weight import SparseWeight

if TYPE_CHECKING:
    from sos.wrappers.masked import PruningWrapper

_DENSE = "leave it dense (`rules` of `sos.sparsify`)"

# Steps of the warnings by technique, and by path and kind. They are not stored
# in the technique, so that a copy of it warns again.
_warning_steps: weakref.WeakKeyDictionary[
    SparseWrapper, dict[tuple[str, str], int | None]
] = weakref.WeakKeyDictionary()


def find_dead_weights(model: keras.layers.Layer) -> list[str]:
    """Returns the paths of sparse weights that are all zero in evaluation.

    It works for every technique. Variational dropout and L0 regularisation may
    lose a weight if the penalty is too high.

    Args:
        model: A model or layer, built.

    Returns:
        The paths, in the order of the model's weights.
    """
    return [
        weight.path
        for wrapper in find_wrappers(model)
        for weight, value in wrapper.evaluation_weights().items()
        if keras.ops.size(value) and not keras.ops.convert_to_numpy(value).any()
    ]


def after_update(
    wrapper: "PruningWrapper",
    weight: SparseWeight,
    sparsity: float,
    *,
    undecided: bool,
    any_left: bool,
) -> None:
    """Warns if a mask update could not rank a weight, or pruned all of it.

    Args:
        wrapper: The technique.
        weight: The weight whose mask was updated.
        sparsity: The requested fraction of zeros.
        undecided: Whether the weight kept its mask because scores are equal.
        any_left: Whether the mask keeps any element.
    """
    size = math.prod(weight.variable.shape)
    # A sparsity of 1 requests a mask of zeros.
    if not size or sparsity == 1:
        return
    if not any_left:
        _warn_empty(wrapper, weight, sparsity)
    elif undecided:
        _warn_undecided(wrapper, weight)
    elif isinstance(wrapper.ranking, PerTensorRanking) and not keep_count(
        size, sparsity
    ):
        warn_kept(
            wrapper,
            weight,
            sparsity,
            wrapper.ranking.min_kept,
            "`ranking=sos.extend.PerTensorRanking(min_kept=0)`",
        )


def warn_kept(
    wrapper: SparseWrapper,
    weight: SparseWeight,
    sparsity: float,
    count: int,
    remedy: str,
) -> None:
    """Warns that a weight keeps elements although its sparsity leaves none.

    Args:
        wrapper: The technique.
        weight: The weight.
        sparsity: The requested fraction of zeros.
        count: Number of elements that the weight keeps.
        remedy: Argument with which it keeps none, for the message.
    """
    size = math.prod(weight.variable.shape)
    _warn(
        wrapper,
        weight,
        "kept",
        f"A sparsity of {sparsity:.6g} leaves none of the {size} elements of "
        f"{weight.path}: it keeps {min(count, size)}. Lower its sparsity, or "
        f"{_DENSE}. To prune all of it, pass {remedy}.",
    )


def warn_of_zeros(wrapper: SparseWrapper, weight: SparseWeight) -> None:
    """Warns that a fixed mask prunes all of a weight, as it was all zero."""
    _warn(
        wrapper,
        weight,
        "zeros",
        f"All elements of {weight.path} were zero when "
        f"{type(wrapper).__name__} computed its mask from them: it stays zero "
        "in training. Load the weights before making the layer sparse, or "
        f"{_DENSE}.",
    )


def _warn_empty(
    wrapper: "PruningWrapper", weight: SparseWeight, sparsity: float
) -> None:
    _warn(
        wrapper,
        weight,
        "empty",
        f"The mask update{_at_step(_step(wrapper))} left no element of "
        f"{weight.path} (sparsity {sparsity:.6g}). Its layer ignores its "
        "inputs now, and the gradient of a pruned element is zero. Lower its "
        f"sparsity, or {_DENSE}.",
    )


def _warn_undecided(wrapper: "PruningWrapper", weight: SparseWeight) -> None:
    step, end = _step(wrapper), wrapper.schedule.end_step
    mask = keras.ops.convert_to_numpy(weight.state["mask"])
    state = "dense" if mask.all() else f"at {(mask == 0).mean():.2%} zeros"
    is_last = None not in (step, end) and step >= end
    if is_last:
        consequence = (
            f"This was the last update of its schedule: it stays {state}"
        )
    elif end is None:
        consequence = f"It stays {state} until an update has different scores"
    else:
        consequence = (
            f"It stays {state} until an update has different scores; the last "
            f"update of its schedule is at step {end}"
        )
    _warn(
        wrapper,
        weight,
        "undecided at the end" if is_last else "undecided",
        f"The scores of {weight.path}{_at_step(step)} are all equal: "
        f"{type(wrapper).__name__} has no order in which to prune them. "
        f"{consequence}. Begin to prune later (`begin_step`), when training "
        "has made the elements different, or use an initializer other than a "
        "constant.",
    )


def _at_step(step: int | None) -> str:
    return "" if step is None else f" at step {step}"


def _step(wrapper: SparseWrapper) -> int | None:
    counter = wrapper.step_counter
    return int(counter.step) if counter.bound else None


def _warn(
    wrapper: SparseWrapper, weight: SparseWeight, kind: str, message: str
) -> None:
    """Warns once per run; a step that is not later belongs to a new run."""
    step = _step(wrapper)
    steps = _warning_steps.setdefault(wrapper, {})
    key = (weight.path, kind)
    if key in steps:
        last = steps[key]
        if step is None or (last is not None and step > last):
            return
    steps[key] = step
    warnings.warn(message, stacklevel=3)
