"""Makes whole models sparse, and plain again."""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import keras

from sos.registry import get_technique
from sos.schedules import as_schedule
from sos.wrappers.base import (
    SparseWrapper,
    core,
    find_wrappers,
    why_dense,
)
from sos.wrappers.masked import PruningWrapper

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
    rules: Mapping[str, Rule] | None = None,
    copy: bool = True,
    **settings: Any,
) -> keras.Model:
    """Makes the weights of a model sparse while it trains.

    All trainable weights of rank 2 or more, biases not, are made sparse with
    `technique` unless a rule says otherwise. In Sequential and functional
    models, nested ones too, the layers are wrapped one by one; a subclassed
    model is wrapped as a whole. `sos.sparsity_report` tells for every weight
    what became of it and why.

    Args:
        model: A Keras 3 model that is built.
        technique: A registered technique or its name; None leaves everything
            dense that no rule speaks of.
        rules: What is to be different, by regular expressions that are searched
            for in the paths of `model`'s weights (`[v.path for v in
            model.weights]`): None leaves the weights dense, a technique or its
            name uses that, a dictionary overrides settings, with the keys
            `technique`, `sparsity` (the schedule's final sparsity) and any
            argument of the technique.
        copy: Whether the result gets copies of the layers and weights. If not,
            it shares them with `model`.
        **settings: Arguments of the technique, such as `schedule`.

    Returns:
        A model like `model`, with the same weights, to compile and train with
        `sos.SparsityCallback` or `sos.Driver`.

    Raises:
        TypeError: If `model` is not a Keras 3 model, is trained by a
            `train_step` of its own, or an argument of the technique is wrong.
        ValueError: If `model` is not built or sparse already, or if a rule
            matches no weight, two rules match one weight, or nothing is left to
            make sparse.
    """
    _check_model(model)
    plan, notes = _plan(model, technique, rules or {}, settings)
    pairs: list[tuple[keras.layers.Layer, keras.layers.Layer]] = []
    wrappers: list[SparseWrapper] = []

    def wrap(layer: keras.layers.Layer) -> keras.layers.Layer:
        new = _clone_layer(layer) if copy else layer
        pairs.append((layer, new))
        for job in plan.get(id(layer), []):
            new = job(new)
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
        ValueError: If it holds no sparse layer, or holds one inside a layer or
            model of a class of its own, which cannot be put together again
            without it.
    """
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(
            "`strip` takes a Keras 3 model or layer. "
            f"Received: model={model!r} of type {type(model).__name__}"
        )
    if not find_wrappers(model):
        raise ValueError(
            f"The model {model.name!r} holds no sparse layer, so there is "
            "nothing to strip. Make it sparse with `sos.sparsify` or with the "
            "wrappers first."
        )
    stripped: list[tuple[keras.layers.Layer, keras.layers.Layer]] = []

    def unwrap(layer: keras.layers.Layer) -> keras.layers.Layer:
        inner = core(layer)
        if find_wrappers(inner):
            raise ValueError(
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


class _Job:
    """One wrapper to be put around a layer."""

    def __init__(self, technique: type, settings: dict[str, Any]) -> None:
        self.technique = technique
        self.settings = settings
        self.paths: dict[int, str] = {}

    def __call__(self, layer: keras.layers.Layer) -> SparseWrapper:
        return self.technique(layer, paths=self.paths, **self.settings)


def _plan(
    model: keras.Model,
    technique: type | str | None,
    rules: Mapping[str, Rule],
    settings: dict[str, Any],
) -> tuple[dict[int, list[_Job]], Notes]:
    """Decides what becomes of every weight, before anything is made."""
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
    plan: dict[int, list[_Job]] = {}
    used: dict[str, list[str]] = {pattern: [] for pattern in rules}
    eligible = []
    for layer in leaves(model):
        trainable = {id(v) for v in layer.trainable_weights}
        jobs: dict[int, _Job] = {}
        for index, variable in enumerate(layer.weights):
            reason = why_dense(variable)
            if id(variable) not in trainable:
                reason = "not trainable"
            if reason is not None:
                notes.add(variable, reason)
                continue
            eligible.append(variable.path)
            matches = [p for p in rules if re.search(p, variable.path)]
            if len(matches) > 1:
                raise ValueError(
                    f"More than one rule matches the weight {variable.path!r}: "
                    f"{matches}. Make the regular expressions narrower."
                )
            choice = default
            if matches:
                used[matches[0]].append(variable.path)
                choice = resolved[matches[0]]
            if choice is None:
                because = f"rule {matches[0]!r}" if matches else "no rule"
                notes.add(variable, f"left dense by {because}")
                continue
            # Weights of one layer that share settings share a wrapper.
            job = jobs.setdefault(id(choice), _Job(*choice))
            job.paths[index] = variable.path
            if layer is model or not _is_keras_layer(layer):
                notes.add(
                    variable, f"{type(layer).__name__} wrapped as a whole"
                )
        if jobs:
            plan[id(layer)] = list(jobs.values())
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
                    f"replaces. Received: {own!r}"
                )
            full["schedule"] = full["schedule"].with_sparsity(sparsity)
    # Wrong settings are found here, before anything is made.
    technique(keras.layers.Dense(1), **full)
    return technique, full


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
        raise TypeError(
            f"`sparsify` takes a model of Keras 3 ({keras.__version__} here). "
            f"{advice} Received: {model!r} of type "
            f"{module}.{type(model).__name__}"
        )
    if not model.built:
        raise ValueError(
            f"The model {model.name!r} is not built, so that its weights are "
            "not known. Give it an `Input`, or call it on a batch, before "
            "`sparsify`."
        )
    if find_wrappers(model):
        raise ValueError(
            f"The model {model.name!r} holds sparse layers already. Use one "
            "`sparsify` with `rules` for several techniques, or `strip` it "
            "first."
        )
    if type(model).train_step is not keras.Model.train_step:
        raise TypeError(
            f"The model {model.name!r} of class {type(model).__name__} has a "
            "`train_step` of its own, which a copy would lose. Wrap its layers "
            "where it makes them, as in "
            "`self.dense = sos.MagnitudePruning(keras.layers.Dense(8), ...)`."
        )


@functools.cache
def _functional_class() -> type:
    # Keras does not export the class of functional models.
    inputs = keras.Input((1,))
    return type(keras.Model(inputs, inputs))


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
        raise TypeError(
            f"The layer {layer.name!r} of class {type(layer).__name__} cannot "
            "be copied. Give the class a `get_config` that holds the arguments "
            "of its `__init__`, or use `copy=False`, which makes the model "
            f"itself sparse. ({error})"
        ) from error
    return new


def _build_like(layer: keras.layers.Layer, new: keras.layers.Layer) -> None:
    """Builds a copy that no graph builds."""
    if not new.built and (config := layer.get_build_config()):
        new.build_from_config(config)
        new.built = True  # As Keras says when it loads a layer.
    if len(new.variables) != len(layer.variables):
        raise ValueError(
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
        raise ValueError(
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
