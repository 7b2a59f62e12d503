"""Chooses the weights of a layer to make sparse, and names them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from sos import keras_compat
from sos.errors import UsageError

# Layers whose weights all stay dense, and the reasons.
_REASONS = {
    keras.layers.PReLU: "PReLU slope",
    keras.layers.RMSNormalization: "norm",
    # The SavedModel reads other variables, of which these are copies.
    keras.layers.TFSMLayer: "read by its SavedModel",
}


def why_dense(variable: keras.Variable) -> str | None:
    """Returns why a weight stays dense by default, None if it does not."""
    if len(variable.shape) < 2:
        return f"rank {len(variable.shape)}"
    # Biases of attention and GRU, and norms over several axes, have rank 2.
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
    """Returns why weights of a model stay dense by default.

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
    """Returns the path of a weight in the report of a model.

    It does not begin with the model's name, which Keras prepends for some kinds
    of models only, and may generate.

    Args:
        model: The model.
        variable: The weight.
    """
    return variable.path.removeprefix(f"{model.name}/")


def check_expression(expression: Any, role: str) -> None:
    """Checks a regular expression on paths of weights.

    Args:
        expression: The expression.
        role: Its role for the message, such as "a key of `rules`".

    Raises:
        UsageError: If it is not a regular expression.
    """
    try:
        if not isinstance(expression, str):
            raise TypeError("not a string")
        re.compile(expression)
    except (re.error, TypeError) as error:
        raise UsageError(
            f"Expected a regular expression on weight paths as {role} "
            f"({error}). Received: {expression!r}"
        ) from error


def matches(expression: str, path: str) -> bool:
    """Returns whether an expression matches a part of a weight's path.

    Args:
        expression: A regular expression.
        path: Path from `path_in`.
    """
    return re.search(expression, path) is not None


def check_include(include: Any) -> list[str] | None:
    """Checks the argument `include` of a technique.

    Args:
        include: One or several regular expressions, or None.

    Returns:
        A list of regular expressions, or None.

    Raises:
        UsageError: If `include` has another value.
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
        available: Weights to choose from, by their position in the layer.
        include: Regular expressions on their paths; None for all weights
            without a reason to stay dense.
        reasons: Reasons from `dense_reasons`.

    Returns:
        Paths of the chosen weights by position.

    Raises:
        UsageError: If no weight is chosen, or an expression matches none.
    """
    available = {
        index: variable
        for index, variable in available.items()
        if tf.as_dtype(
            keras.backend.standardize_dtype(variable.dtype)
        ).is_floating
    }
    if include is None:
        indices = {i for i, v in available.items() if id(v) not in reasons}
        if not indices:
            _fail("has rank 2 or more and is not a bias", available, include)
    else:
        indices = set()
        for pattern in include:
            hits = {i for i, v in available.items() if _included(pattern, v)}
            if not hits:
                _fail(f"matches {pattern!r}", available, include)
            indices |= hits
    return unique({index: available[index].path for index in sorted(indices)})


def _included(expression: str, variable: keras.Variable) -> bool:
    # The path may begin with the name of a model that is unknown here. The
    # report omits it.
    forms = (variable.path, variable.path.partition("/")[2])
    return any(matches(expression, path) for path in forms)


def unique(paths: Mapping[int, str]) -> dict[int, str]:
    """Makes paths unique, as noise depends on them.

    Args:
        paths: Paths of weights by any keys.

    Returns:
        The paths by key; `#2`, `#3` and so on are appended to repeated ones.
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
    """Returns the shortest end of a weight's path that is unique.

    It has no numbers of names that Keras generates: they depend on the layers
    created before in the process, and checkpoints must not.

    Args:
        variable: The weight.
        variables: All weights of the technique, including this one.

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
    condition: str,
    available: Mapping[int, keras.Variable],
    include: Sequence[str] | None,
) -> None:
    paths = [f"{v.path} {tuple(v.shape)}" for v in available.values()]
    raise UsageError(
        "none of its trainable weights that are not sparse already "
        f"{condition}. "
        f"These weights: {paths}. Received: include={include!r}"
    )


def _without_numbers(path: str) -> list[str]:
    return [re.sub(r"_\d+$", "", part) for part in path.split("/")]
