"""Chooses the technique of each weight of a model."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from sos import arguments, keras_compat
from sos.errors import ArgumentError, UsageError
from sos.registry import get_technique
from sos.wrappers import selection
from sos.wrappers.base import LAYER_ARGUMENTS, SparseWrapper
from sos.wrappers.selection import dense_reasons
from sos.wrappers.sparse_layer import owners, plain_weights

Rule = None | type | str | Mapping[str, Any]
# A regular expression on paths, a layer or a weight.
Key = str | keras.layers.Layer | keras.Variable
Rules = Mapping[Key, Rule] | Sequence[tuple[Key, Rule]]

# A technique and the arguments of its constructor.
Choice = tuple[type, dict[str, Any]]


class Reasons:
    """Reasons why weights of a sparse model stay dense, by variable.

    It is not a dictionary, which Keras would track and save.
    """

    def __init__(self) -> None:
        self._reasons: dict[int, str] = {}

    def add(self, variable: keras.Variable, reason: str) -> None:
        """Sets the reason of a weight."""
        self._reasons[id(variable)] = reason

    def get(self, variable: keras.Variable) -> str | None:
        """Returns the reason of a weight, None if it has none."""
        return self._reasons.get(id(variable))


@dataclasses.dataclass
class Assignment:
    """A technique for one or several weights of a layer.

    Attributes:
        technique: The class of the technique.
        arguments: Arguments of its constructor.
        paths: Paths of the weights by their position in `sparse_layer.owners`
            of the model.
    """

    technique: type
    arguments: dict[str, Any]
    paths: dict[int, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Weight:
    """A weight that a technique can make sparse.

    Attributes:
        owner: The layer that owns it.
        variable: The weight.
        path: Its path as the report prints it.
    """

    owner: keras.layers.Layer
    variable: keras.Variable
    path: str


def make_plan(
    model: keras.Model,
    technique: type | str | None,
    rules: Rules | None,
    hyperparameters: dict[str, Any],
) -> tuple[list[Assignment], Reasons]:
    """Chooses a technique, or a reason to stay dense, for every weight.

    Args:
        model: The model.
        technique: As for `sparsify`.
        rules: As for `sparsify`.
        hyperparameters: As for `sparsify`.

    Returns:
        The assignments, and the reasons of the weights that stay dense.

    Raises:
        UsageError: If a value is invalid, or rules do not fit the model.
        TypeError: If an argument is unknown, missing or of a wrong type.
    """
    pairs = _as_pairs(model, rules)
    if technique is None and hyperparameters:
        raise ArgumentError(
            "Hyperparameters need a `technique`. Received: technique=None, "
            f"{arguments.format_arguments(hyperparameters)}"
        )
    default = None
    if technique is not None:
        default = _resolve(technique, hyperparameters, {})
    choices = [
        _resolve_rule(_shown(model, key), rule, technique, hyperparameters)
        for key, rule in pairs
    ]
    weights, reasons = _eligible_weights(model)
    matches = _match(model, [key for key, _ in pairs], weights, reasons)
    choice_of = {}
    for position, weight in weights.items():
        index = matches.get(position)
        choice = default if index is None else choices[index]
        if choice is None:
            rule = "no rule"
            if index is not None:
                rule = f"rule {_shown(model, pairs[index][0])}"
            reasons.add(weight.variable, f"left dense by {rule}")
        else:
            choice_of[position] = choice
    if not choice_of:
        shown = ", ".join(f"{_shown(model, key)}: {r!r}" for key, r in pairs)
        name = getattr(technique, "__name__", technique)
        raise UsageError(
            f"Nothing in the model {model.name!r} is left to make sparse. "
            "Its trainable weights of rank 2 or more: "
            f"{[weight.path for weight in weights.values()]}. "
            f"Received: technique={name}, rules={{{shown}}}"
        )
    return _assign(weights, choice_of), reasons


def _eligible_weights(
    model: keras.Model,
) -> tuple[dict[int, _Weight], Reasons]:
    """Returns the weights that can be sparse, and reasons for the others.

    The keys are positions in `sparse_layer.owners` of the model.
    """
    weights = {}
    dense = Reasons()
    reasons = dense_reasons(model)
    can_be_sparse = selection.eligible(model)
    for position, (owner, variable) in enumerate(owners(model)):
        reason = reasons.get(id(variable))
        if id(variable) not in can_be_sparse:
            reason = "not trainable"
        if reason is not None:
            dense.add(variable, reason)
            continue
        path = selection.path_in(model, variable)
        weights[position] = _Weight(owner, variable, path)
    return weights, dense


def _match(
    model: keras.Model,
    keys: list[Key],
    weights: dict[int, _Weight],
    reasons: Reasons,
) -> dict[int, int]:
    """Returns the index of the key that matches each weight, by position.

    Raises:
        UsageError: If a key matches no weight, or two keys match one weight.
    """
    matches: dict[int, int] = {}
    for index, key in enumerate(keys):
        positions = _positions(model, key, weights)
        if not positions:
            _raise_unmatched(model, key, weights, reasons)
        for position in positions:
            if position in matches:
                twice = [
                    _shown(model, keys[matches[position]]),
                    _shown(model, key),
                ]
                raise UsageError(
                    "More than one rule matches the weight "
                    f"{weights[position].path!r}: {', '.join(twice)}. Make the "
                    "keys of `rules` narrower."
                )
            matches[position] = index
    return matches


def _positions(
    model: keras.Model, key: Key, weights: dict[int, _Weight]
) -> list[int]:
    """Returns the positions of the weights that a key matches."""
    if isinstance(key, str):
        return [
            position
            for position, weight in weights.items()
            if selection.matches(key, weight.path)
        ]
    if isinstance(key, keras.Variable):
        variables = {id(key)}
    else:
        # A layer of another model may share weights with this one.
        if not any(key is layer for layer in keras_compat.all_layers(model)):
            return []
        variables = {id(variable) for variable in plain_weights(key)}
    return [
        position
        for position, weight in weights.items()
        if id(weight.variable) in variables
    ]


def _raise_unmatched(
    model: keras.Model,
    key: Key,
    weights: dict[int, _Weight],
    reasons: Reasons,
) -> None:
    shown = _shown(model, key)
    paths = [weight.path for weight in weights.values()]
    valid = f"the trainable weights of rank 2 or more, which are: {paths}"
    if isinstance(key, str):
        raise UsageError(f"The rule {shown} matches none of {valid}")
    is_layer = isinstance(key, keras.layers.Layer)
    parts = (
        keras_compat.all_layers(model)
        if is_layer
        else [variable for _, variable in owners(model)]
    )
    if not any(key is part for part in parts):
        example = "`model.get_layer(name)`" if is_layer else "`layer.kernel`"
        raise UsageError(
            f"The key of a rule must be part of the model {model.name!r} "
            f"itself, such as {example}; that of a copy, or of another model, "
            f"is not. Received: {shown}"
        )
    if is_layer:
        raise UsageError(f"The rule {shown} contains none of {valid}")
    raise UsageError(
        f"The rule {shown} is for a weight that stays dense "
        f"({reasons.get(key)}). Choose from {valid}"
    )


def _assign(
    weights: dict[int, _Weight], choices: dict[int, Choice]
) -> list[Assignment]:
    """Groups the choices of weights, by position, into assignments."""
    # Nested models may have layers of equal names.
    paths = selection.unique({i: w.path for i, w in weights.items()})
    assignments: dict[tuple[int, int], Assignment] = {}
    for position, choice in choices.items():
        # Weights of one layer with the same rule share a technique.
        key = (id(weights[position].owner), id(choice))
        assignment = assignments.setdefault(key, Assignment(*choice))
        assignment.paths[position] = paths[position]
    return list(assignments.values())


def _as_pairs(
    model: keras.Model, rules: Rules | None
) -> list[tuple[Key, Rule]]:
    """Returns the rules of a mapping or sequence as pairs."""
    if rules is None:
        return []
    pairs = list(rules.items()) if _is_mapping(rules) else rules
    valid = isinstance(pairs, list | tuple) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs
    )
    if not valid:
        raise ArgumentError(
            "`rules` must be a dictionary from regular expressions on weight "
            "paths, or layers, to None, a technique or a dictionary of "
            "hyperparameters; or a list of such pairs, as in "
            '`[("embedding", None)]`, whose keys can also be variables. '
            f"Received: rules={rules!r}"
        )
    seen: list[Key] = []
    for key, _ in pairs:
        if not isinstance(key, str | keras.layers.Layer | keras.Variable):
            raise ArgumentError(
                "A key of `rules` must be a regular expression on weight "
                "paths, a layer or a variable of the model. "
                f"Received: {key!r} of type {type(key).__name__}"
            )
        if isinstance(key, str):
            selection.check_expression(key, "a key of `rules`")
        # Variables compare element by element.
        if any(
            key is other
            or (
                isinstance(key, str) and isinstance(other, str) and key == other
            )
            for other in seen
        ):
            raise UsageError(
                "Two rules must not have the same key. "
                f"Received twice: {_shown(model, key)}"
            )
        seen.append(key)
    return [(key, rule) for key, rule in pairs]


def _shown(model: keras.Model, key: Key) -> str:
    """Formats a key of `rules` for a message."""
    if isinstance(key, keras.layers.Layer):
        return f"layer {key.name!r}"
    if isinstance(key, keras.Variable):
        return f"variable {selection.path_in(model, key)!r}"
    return repr(key)


def _is_mapping(value: Any) -> bool:
    # A `ConfigDict` of ml_collections is not registered as a mapping.
    return isinstance(value, Mapping) or (
        hasattr(value, "keys") and hasattr(value, "items")
    )


def _resolve_rule(
    key: str,
    rule: Rule,
    technique: type | str | None,
    hyperparameters: dict[str, Any],
) -> Choice | None:
    """Returns the technique of a rule with all its arguments."""
    if rule is None:
        return None
    overrides: dict[str, Any] = {}
    if _is_mapping(rule):
        overrides = dict(rule.items())
        rule = overrides.pop("technique", technique)
        if rule is None and not overrides:
            return None
        if rule is None:
            raise UsageError(
                f"The rule {key} changes hyperparameters, but there is "
                "no technique: add the key 'technique'. "
                f"Received: {overrides!r}"
            )
    if not isinstance(rule, str | type):
        raise ArgumentError(
            f"The rule {key} must be None, a technique or its name, or a "
            f"dictionary of hyperparameters. Received: {rule!r}"
        )
    try:
        inherits = technique is not None and (
            get_technique(rule) is get_technique(technique)
        )
        return _resolve(rule, overrides, hyperparameters if inherits else {})
    except ArgumentError as error:
        raise ArgumentError(f"The rule {key}: {error}") from error
    except ValueError as error:
        raise UsageError(f"The rule {key}: {error}") from error


def _resolve(
    technique: type | str, values: dict[str, Any], inherited: dict[str, Any]
) -> Choice:
    """Turns hyperparameters into checked arguments of a technique."""
    technique = get_technique(technique)
    reserved = {"include", "paths", "name"} & set(values)
    if reserved:
        raise ArgumentError(
            "These arguments are for wrappers. In a model, use `rules` to "
            f"choose weights. Received: {sorted(reserved)}"
        )
    _check_names(technique, values)
    full = technique.resolve_hyperparameters(values, inherited)
    _check_complete(technique, full, {**inherited, **values})
    # The constructor checks the values before any layer changes. The name keeps
    # Keras's counter of automatic names unchanged.
    technique(keras.layers.Dense(1, name="check"), **full)
    return technique, full


def _check_names(technique: type, values: dict[str, Any]) -> None:
    """Raises an error if arguments are unknown."""
    known = technique.hyperparameters()
    objects = [
        name
        for name in arguments.defaults(technique, SparseWrapper)
        if name not in known and name not in LAYER_ARGUMENTS
    ]
    unknown = {
        name: value
        for name, value in values.items()
        if name not in (*known, *objects, *LAYER_ARGUMENTS)
    }
    if unknown:
        raise ArgumentError(
            f"{technique.__name__} has no hyperparameter "
            f"{arguments.format_names(unknown)}. "
            f"Valid hyperparameters: {list(known)}"
            + (f"; objects: {objects}" if objects else "")
            + f". Received: {arguments.format_arguments(unknown)}"
        )


def _check_complete(
    technique: type, full: dict[str, Any], received: dict[str, Any]
) -> None:
    """Raises an error if arguments without a default are missing."""
    missing = [
        name
        for name, default in arguments.defaults(
            technique, SparseWrapper
        ).items()
        if default is arguments.REQUIRED and name not in full
    ]
    if missing:
        raise ArgumentError(
            f"{technique.__name__} needs {arguments.format_names(missing)}. "
            f"Received: {arguments.format_arguments(received) or 'nothing'}"
        )
