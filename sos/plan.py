"""Decides what becomes of every weight of a model, before anything is made."""

import functools
import re
from collections.abc import Mapping
from typing import Any

import keras

from sos.registry import get_technique
from sos.schedules import as_schedule
from sos.wrappers.base import SparseWrapper
from sos.wrappers.masked import PruningWrapper
from sos.wrappers.selection import unique, why_dense

Rule = None | type | str | Mapping[str, Any]


class Notes:
    """Why weights of a sparsified model are as they are, by variable.

    A plain object, so that Keras neither tracks nor saves it.
    """

    def __init__(self) -> None:
        self._notes: dict[int, str] = {}

    def add(self, variable: keras.Variable, note: str) -> None:
        """Notes something about a weight."""
        self._notes[id(variable)] = note

    def get(self, variable: keras.Variable) -> str | None:
        """What was noted about a weight."""
        return self._notes.get(id(variable))


class Job:
    """One wrapper to be put around a layer."""

    def __init__(self, technique: type, settings: dict[str, Any]) -> None:
        self.technique = technique
        self.settings = settings
        self.paths: dict[int, str] = {}

    def wrap(self, layer: keras.layers.Layer) -> SparseWrapper:
        """Puts the wrapper around a layer."""
        return self.technique(layer, paths=self.paths, **self.settings)


def make_plan(
    model: keras.Model,
    technique: type | str | None,
    rules: Mapping[str, Rule],
    settings: dict[str, Any],
) -> tuple[dict[int, list[Job]], Notes]:
    """Decides what becomes of every weight, before anything is made."""
    if not isinstance(rules, Mapping):
        raise TypeError(
            "`rules` must be a dictionary from regular expressions on weight "
            f"paths to what is to be different. Received: rules={rules!r}"
        )
    default = _resolve(technique, settings, {}) if technique else None
    if technique is None and settings:
        raise TypeError(
            "Settings were given without a technique that could take them. "
            f"Received: technique=None, settings={sorted(settings)}"
        )
    resolved = {
        pattern: _resolve_rule(pattern, rule, technique, settings)
        for pattern, rule in rules.items()
    }
    notes = Notes()
    plan: dict[int, list[Job]] = {}
    used: dict[str, list[str]] = {pattern: [] for pattern in rules}
    eligible: list[str] = []
    chosen: list[tuple[Job, int, int]] = []
    owners: dict[int, keras.layers.Layer] = {}
    for layer in leaves(model):
        trainable = {id(v) for v in layer.trainable_weights}
        jobs: dict[int, Job] = {}
        for index, variable in enumerate(layer.weights):
            owner = owners.setdefault(id(variable), layer)
            if owner is not layer:
                raise ValueError(
                    f"The layers {owner.name!r} and {layer.name!r} share the "
                    f"weight {variable.path!r}, which copies or wrappers of "
                    "two layers could not. Use one layer object in both "
                    "places, or a subclassed model, which is wrapped as a "
                    "whole."
                )
            reason = why_dense(variable)
            if id(variable) not in trainable:
                reason = "not trainable"
            if reason is not None:
                notes.add(variable, reason)
                continue
            # Without the model's own name, which Keras may have made up.
            path = variable.path.removeprefix(f"{model.name}/")
            eligible.append(path)
            matches = [p for p in rules if re.search(p, path)]
            if len(matches) > 1:
                raise ValueError(
                    f"More than one rule matches the weight {path!r}: "
                    f"{matches}. Make the regular expressions narrower."
                )
            choice = default
            if matches:
                used[matches[0]].append(path)
                choice = resolved[matches[0]]
            if choice is None:
                because = f"rule {matches[0]!r}" if matches else "no rule"
                notes.add(variable, f"left dense by {because}")
                continue
            # Weights of one layer that share settings share a wrapper.
            job = jobs.setdefault(id(choice), Job(*choice))
            chosen.append((job, index, len(eligible) - 1))
            if layer is model or not _is_keras_layer(layer):
                notes.add(
                    variable, f"{type(layer).__name__} wrapped as a whole"
                )
        if jobs:
            plan[id(layer)] = list(jobs.values())
    # Two nested models may hold layers of equal names.
    names = unique(dict(enumerate(eligible)))
    for job, index, place in chosen:
        job.paths[index] = names[place]
    for pattern, paths in used.items():
        if not paths:
            raise ValueError(
                f"The rule {pattern!r} matches none of the trainable weights "
                f"of rank 2 or more, which are: {eligible}"
            )
    if not plan:
        raise ValueError(
            f"Nothing in the model {model.name!r} is left to make sparse. "
            f"Its trainable weights of rank 2 or more: {eligible}. "
            f"Received: technique={technique!r}, rules={dict(rules)!r}"
        )
    return plan, notes


def _resolve_rule(
    pattern: str,
    rule: Rule,
    technique: type | str | None,
    settings: dict[str, Any],
) -> tuple[type, dict[str, Any]] | None:
    """What a rule says in full: a technique and all its settings."""
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(
            "The keys of `rules` must be regular expressions on weight paths "
            f"({error}). Received: {pattern!r}"
        ) from error
    if rule is None:
        return None
    own: dict[str, Any] = {}
    if isinstance(rule, Mapping):
        own = dict(rule)
        rule = own.pop("technique", technique)
        if rule is None:
            raise ValueError(
                f"The rule {pattern!r} changes settings, but no technique is "
                "given: add the key 'technique'. "
                f"Received: {own!r}"
            )
    if not isinstance(rule, str | type):
        raise TypeError(
            f"The rule {pattern!r} must be None, a technique or its name, or a "
            f"dictionary of settings. Received: {rule!r}"
        )
    inherits = technique is not None and (
        get_technique(rule) is get_technique(technique)
    )
    return _resolve(rule, settings if inherits else {}, own)


def _resolve(
    technique: type | str, settings: dict[str, Any], own: dict[str, Any]
) -> tuple[type, dict[str, Any]]:
    technique = get_technique(technique)
    full = {**settings, **own}
    if issubclass(technique, PruningWrapper):
        if "schedule" in full:
            # One object for all layers, so that it is asked once a step.
            full["schedule"] = as_schedule(full["schedule"])
        sparsity = full.pop("sparsity", None)
        if sparsity is not None:
            if "schedule" not in full:
                raise TypeError(
                    "A `sparsity` needs a `schedule` whose final sparsity it "
                    f"replaces. Received: {full | {'sparsity': sparsity}!r}"
                )
            full["schedule"] = full["schedule"].with_sparsity(sparsity)
    reserved = {"include", "paths", "name"} & set(full)
    if reserved:
        raise TypeError(
            "In a whole model, `rules` choose the weights, and layers keep "
            f"their names. Received: {sorted(reserved)}"
        )
    # Wrong settings are found here, before anything is made. The layer has a
    # name, so as not to use up one of Keras's automatic names.
    technique(keras.layers.Dense(1, name="check"), **full)
    return technique, full


@functools.cache
def _functional_class() -> type:
    # Keras does not export the class of functional models.
    inputs = keras.Input((1,), name="check_input")
    return type(keras.Model(inputs, inputs, name="check"))


def can_take_apart(layer: Any) -> bool:
    """Whether a model is a list or graph of layers and nothing else."""
    return any(
        isinstance(layer, cls) and type(layer).call is cls.call
        for cls in (keras.Sequential, _functional_class())
    )


def _is_keras_layer(layer: keras.layers.Layer) -> bool:
    return type(layer).__module__.split(".")[0] == "keras"


def leaves(model: keras.Model) -> list[keras.layers.Layer]:
    """The layers that are wrapped one by one, each once, in order."""
    if not can_take_apart(model):
        return [model]
    found: dict[int, keras.layers.Layer] = {}
    for layer in model.layers:
        for leaf in leaves(layer) if can_take_apart(layer) else [layer]:
            found[id(leaf)] = leaf
    return list(found.values())
