"""Signatures of training steps: equal ones are traced to the same function.

A signature covers all of a model and its optimizer that becomes a constant of
a traced step. Anything unknown, such as the arguments of a layer without a
configuration, differs from everything.
"""

import inspect
import itertools
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from sos.keras_compat import all_layers
from sos.training.checkpoints import canonical_path, variable_specs
from sos.training.optimizers import traced_config
from sos.wrappers.base import SparseWrapper
from sos.wrappers.sparse_layer import (
    SparseLayer,
    graph_classes,
    plain_class,
)


class _Unknown:
    """A value that differs from all others, unknown ones included."""

    def __repr__(self) -> str:
        return "unknown"


def compile_signature(
    model: keras.Model, optimizer: keras.optimizers.Optimizer
) -> dict[str, Any]:
    """Returns all constants of a traced step, by name.

    Args:
        model: A built model.
        optimizer: Its optimizer, built.

    Returns:
        Nested values, to be compared with `sos.training.checkpoints.diff`.
    """
    return {
        "variables": variable_specs(model, optimizer),
        "trainable": {
            f"{index} {canonical_path(variable.path)}": variable.trainable
            for index, variable in enumerate(model.variables)
        },
        "optimizer": _optimizer_properties(optimizer),
        "layers": {
            str(index): _layer_properties(layer)
            for index, layer in enumerate(all_layers(model))
        },
    }


def _optimizer_properties(
    optimizer: keras.optimizers.Optimizer,
) -> dict[str, Any]:
    properties: dict[str, Any] = {"class": type(optimizer)}
    try:
        config = traced_config(optimizer)
    except NotImplementedError:
        # A user's learning-rate schedule may have no configuration.
        config = None
    if config is None or not _is_complete(config, optimizer):
        return {**properties, "config": _Unknown()}
    ignored = set()
    if isinstance(config.get("learning_rate"), float):
        # It is a variable then, and not a schedule.
        ignored.add("learning_rate")
    return {**properties, **_plain(config, ignored)}


def _layer_properties(layer: keras.layers.Layer) -> dict[str, Any]:
    properties: dict[str, Any] = {"class": type(layer)}
    try:
        config = layer.get_config()
    except Exception:
        # A user's layer may have no configuration.
        config = None
    if config is None or not _is_complete(config, layer):
        return {**properties, "config": _Unknown()}
    ignored = set()
    if isinstance(layer, keras.layers.Wrapper | SparseWrapper):
        # Wrapped layers are compared by themselves.
        ignored.add("layer")
    if isinstance(layer, SparseLayer):
        # So are techniques.
        ignored.add("sparse")
    if isinstance(layer, SparseWrapper):
        # Schedules are not traced, and some hyperparameters are variables.
        ignored |= {
            "schedule",
            "ranking",
            *layer.hyperparameter_variables.values(),
        }
    if not _is_users(plain_class(layer)):
        # A seed in a variable. A user's layer may have traced it.
        ignored.add("seed")
    if _is_graph(layer, config):
        config = {**config, **_graph(layer, config)}
    return {**properties, **_plain(config, ignored)}


def _is_only_a_graph(cls: type) -> bool:
    return any(
        issubclass(cls, base) and cls.call is base.call
        for base in graph_classes()
    )


def _is_users(cls: type) -> bool:
    return cls.__module__.split(".")[0] not in ("keras", "sos")


def _is_complete(config: Mapping[str, Any], instance: Any) -> bool:
    """Returns whether a configuration has all arguments of the constructor.

    It lacks some where a user's class inherits `get_config` from one of
    Keras's.
    """
    arguments = set()
    for cls in itertools.takewhile(_is_users, plain_class(instance).__mro__):
        if "__init__" in vars(cls):
            arguments |= {
                parameter.name
                for parameter in inspect.signature(cls).parameters.values()
                if parameter.kind
                not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            }
    if _is_graph(instance, config):
        # These arguments follow from its layers.
        arguments -= {"inputs", "outputs"}
    return arguments <= set(config)


def _is_graph(instance: Any, config: Mapping[str, Any]) -> bool:
    """Returns whether a configuration lists the operations of a model."""
    operations = config.get("layers")
    return (
        _is_only_a_graph(plain_class(instance))
        and isinstance(operations, list)
        and all(
            isinstance(operation, dict) and "class_name" in operation
            for operation in operations
        )
    )


def _graph(model: keras.Model, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns how a model connects its operations, without their names.

    It has the configurations of operations that are no layers, such as a
    product with a number. Those of layers are compared layer by layer.
    """
    layers = {layer.name for layer in model.layers}
    operations = config["layers"]
    indices = {
        operation["name"]: index
        for index, operation in enumerate(operations)
        if "name" in operation
    }
    return {
        "layers": [
            {
                "class": operation["class_name"],
                "config": (
                    {}
                    if operation["config"].get("name") in layers
                    else operation["config"]
                ),
                "nodes": _renamed(operation.get("inbound_nodes"), indices),
            }
            for operation in operations
        ],
        "input_layers": _renamed(config.get("input_layers"), indices),
        "output_layers": _renamed(config.get("output_layers"), indices),
    }


def _renamed(config: Any, names: Mapping[str, Any]) -> Any:
    """Replaces names in a nested configuration."""
    if isinstance(config, (list, tuple)):
        return [_renamed(value, names) for value in config]
    if isinstance(config, dict):
        return {key: _renamed(value, names) for key, value in config.items()}
    return names.get(config, config) if isinstance(config, str) else config


def _plain(config: Any, ignored: set[str]) -> Any:
    """Removes from a nested configuration all that is not traced.

    These are initializers, the ignored entries, and the numbers in names, which
    Keras counts through all of a process.
    """
    if isinstance(config, (list, tuple)):
        return [_plain(value, ignored) for value in config]
    if isinstance(config, np.ndarray):
        return config.tolist()
    if not isinstance(config, dict):
        return config
    return {
        key: (
            canonical_path(value)
            if key == "name" and isinstance(value, str)
            else _plain(value, ignored)
        )
        for key, value in config.items()
        if key not in ignored and not str(key).endswith("initializer")
    }
