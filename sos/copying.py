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
    """Copies a model or layer with all its state.

    The copy has the class of the model, the values of all variables (including
    states of recurrent layers, which are in no list of Keras), the trainable
    flags of all layers and variables, and the assets, such as vocabularies. It
    is compiled only if the model is.

    Args:
        model: The model or layer, built.
        replace: Maps each layer of a Sequential or functional model to the
            layer to copy instead.

    Returns:
        The copy.

    Raises:
        TypeError: If a layer cannot be recreated from its configuration.
        UsageError: If the copy has other variables than the model, or its
            layers share other weights.
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
        if not _have_equal_sharing(source, new):
            # Layers that refer to each other: configurations lose that.
            try:
                new = copy.deepcopy(source)
            except (TypeError, ValueError) as error:
                raise UsageError(
                    f"The copy of {source.name!r} of class "
                    f"{_class_name(source)} would share other layers than the "
                    "model, and `copy.deepcopy` fails. Use `copy=False`, which "
                    f"makes the model itself sparse. ({error})"
                ) from error
    _copy_state(source, new)
    return new


def _enable_adapters(
    source: keras.layers.Layer, target: keras.layers.Layer
) -> None:
    """Enables LoRA in sublayers, which an outer configuration may omit."""
    layers = [plain_layers(source), plain_layers(target)]
    if len(layers[0]) == len(layers[1]):
        for old, new in zip(*layers, strict=True):
            keras_compat.copy_adapter(keras_compat.adapter(old), new)


def _have_equal_sharing(
    source: keras.layers.Layer, target: keras.layers.Layer
) -> bool:
    """Returns whether both models share the same layers and weights."""
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
    """Creates a built layer of the same class and configuration.

    Args:
        layer: The layer.
        replace: As for `copy_model`.
        copies: Existing copies by the `id` of the original layer; extended
            here. One layer may be called twice, or be part of two submodels.

    Returns:
        The copy, with weights of other values.
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
            # Safe, as nothing is read from a file. The function is replaced
            # because a serialised one loses its global variables.
            new = type(layer).from_config(config, safe_mode=False)
            new.function = layer.function
        else:
            new = type(layer).from_config(config)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ArgumentError(
            f"The layer {layer.name!r} of class {type(layer).__name__} cannot "
            "be copied. Give the class a `get_config` that returns the "
            "arguments of its `__init__`, or use `copy=False`, which makes the "
            f"model itself sparse. ({error})"
        ) from error
    # Not part of a configuration: Keras's own copies lose it.
    keras_compat.copy_remat_mode(layer, new)
    _copy_policies(layer, new)
    if not new.built and (build := layer.get_build_config()):
        new.build_from_config(build)
        new.built = True  # As Keras does when it loads a layer.
        _copy_policies(layer, new)
    # The graph of a model may also call sublayers directly.
    sublayers = [plain_layers(x) for x in (layer, new)]
    if len(sublayers[0]) == len(sublayers[1]):
        for old, sublayer in zip(*sublayers, strict=True):
            copies.setdefault(id(old), sublayer)
    copies[id(layer)] = new
    return new


def _copy_policies(
    source: keras.layers.Layer, target: keras.layers.Layer
) -> None:
    """Copies the dtype policies of a layer and its sublayers.

    Models, and sublayers that a layer creates, get the default policy of the
    moment. It must be set before variables are created.
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
    """Creates a Sequential or functional model of copied layers."""

    def clone(operation: keras.Operation) -> keras.Operation:
        if not isinstance(operation, keras.layers.Layer):
            return operation.__class__.from_config(operation.get_config())
        return _clone(replace(operation), replace, copies)

    inputs = None
    if not isinstance(model, keras.Sequential):
        # Keras would give unnamed inputs new names.
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
    """Copies all state between two models of the same configuration."""
    layers = [_layers_with_state(source), _layers_with_state(target)]
    classes = [[_class_name(layer) for layer in part] for part in layers]
    if classes[0] != classes[1] or not _have_equal_sharing(source, target):
        raise UsageError(
            f"The copy of {source.name!r} of class {_class_name(source)} has "
            "other layers than the model, or they share other weights. Its "
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
    # From the outside in: setting it on a layer sets it on its sublayers.
    all_layers = [plain_layers(source), plain_layers(target)]
    if len(all_layers[0]) != len(all_layers[1]):
        all_layers = layers
    for old, new in zip(*all_layers, strict=True):
        if new.trainable != old.trainable:
            new.trainable = old.trainable
    for old, new in zip(*layers, strict=True):
        for before, after in zip(_variables(old), _variables(new), strict=True):
            if after.trainable != before.trainable:
                after.trainable = before.trainable


def _layers_with_state(
    layer: keras.layers.Layer,
) -> list[keras.layers.Layer]:
    """Returns the layers that hold variables or assets.

    Others need not correspond in a copy: preprocessing layers may create
    sublayers when they are first called.
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
    """Copies state that a layer's class saves and loads by its own methods.

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
            "may lack a `build` method. Use `copy=False`, which makes the "
            "model itself sparse. "
            f"Expected: {[_kind(v) for v in before]}. "
            f"Received: {[_kind(v) for v in after]}"
        )


def _variables(layer: keras.layers.Layer) -> list[keras.Variable]:
    """Returns a layer's variables, including those that no list holds."""
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
