"""Warnings about weights that lose their last element, or cannot be ranked.

The mask updates of the host and of a TPU call `after_update` with what they
found, so that both warn alike.
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

# What was warned of: by technique, the step of each warning by path and kind.
# Not in the technique, of which a copy is to warn again.
_warned: weakref.WeakKeyDictionary[
    SparseWrapper, dict[tuple[str, str], int | None]
] = weakref.WeakKeyDictionary()


def find_dead_weights(model: keras.layers.Layer) -> list[str]:
    """Returns the paths of the sparse weights that evaluate to zeros alone.

    It works for every technique: what counts is the evaluation weight. With a
    penalty that is too high, variational dropout and L0 lose whole weights too.

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
    """Warns if a mask update could not rank a weight, or nothing is left of it.

    Args:
        wrapper: The technique.
        weight: The weight whose mask was updated.
        sparsity: The sparsity that was asked for.
        undecided: Whether the weight kept its mask because scores are equal.
        any_left: Whether the mask keeps any element.
    """
    size = math.prod(weight.variable.shape)
    # A sparsity of 1 asks for nothing.
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
    kept: int,
    otherwise: str,
) -> None:
    """Warns that a weight keeps elements although its sparsity leaves none.

    Args:
        wrapper: The technique.
        weight: The weight.
        sparsity: The sparsity that was asked for.
        kept: The number of elements that it keeps.
        otherwise: The argument with which it keeps none.
    """
    size = math.prod(weight.variable.shape)
    _warn(
        wrapper,
        weight,
        "kept",
        f"A sparsity of {sparsity:.6g} leaves none of the {size} elements of "
        f"{weight.path}: it keeps {min(kept, size)}. Lower its sparsity, or "
        f"{_DENSE}. To prune all of it, pass {otherwise}.",
    )


def warn_of_zeros(wrapper: SparseWrapper, weight: SparseWeight) -> None:
    """Warns that a mask of zeros, which never changes, was made of zeros."""
    _warn(
        wrapper,
        weight,
        "zeros",
        f"All elements of {weight.path} were zero when "
        f"{type(wrapper).__name__} made its mask of them, so that it stays "
        "zero in training. Load the weights before the mask is made, or "
        f"{_DENSE}.",
    )


def _warn_empty(
    wrapper: "PruningWrapper", weight: SparseWeight, sparsity: float
) -> None:
    _warn(
        wrapper,
        weight,
        "empty",
        f"The mask update{_at(_step(wrapper))} left no element of "
        f"{weight.path} (sparsity {sparsity:.6g}). Its layer ignores its "
        "inputs now, and the gradient of a pruned element is zero. Lower its "
        f"sparsity, or {_DENSE}.",
    )


def _warn_undecided(wrapper: "PruningWrapper", weight: SparseWeight) -> None:
    step, end = _step(wrapper), wrapper.schedule.end_step
    mask = keras.ops.convert_to_numpy(weight.state["mask"])
    state = "dense" if mask.all() else f"at {(mask == 0).mean():.2%} zeros"
    ended = None not in (step, end) and step >= end
    if ended:
        future = (
            "This was the last update of its schedule, so that it stays "
            f"{state}"
        )
    elif end is None:
        future = f"It stays {state} until an update finds different scores"
    else:
        future = (
            f"It stays {state} until an update finds different scores, and for "
            f"the rest of training if none does up to step {end}, the last of "
            "its schedule"
        )
    _warn(
        wrapper,
        weight,
        "undecided at the end" if ended else "undecided",
        f"The scores of {weight.path}{_at(step)} are all equal, so that "
        f"{type(wrapper).__name__} has no order in which to prune them. "
        f"{future}. Begin to prune later (`begin_step`), when training has "
        "made its elements different, or use another initializer than "
        "one of constants.",
    )


def _at(step: int | None) -> str:
    return "" if step is None else f" at step {step}"


def _step(wrapper: SparseWrapper) -> int | None:
    counter = wrapper.step_counter
    return int(counter.step) if counter.bound else None


def _warn(
    wrapper: SparseWrapper, weight: SparseWeight, kind: str, message: str
) -> None:
    """Warns once in each run: steps that do not grow begin another one."""
    step = _step(wrapper)
    steps = _warned.setdefault(wrapper, {})
    key = (weight.path, kind)
    if key in steps:
        known = steps[key]
        if step is None or (known is not None and step > known):
            return
    steps[key] = step
    warnings.warn(message, stacklevel=3)
