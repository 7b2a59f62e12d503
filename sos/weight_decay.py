"""Excludes the variables of techniques from weight decay.

Decay would pull log sigma^2 and log alpha to zero, which removes weights even
without a penalty.
"""

import keras

from sos import keras_compat
from sos.wrappers.base import find_wrappers


def technique_variables(model: keras.layers.Layer) -> list[keras.Variable]:
    """Returns the trainable variables that techniques add to a model.

    Examples are log alpha of L0 regularisation and log sigma^2 of variational
    dropout. A dense model has none.

    Args:
        model: A built model, with or without sparse layers.
    """
    return [
        variable
        for wrapper in find_wrappers(model)
        for weight in wrapper.sparse_weights
        for variable in weight.state.values()
        if variable.trainable
    ]


def exclude_techniques(
    model: keras.layers.Layer, optimizer: keras.optimizers.Optimizer
) -> None:
    """Excludes the variables of techniques from an optimizer's weight decay.

    Previous exclusions remain. Training steps that are traced already do not
    change.

    Args:
        model: A built model.
        optimizer: Its optimizer, built or not.
    """
    variables = technique_variables(model)
    for inner in keras_compat.inner_optimizers(optimizer) if variables else ():
        if has_decay(inner):
            keras_compat.exclude_from_weight_decay(inner, variables)


def decayed_techniques(
    model: keras.layers.Layer, optimizer: keras.optimizers.Optimizer
) -> list[keras.Variable]:
    """Returns the variables of techniques that an optimizer decays.

    Args:
        model: A built model.
        optimizer: Its optimizer.
    """
    return [
        variable
        for inner in keras_compat.inner_optimizers(optimizer)
        if has_decay(inner)
        for variable in technique_variables(model)
        if keras_compat.decays(inner, variable)
    ]


def has_decay(optimizer: keras.optimizers.Optimizer) -> bool:
    """Returns whether an optimizer decays weights."""
    # Muon has a second rate for the variables that it leaves to Adam.
    return any(
        getattr(optimizer, name, None)
        for name in ("weight_decay", "adam_weight_decay")
    )
