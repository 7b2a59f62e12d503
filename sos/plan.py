"""Plans which weights of a model get which technique."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from sos import arguments
from sos.errors import ArgumentError, UsageError
from sos.registry import get_technique
from sos.wrappers import selection
from sos.wrappers.base import LAYER_ARGUMENTS, SparseWrapper
from sos.wrappers.selection import dense_reasons, unique
from sos.wrappers.sparse_layer import owners

Rule = None | type | str | Mapping[str, Any]
Rules = Mapping[str, Rule] | Sequence[tuple[str, Rule]]

# A technique and the arguments of its constructor.
Choice = tuple[type, dict[str, Any]]


class Reasons:
    """Why weights of a sparse model stay dense, by variable.

    A plain object, so that Keras neither tracks nor saves it.
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
    """One technique for weights of one layer.

    Attributes:
        technique: The class of the technique.
        arguments: The arguments of its constructor.
        paths: The paths of the weights by their position in
            `sparse_layer.owners` of the model.
    """

    technique: type
    arguments: dict[str, Any]
    paths: dict[int, str] = dataclasses.field(default_factory=dict)


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
        UsageError: If a value is invalid, or rules and model do not fit.
        TypeError: If an argument is unknown, missing or of a wrong type.
    """
    rules = _as_dict(rules)
    if technique is None and hyperparameters:
        raise ArgumentError(
            "Hyperparameters need a `technique`. Received: technique=None, "
            f"{arguments.received(hyperparameters)}"
        )
    default = None
    if technique is not None:
        default = _resolve(technique, hyperparameters, {})
    resolved = {
        pattern: _resolve_rule(pattern, rule, technique, hyperparameters)
        for pattern, rule in rules.items()
    }
    dense = Reasons()
    used: dict[str, list[str]] = {pattern: [] for pattern in rules}
    eligible: dict[int, str] = {}
    assignments: dict[tuple[int, int], Assignment] = {}
    reasons = dense_reasons(model)
    can_be_sparse = selection.eligible(model)
    for position, (owner, variable) in enumerate(owners(model)):
        reason = reasons.get(id(variable))
        if id(variable) not in can_be_sparse:
            reason = "not trainable"
        if reason is not None:
            dense.add(variable, reason)
            continue
        # Without the model's own name, which Keras may have made up.
        path = variable.path.removeprefix(f"{model.name}/")
        eligible[position] = path
        matches = [p for p in rules if re.search(p, path)]
        if len(matches) > 1:
            raise UsageError(
                f"More than one rule matches the weight {path!r}: "
                f"{matches}. Make the regular expressions narrower."
            )
        choice = default
        if matches:
            used[matches[0]].append(path)
            choice = resolved[matches[0]]
        if choice is None:
            rule = f"rule {matches[0]!r}" if matches else "no rule"
            dense.add(variable, f"left dense by {rule}")
            continue
        # Weights of one layer with the same rule share a technique.
        key = (id(owner), id(choice))
        assignment = assignments.setdefault(key, Assignment(*choice))
        assignment.paths[position] = path
    # Two nested models may hold layers of equal names.
    names = unique(eligible)
    for assignment in assignments.values():
        for position in assignment.paths:
            assignment.paths[position] = names[position]
    for pattern, paths in used.items():
        if not paths:
            raise UsageError(
                f"The rule {pattern!r} matches none of the trainable weights "
                f"of rank 2 or more, which are: {list(eligible.values())}"
            )
    if not assignments:
        raise UsageError(
            f"Nothing in the model {model.name!r} is left to make sparse. "
            "Its trainable weights of rank 2 or more: "
            f"{list(eligible.values())}. "
            f"Received: technique={technique!r}, rules={rules!r}"
        )
    return list(assignments.values()), dense


def _as_dict(rules: Rules | None) -> dict[str, Rule]:
    """Returns rules by pattern, of a mapping or of pairs."""
    if rules is None:
        return {}
    pairs = list(rules.items()) if _is_mapping(rules) else rules
    valid = isinstance(pairs, list | tuple) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs
    )
    if not valid:
        raise ArgumentError(
            "`rules` must be a dictionary from regular expressions on weight "
            "paths to None, a technique or a dictionary of hyperparameters, "
            'or a list of such pairs, as in `[("embedding", None)]`. '
            f"Received: rules={rules!r}"
        )
    patterns = [pattern for pattern, _ in pairs]
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise UsageError(
                "Rules must begin with regular expressions on weight paths "
                f"({error}). Received: {pattern!r}"
            ) from error
        if patterns.count(pattern) > 1:
            raise UsageError(
                "Each rule must have a regular expression of its own. "
                f"Received twice: {pattern!r}"
            )
    return dict(pairs)


def _is_mapping(value: Any) -> bool:
    # A `ConfigDict` of ml_collections is not registered as a mapping.
    return isinstance(value, Mapping) or (
        hasattr(value, "keys") and hasattr(value, "items")
    )


def _resolve_rule(
    pattern: str,
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
                f"The rule {pattern!r} changes hyperparameters, but there is "
                "no technique: add the key 'technique'. "
                f"Received: {overrides!r}"
            )
    if not isinstance(rule, str | type):
        raise ArgumentError(
            f"The rule {pattern!r} must be None, a technique or its name, or a "
            f"dictionary of hyperparameters. Received: {rule!r}"
        )
    try:
        inherits = technique is not None and (
            get_technique(rule) is get_technique(technique)
        )
        return _resolve(rule, overrides, hyperparameters if inherits else {})
    except ArgumentError as error:
        raise ArgumentError(f"The rule {pattern!r}: {error}") from error
    except ValueError as error:
        raise UsageError(f"The rule {pattern!r}: {error}") from error


def _resolve(
    technique: type | str, values: dict[str, Any], inherited: dict[str, Any]
) -> Choice:
    """Turns hyperparameters into checked arguments of a technique."""
    technique = get_technique(technique)
    reserved = {"include", "paths", "name"} & set(values)
    if reserved:
        raise ArgumentError(
            "In a whole model, `rules` choose the weights, and layers keep "
            f"their names. Received: {sorted(reserved)}"
        )
    _check_names(technique, values)
    full = technique.resolve_hyperparameters(values, inherited)
    _check_complete(technique, full, {**inherited, **values})
    # The constructor checks the values before a layer is changed. This layer
    # has a name, so as not to use up one of Keras's automatic names.
    technique(keras.layers.Dense(1, name="check"), **full)
    return technique, full


def _check_names(technique: type, values: dict[str, Any]) -> None:
    """Raises if arguments are unknown."""
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
            f"{arguments.quoted(unknown)}. "
            f"Valid hyperparameters: {list(known)}"
            + (f"; objects: {objects}" if objects else "")
            + f". Received: {arguments.received(unknown)}"
        )


def _check_complete(
    technique: type, full: dict[str, Any], received: dict[str, Any]
) -> None:
    """Raises if arguments without a default are missing."""
    missing = [
        name
        for name, default in arguments.defaults(
            technique, SparseWrapper
        ).items()
        if default is arguments.REQUIRED and name not in full
    ]
    if missing:
        raise ArgumentError(
            f"{technique.__name__} needs {arguments.quoted(missing)}. "
            f"Received: {arguments.received(received) or 'nothing'}"
        )
