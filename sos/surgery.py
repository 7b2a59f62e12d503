"""Makes whole models sparse, and plain again."""

import re
from collections.abc import Callable
from typing import Any

import keras

from sos.errors import ArgumentError, UsageError
from sos.plan import Notes, Rules, can_take_apart, make_plan
from sos.wrappers.base import SparseWrapper, core, find_wrappers

# What a model class may override to be trained in a way of its own.
_TRAINING_METHODS = (
    "train_step",
    "test_step",
    "predict_step",
    "compute_loss",
    "compute_metrics",
    "make_train_function",
    "make_test_function",
    "make_predict_function",
)


@keras.saving.register_keras_serializable(package="sos")
class SparseModel(keras.Model):
    """A model that could not be taken apart, wrapped as a whole.

    Args:
        wrapper: The sparse wrapper around the model.
        **kwargs: As for `keras.Model`.
    """

    def __init__(self, wrapper: SparseWrapper, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.wrapper = wrapper

    def call(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls the wrapped model; Keras hands on `training` by itself."""
        return self.wrapper(inputs, *args, **kwargs)

    def build(self, input_shape: Any = None) -> None:
        """Builds the wrapper; the wrapped model is built already."""
        if not self.wrapper.built:
            self.wrapper.build(input_shape)

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        """That of the wrapped model."""
        return self.wrapper.compute_output_spec(*args, **kwargs)

    def get_config(self) -> dict[str, Any]:
        """The model's configuration, which `from_config` takes."""
        wrapper = keras.saving.serialize_keras_object(self.wrapper)
        return {"name": self.name, "wrapper": wrapper}

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: Any = None
    ) -> "SparseModel":
        """Makes the model from its configuration."""
        config = dict(config)
        config["wrapper"] = keras.saving.deserialize_keras_object(
            config["wrapper"], custom_objects
        )
        return cls(**config)

    def get_build_config(self) -> dict[str, Any]:
        """That of the wrapper."""
        return self.wrapper.get_build_config()

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Builds the wrapper as it was built."""
        self.wrapper.build_from_config(config)
        if self.wrapper.built:
            self.build()


def sparsify(
    model: keras.Model,
    technique: type | str | None = None,
    *,
    rules: Rules | None = None,
    copy: bool = True,
    **hyperparameters: Any,
) -> keras.Model:
    """Makes the weights of a model sparse while it trains.

    All trainable weights of rank 2 or more, except biases, are made sparse with
    `technique` unless a rule says otherwise. In Sequential and functional
    models, nested ones too, the layers are wrapped one by one; a subclassed
    model is wrapped as a whole. `sos.sparsity_report` shows for every weight
    its technique, or why it stays dense.

    Technique, rules and hyperparameters can be plain names and numbers, so that
    a config holds them: `sos.sparsify(model, **config.sparsity)`.

    Args:
        model: A Keras 3 model that is built.
        technique: A registered technique or its name; None leaves all weights
            dense that no rule matches.
        rules: Exceptions, as a mapping or a sequence of pairs. The keys are
            regular expressions that are searched for in the paths of the
            weights, as the report prints them (without the name of the model in
            front). The values are None to leave the weights dense, a technique
            or its name, or a dictionary of hyperparameters, which may have the
            key `technique`. A rule inherits the hyperparameters that it does
            not change, unless it names another technique.
        copy: Whether the result gets copies of the layers and weights. If not,
            it shares them with `model`.
        **hyperparameters: Hyperparameters of the technique
            (`sos.hyperparameters` lists them), or objects that it takes in
            their place, such as `schedule`.

    Returns:
        A model like `model`, with the same weights, to compile and train with
        `sos.SparsityCallback` or `sos.Driver`.

    Raises:
        TypeError: If `model` is not a Keras 3 model or is trained by a
            `train_step` of its own, or if a hyperparameter is unknown, missing
            or excluded by another.
        UsageError: If `model` is not built or sparse already, a hyperparameter
            is out of range, a rule matches no weight, two rules match one
            weight, or nothing is left to make sparse.

    Example:
    >>> import keras, sos
    >>> model = keras.Sequential(
    ...     [
    ...         keras.Input((16,)),
    ...         keras.layers.Dense(8, name="hidden"),
    ...         keras.layers.Dense(4, name="logits"),
    ...     ]
    ... )
    >>> sparse = sos.sparsify(
    ...     model,
    ...     "MagnitudePruning",
    ...     sparsity=0.9,
    ...     begin_step=100,
    ...     end_step=1000,
    ...     rules={"logits": {"sparsity": 0.5}},
    ... )
    >>> [layer.target_sparsity() for layer in sparse.layers]
    [0.9, 0.5]
    """
    _check_model(model)
    plan, notes = make_plan(model, technique, rules, hyperparameters)
    pairs: list[tuple[keras.layers.Layer, keras.layers.Layer]] = []
    wrappers: list[SparseWrapper] = []

    def wrap(layer: keras.layers.Layer) -> keras.layers.Layer:
        new = _clone_layer(layer) if copy else layer
        pairs.append((layer, new))
        for spec in plan.get(id(layer), []):
            new = spec.wrap(new)
            wrappers.append(new)
        return new

    if can_take_apart(model):
        sparse = _clone_graph(model, wrap)
    else:
        wrapper = wrap(model)
        _build_like(model, core(wrapper))
        wrapper.build()
        sparse = SparseModel(wrapper, name=model.name)
        sparse.build()
    sparse_notes = Notes()
    for layer, new in pairs:
        _copy_variables(layer, new)
        for before, after in zip(layer.weights, new.weights, strict=True):
            note = notes.get(before)
            if note is not None:
                sparse_notes.add(after, note)
    for wrapper in wrappers:
        wrapper.weights_changed()
    sparse.sparsity_notes = sparse_notes
    return sparse


def strip(model: keras.Model) -> keras.Model:
    """Makes a plain Keras model with the zeros in place.

    Its outputs are the evaluation outputs of the sparse model, and nothing in
    it or in a file that it is saved to refers to `sos`.

    Args:
        model: A model with sparse layers, or one such layer.

    Returns:
        A new model, or layer, of the kind that was made sparse. It is not
        compiled.

    Raises:
        TypeError: If `model` is not a Keras 3 model or layer.
        UsageError: If it holds no sparse layer, or holds one inside a layer or
            model of a class of its own, which cannot be put together again
            without it.
    """
    if not isinstance(model, keras.layers.Layer):
        raise ArgumentError(
            "`strip` takes a Keras 3 model or layer. "
            f"Received: model={model!r} of type {type(model).__name__}"
        )
    if not find_wrappers(model):
        raise UsageError(
            f"The model {model.name!r} holds no sparse layer, so there is "
            "nothing to strip. Make it sparse with `sos.sparsify` or with the "
            "wrappers first."
        )
    stripped: list[tuple[keras.layers.Layer, keras.layers.Layer]] = []

    def unwrap(layer: keras.layers.Layer) -> keras.layers.Layer:
        inner = core(layer)
        if find_wrappers(inner):
            raise UsageError(
                f"The layer {inner.name!r} of class {type(inner).__name__} "
                "holds sparse layers that only its own code could replace. "
                "Build the layer without them, then assign to its weights the "
                "values of `wrapper.evaluation_weights()`."
            )
        new = _clone_layer(inner)
        stripped.append((layer, new))
        return new

    if isinstance(model, SparseModel):
        plain = unwrap(model.wrapper)
        _build_like(core(model.wrapper), plain)
    elif can_take_apart(model):
        plain = _clone_graph(model, unwrap)
    else:
        plain = unwrap(model)
        _build_like(core(model), plain)
    for layer, new in stripped:
        _copy_variables(core(layer), new)
        position = {id(v): i for i, v in enumerate(core(layer).variables)}
        while isinstance(layer, SparseWrapper):
            for weight, value in layer.evaluation_weights().items():
                new.variables[position[id(weight.variable)]].assign(value)
            layer = layer.layer
    return plain


def _check_model(model: Any) -> None:
    if not isinstance(model, keras.Model):
        module = type(model).__module__
        advice = (
            "Wrap a single layer with the technique itself, as in "
            "`sos.MagnitudePruning(layer, ...)`."
            if isinstance(model, keras.layers.Layer)
            else "A model of `tf_keras`, or of `tf.keras` under "
            "TF_USE_LEGACY_KERAS, is one of Keras 2."
        )
        raise ArgumentError(
            f"`sparsify` takes a model of Keras 3 ({keras.__version__} here). "
            f"{advice} Received: {model!r} of type "
            f"{module}.{type(model).__name__}"
        )
    if not model.built:
        raise UsageError(
            f"The model {model.name!r} is not built, so that its weights are "
            "not known. Give it an `Input`, or call it on a batch, before "
            "`sparsify`."
        )
    if find_wrappers(model):
        raise UsageError(
            f"The model {model.name!r} holds sparse layers already. Use one "
            "`sparsify` with `rules` for several techniques, or `strip` it "
            "first."
        )
    own = [
        name
        for name in _TRAINING_METHODS
        if getattr(type(model), name) is not getattr(keras.Model, name)
    ]
    if own:
        raise ArgumentError(
            f"The model {model.name!r} of class {type(model).__name__} has a "
            f"`{own[0]}` of its own, which a copy would lose. Wrap its layers "
            "where it makes them, as in "
            "`self.dense = sos.MagnitudePruning(keras.layers.Dense(8), ...)`."
        )


def _clone_graph(model: keras.Model, replace: Callable) -> keras.Model:
    """Puts a model together again from replaced layers."""

    def clone(operation: Any) -> Any:
        if isinstance(operation, keras.layers.Layer):
            return replace(operation)
        return operation.__class__.from_config(operation.get_config())

    inputs = None
    if not isinstance(model, keras.Sequential):
        # Keras itself would give unnamed inputs new names.
        layers = {
            id(layer.output): layer
            for layer in model.layers
            if isinstance(layer, keras.layers.InputLayer)
        }
        inputs = keras.tree.map_structure(
            lambda x: _clone_layer(layers[id(x)]).output, model.input
        )
    return keras.models.clone_model(
        model, input_tensors=inputs, clone_function=clone, recursive=True
    )


def _clone_layer(layer: keras.layers.Layer) -> keras.layers.Layer:
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
    new._remat_mode = layer._remat_mode
    return new


def _build_like(layer: keras.layers.Layer, new: keras.layers.Layer) -> None:
    """Builds a copy that no graph builds."""
    if not new.built and (config := layer.get_build_config()):
        new.build_from_config(config)
        new.built = True  # As Keras says when it loads a layer.
    if len(new.variables) != len(layer.variables):
        raise UsageError(
            f"The copy of the model {layer.name!r} of class "
            f"{type(layer).__name__} cannot be built. Give the class a "
            "`build`, or use `copy=False`, which makes the model itself sparse."
        )


def _copy_variables(
    source: keras.layers.Layer, target: keras.layers.Layer
) -> None:
    """Copies all state between two layers of one class and configuration."""
    if source is target:
        return
    before, after = source.variables, target.variables
    # Auto-generated names end in numbers that differ between copies.
    if [_kind(v) for v in before] != [_kind(v) for v in after]:
        raise UsageError(
            f"The copy of the layer {source.name!r} of class "
            f"{type(source).__name__} has other variables than the layer. "
            "Its `get_config` may lack an argument of its `__init__`. "
            f"Expected: {[_kind(v) for v in before]}. "
            f"Received: {[_kind(v) for v in after]}"
        )
    for old, new in zip(before, after, strict=True):
        new.assign(old)


def _kind(variable: keras.Variable) -> tuple:
    name = re.sub(r"_\d+$", "", variable.name)
    return name, tuple(variable.shape), variable.dtype
