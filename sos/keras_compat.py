"""Everything private of Keras that `sos` uses; each name has a test."""

from collections.abc import Iterable, Sequence

import keras

# Weight decay of optimizers.


def inner_optimizers(
    optimizer: keras.optimizers.Optimizer,
) -> list[keras.optimizers.Optimizer]:
    """Returns the optimizers that update variables: itself, or those inside.

    Args:
        optimizer: Any optimizer, also one that scales the loss or gives
            variables to other optimizers. The latter knows them once built.
    """
    inner = getattr(optimizer, "inner_optimizer", None)
    if inner is not None:
        return inner_optimizers(inner)
    inner = getattr(optimizer, "optimizers", None)
    return [optimizer] if inner is None else list(inner)


def exclude_from_weight_decay(
    optimizer: keras.optimizers.Optimizer, variables: Iterable[keras.Variable]
) -> None:
    """Adds variables to those that an optimizer does not decay.

    Keras's method of that name forgets what was excluded before.

    Args:
        optimizer: An optimizer that updates variables itself.
        variables: The variables.
    """
    excluded = set(getattr(optimizer, "_exclude_from_weight_decay", ()))
    excluded |= {optimizer._var_key(variable) for variable in variables}
    optimizer._exclude_from_weight_decay = excluded
    optimizer._exclude_from_weight_decay_cache = {}


def decays(
    optimizer: keras.optimizers.Optimizer, variable: keras.Variable
) -> bool:
    """Returns whether weight decay, if there is any, acts on a variable.

    Args:
        optimizer: An optimizer that updates variables itself.
        variable: The variable.
    """
    return optimizer._use_weight_decay(variable.value)


def trained_variables(
    optimizer: keras.optimizers.Optimizer,
) -> Sequence[keras.Variable]:
    """Returns the variables that an optimizer was built with, in order."""
    return optimizer._trainable_variables
