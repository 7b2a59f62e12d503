"""Copies models and layers with all their state."""

import copy
import re
import tempfile
from collections.abc import Callable

import keras

from sos import keras_compat
from sos.errors import ArgumentError, UsageError
from sos.wrappers.sparse_layer import (
    SparseLayer,
    graph_classes,
    plain_class,
    plain_layers,
)

_Replace = Callable[[keras.layers.Layer], keras.layers.Layer]
_Copies = dict[int, keras.layers.Layer]


def copy_model(
    model: keras.layers.Layer, *, replace: _Replace = lambda layer: layer
) -> keras.layers.Layer:
    """Copies a model or layer.

    The copy has the model's class, and equal values in all variables, also in
    those that no list of Keras holds (states of recurrent layers); equal
    trainable flags of layers and of single variables; and equal assets, such as
    vocabularies. It is not compiled unless the model is.

    Args:
        model: The model or layer, built.
        replace: Returns the layer to copy in the place of a layer of a
            Sequential or functional model.

    Returns:
        The copy.

    Raises:
        TypeError: If a configuration does not make a layer again.
        UsageError: If the copy has other variables, or layers that share
            weights would not do so in the copy.
    """
    source = replace(model)
    classes = {
        type(layer).__name__: type(layer)
        for layer in keras_compat.all_layers(source)
        if not isinstance(layer, SparseLayer)
    }
    with keras.saving.custom_object_scope(classes):
        new = _clone(source, replace, {})
        _enable_adapters(source, new)
        if not _shares_alike(source, new):
            # Layers refer to each other. In a file, Keras keeps that.
            try:
                new = copy.deepcopy(source)
            except (TypeError, ValueError) as error:
                raise UsageError(
                    f"The copy of {source.name!r} of class "
                    f"{_class_name(source)} would not share layers as the "
                    "model does, and Keras cannot copy it either. Use "
                    "`copy=False`, which makes the model itself sparse. "
                    f"({error})"
                ) from error
    _copy_state(source, new)
    return new


def _enable_adapters(
    source: keras.layers.Layer, target: keras.layers.Layer
) -> None:
    """Enables LoRA where the configuration of a layer around does not tell."""
    layers = [plain_layers(source), plain_layers(target)]
    if len(layers[0]) == len(layers[1]):
        for old, new in zip(*layers, strict=True):
            keras_compat.copy_adapter(keras_compat.adapter(old), new)


def _shares_alike(
    source: keras.layers.Layer, target: keras.layers.Layer
) -> bool:
    """Returns whether layers and weights are shared in both models alike."""
    layers = [_layers_with_state(source), _layers_with_state(target)]
    if len(layers[0]) != len(layers[1]):
        return False
    pairs = [
        (id(old), id(new))
        for before, after in zip(*layers, strict=True)
        for old, new in zip(_variables(before), _variables(after), strict=False)
    ]
    return len(set(pairs)) == len({old for old, _ in pairs})


def _clone(
    layer: keras.layers.Layer, replace: _Replace, copies: _Copies
) -> keras.layers.Layer:
    """Makes a layer of the same class and configuration, built.

    Args:
        layer: The layer.
        replace: As for `copy_model`.
        copies: The copies that there are, by the `id` of the layer: one layer
            may be called twice, or be part of two submodels.
    """
    if id(layer) in copies:
        return copies[id(layer)]
    if type(layer) in graph_classes():
        new = _clone_graph(layer, replace, copies)
        _copy_policies(layer, new)
        copies[id(layer)] = new
        return new
    try:
        config = layer.get_config()
        if isinstance(layer, keras.layers.Lambda):
            # Nothing is read from a file, and what `get_config` made of the
            # function has lost its global variables.
            new = type(layer).from_config(config, safe_mode=False)
            new.function = layer.function
        else:
            new = type(layer).from_config(config)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ArgumentError(
            f"The layer {layer.name!r} of class {type(layer).__name__} cannot "
            "be copied. Give the class a `get_config` that holds the arguments "
            "of its `__init__`, or use `copy=False`, which makes the model "
            f"itself sparse. ({error})"
        ) from error
    # Not part of a configuration, so that Keras's own copies lose it.
    keras_compat.copy_remat_mode(layer, new)
    _copy_policies(layer, new)
    if not new.built and (build := layer.get_build_config()):
        new.build_from_config(build)
        new.built = True  # As Keras says when it loads a layer.
        _copy_policies(layer, new)
    # The graph may call a layer inside by itself.
    inside = [plain_layers(x) for x in (layer, new)]
    if len(inside[0]) == len(inside[1]):
        for old, copied in zip(*inside, strict=True):
            copies.setdefault(id(old), copied)
    copies[id(layer)] = new
    return new


def _copy_policies(
    source: keras.layers.Layer, target: keras.layers.Layer
) -> None:
    """Copies the dtype policies of a layer and of those inside.

    Layers that a layer makes itself, and models, have the policy that is the
    default where they are made. It must be right before variables are made.
    """
    layers = [plain_layers(source), plain_layers(target)]
    if [_class_name(x) for x in layers[0]] != [
        _class_name(x) for x in layers[1]
    ]:
        return  # Some of them are made when the layer is built.
    for old, new in zip(*layers, strict=True):
        if new.dtype_policy != old.dtype_policy:
            new.dtype_policy = old.dtype_policy


def _clone_graph(
    model: keras.Model, replace: _Replace, copies: _Copies
) -> keras.Model:
    """Makes a Sequential or functional model of copied layers."""

    def clone(operation: keras.Operation) -> keras.Operation:
        if not isinstance(operation, keras.layers.Layer):
            return operation.__class__.from_config(operation.get_config())
        return _clone(replace(operation), replace, copies)

    inputs = None
    if not isinstance(model, keras.Sequential):
        # Keras itself would give unnamed inputs new names.
        layers = {
            id(layer.output): layer
            for layer in model.layers
            if isinstance(layer, keras.layers.InputLayer)
        }
        inputs = keras.tree.map_structure(
            lambda x: clone(layers[id(x)]).output, model.input
        )
    return keras.models.clone_model(
        model, input_tensors=inputs, clone_function=clone
    )


def _copy_state(source: keras.layers.Layer, target: keras.layers.Layer) -> None:
    """Copies all state between two models of one configuration."""
    layers = [_layers_with_state(source), _layers_with_state(target)]
    classes = [[_class_name(layer) for layer in part] for part in layers]
    if classes[0] != classes[1] or not _shares_alike(source, target):
        raise UsageError(
            f"The copy of {source.name!r} of class {_class_name(source)} holds "
            "other layers, or shares other weights between them. Its "
            "`get_config` may lack an argument of its `__init__`. Use "
            "`copy=False`, which makes the model itself sparse. "
            f"Expected: {classes[0]}. Received: {classes[1]}"
        )
    for old, new in zip(*layers, strict=True):
        _check_variables(old, new)
    for old, new in zip(*layers, strict=True):
        _copy_through_files(old, new)
    for old, new in zip(*layers, strict=True):
        for before, after in zip(_variables(old), _variables(new), strict=True):
            after.assign(before)
    # From the outside in, as setting it on a layer sets it on all inside.
    all_layers = [plain_layers(source), plain_layers(target)]
    alike = len(all_layers[0]) == len(all_layers[1])
    for old, new in zip(*(all_layers if alike else layers), strict=True):
        if new.trainable != old.trainable:
            new.trainable = old.trainable
    for old, new in zip(*layers, strict=True):
        for before, after in zip(_variables(old), _variables(new), strict=True):
            if after.trainable != before.trainable:
                after.trainable = before.trainable


def _layers_with_state(
    layer: keras.layers.Layer,
) -> list[keras.layers.Layer]:
    """Returns the layers of which a copy copies more than a configuration.

    Preprocessing layers may make others when they are first called.
    """
    return [
        inner
        for inner in plain_layers(layer)
        if _variables(inner) or hasattr(inner, "load_assets")
    ]


def _class_name(layer: keras.layers.Layer) -> str:
    return plain_class(layer).__name__


def _copy_through_files(
    source: keras.layers.Layer, target: keras.layers.Layer
) -> None:
    """Copies what a layer saves and loads in a way of its own.

    Normalization derives tensors from its variables, and look-up layers keep
    vocabularies in files.
    """
    base = keras.layers.Layer
    cls = plain_class(source)
    if cls.load_own_variables is not base.load_own_variables:
        store: dict = {}
        source.save_own_variables(store)
        if store:
            target.load_own_variables(store)
    if hasattr(cls, "load_assets"):
        with tempfile.TemporaryDirectory() as directory:
            source.save_assets(directory)
            target.load_assets(directory)


def _check_variables(
    source: keras.layers.Layer, target: keras.layers.Layer
) -> None:
    before, after = _variables(source), _variables(target)
    # Auto-generated names end in numbers that differ between copies.
    if [_kind(v) for v in before] != [_kind(v) for v in after]:
        raise UsageError(
            f"The copy of the layer {source.name!r} of class "
            f"{_class_name(source)} has other variables than the layer. Its "
            "`get_config` may lack an argument of its `__init__`, or the class "
            "a `build`. Use `copy=False`, which makes the model itself sparse. "
            f"Expected: {[_kind(v) for v in before]}. "
            f"Received: {[_kind(v) for v in after]}"
        )


def _variables(layer: keras.layers.Layer) -> list[keras.Variable]:
    """Returns a layer's own variables, also those that are in no list."""
    variables = keras_compat.own_variables(layer)
    for value in vars(layer).values():
        if isinstance(value, keras.random.SeedGenerator):
            variables.append(value.state)
    states = getattr(layer, "states", None)
    if isinstance(layer, keras.layers.RNN) and states is not None:
        variables += [
            state
            for state in keras.tree.flatten(states)
            if isinstance(state, keras.Variable)
        ]
    return variables


def _kind(variable: keras.Variable) -> tuple:
    name = re.sub(r"_\d+$", "", variable.name)
    return name, tuple(variable.shape), variable.dtype
