"""Which weights of a layer are made sparse, and what they are called."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from sos import keras_compat
from sos.errors import UsageError

# Why all weights of some layers stay dense.
_REASONS = {
    keras.layers.PReLU: "PReLU slope",
    keras.layers.RMSNormalization: "norm",
    # It computes with variables of its own, of which these are copies.
    keras.layers.TFSMLayer: "read by its SavedModel",
}


def why_dense(variable: keras.Variable) -> str | None:
    """Why a weight is not made sparse by default, None if it is."""
    if len(variable.shape) < 2:
        return f"rank {len(variable.shape)}"
    # Attention and GRU have biases of rank 2, norms over several axes scales.
    vectors = {
        "bias": "bias",
        "beta": "norm",
        "gamma": "norm",
        "lora_kernel_a": "LoRA adapter",
        "lora_kernel_b": "LoRA adapter",
        "lora_embeddings_a": "LoRA adapter",
        "lora_embeddings_b": "LoRA adapter",
    }
    return vectors.get(variable.name)


def dense_reasons(layer: keras.layers.Layer) -> dict[int, str]:
    """Returns why weights of a model are not made sparse by default.

    Args:
        layer: A layer or model.

    Returns:
        The reasons by `id` of the weight.
    """
    reasons = {}
    for inner in keras_compat.all_layers(layer):
        for variable in keras_compat.own_variables(inner):
            reason = why_dense(variable)
            for cls, of_class in _REASONS.items():
                if reason is None and isinstance(inner, cls):
                    reason = of_class
            if reason is not None:
                reasons[id(variable)] = reason
    return reasons


def eligible(layer: keras.layers.Layer) -> set[int]:
    """Returns the `id` of each weight that a technique can make sparse.

    These are the trainable ones, and those that a LoRA adapter froze.
    """
    bases = [
        keras_compat.lora_base(inner)
        for inner in keras_compat.all_layers(layer)
        if inner.trainable
    ]
    return {
        id(variable)
        for variable in [*layer.trainable_weights, *bases]
        if variable is not None
    }


def path_in(model: keras.layers.Layer, variable: keras.Variable) -> str:
    """Returns the path of a weight as the report of a model prints it.

    The model's own name, which Keras may have made up, is left out: whether
    Keras puts it there depends on how the model was made.

    Args:
        model: The model.
        variable: The weight.
    """
    return variable.path.removeprefix(f"{model.name}/")


def check_expression(expression: Any, role: str) -> None:
    """Checks a regular expression on paths of weights.

    Args:
        expression: The expression.
        role: What it is, for the message, such as "a key of `rules`".

    Raises:
        UsageError: If it is not one.
    """
    try:
        if not isinstance(expression, str):
            raise TypeError("not a text")
        re.compile(expression)
    except (re.error, TypeError) as error:
        raise UsageError(
            f"Expected a regular expression on weight paths as {role} "
            f"({error}). Received: {expression!r}"
        ) from error


def matches(expression: str, path: str) -> bool:
    """Returns whether an expression is found anywhere in a weight's path.

    Args:
        expression: A regular expression.
        path: From `path_in`.
    """
    return re.search(expression, path) is not None


def check_include(include: Any) -> list[str] | None:
    """Checks the argument `include` of a technique.

    Args:
        include: None, a regular expression or several.

    Returns:
        None or a list of regular expressions.

    Raises:
        UsageError: If it is anything else.
    """
    if include is None:
        return None
    expressions = [include] if isinstance(include, str) else list(include)
    for expression in expressions:
        check_expression(expression, "`include`")
    return expressions


def choose(
    available: Mapping[int, keras.Variable],
    include: Sequence[str] | None,
    reasons: Mapping[int, str],
) -> dict[int, str]:
    """Chooses the weights to make sparse.

    Args:
        available: The weights to choose from, by their position in the layer.
        include: Regular expressions to search for in their paths; None for all
            that have no reason to stay dense.
        reasons: From `dense_reasons`.

    Returns:
        The paths of the chosen weights by position.

    Raises:
        UsageError: If nothing is chosen, or an expression matches nothing.
    """
    available = {
        index: variable
        for index, variable in available.items()
        if tf.as_dtype(
            keras.backend.standardize_dtype(variable.dtype)
        ).is_floating
    }
    if include is None:
        chosen = {i for i, v in available.items() if id(v) not in reasons}
        if not chosen:
            _fail("has rank 2 or more and is not a bias", available, include)
    else:
        chosen = set()
        for pattern in include:
            found = {i for i, v in available.items() if _included(pattern, v)}
            if not found:
                _fail(f"matches {pattern!r}", available, include)
            chosen |= found
    return unique({index: available[index].path for index in sorted(chosen)})


def _included(expression: str, variable: keras.Variable) -> bool:
    # The model that will hold the layer is not known yet: the path may begin
    # with its name, which the report leaves out.
    forms = (variable.path, variable.path.partition("/")[2])
    return any(matches(expression, path) for path in forms)


def unique(paths: Mapping[int, str]) -> dict[int, str]:
    """Tells equal paths apart by a number, as noise is a function of them.

    Args:
        paths: The paths of weights by any key.

    Returns:
        The same with `#2`, `#3` and so on behind what came before.
    """
    seen: dict[str, int] = {}
    result = {}
    for key, path in paths.items():
        seen[path] = seen.get(path, 0) + 1
        result[key] = path if seen[path] == 1 else f"{path}#{seen[path]}"
    return result


def short_name(
    variable: keras.Variable, variables: Sequence[keras.Variable]
) -> str:
    """The end of a weight's path that tells it from others.

    Without the numbers of names that Keras makes up: they count the layers made
    before in the process, and checkpoints must not depend on those.

    Args:
        variable: The weight.
        variables: All weights to tell apart, this one among them.

    Returns:
        Parts of the path, joined by underscores.
    """
    paths = [_without_numbers(other.path) for other in variables]
    own = _without_numbers(variable.path)
    for length in range(1, len(own) + 1):
        if sum(path[-length:] == own[-length:] for path in paths) == 1:
            return "_".join(own[-length:])
    position = [id(other) for other in variables].index(id(variable))
    return f"{'_'.join(own[-2:])}_{position}"


def _fail(
    what: str,
    available: Mapping[int, keras.Variable],
    include: Sequence[str] | None,
) -> None:
    paths = [f"{v.path} {tuple(v.shape)}" for v in available.values()]
    raise UsageError(
        f"none of its trainable weights that are not sparse already {what}. "
        f"These weights: {paths}. Received: include={include!r}"
    )


def _without_numbers(path: str) -> list[str]:
    return [re.sub(r"_\d+$", "", part) for part in path.split("/")]
