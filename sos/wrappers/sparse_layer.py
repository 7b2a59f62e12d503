"""Layers that are sparse in place, and keep their class.

The class of such a layer becomes a generated subclass of its own, as in
`torch.nn.utils.parametrize`: `call` runs with effective weights, and the
configuration holds the techniques, so that whatever Keras copies by its
configuration (`clone_model`, sub-models, `.keras` files, `copy.deepcopy`) stays
sparse. Every reference to the layer stays valid, and so do the methods of a
model that use it.
"""

import contextlib
import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import keras

from sos import keras_compat, uses
from sos.errors import UsageError
from sos.wrappers import calling
from sos.wrappers.effective import EffectiveWeights, check_training
from sos.wrappers.sparse_weight import SparseWeight, is_technique

#: Where a sparse layer's record is; hidden from Keras's tracking.
_RECORD = "_sparse_record"
#: The key of the sparsity in a layer's configuration.
_KEY = "sparse"


class Owner:
    """Refers to the layer that owns a technique.

    A technique that is handed one in the place of a layer is part of that
    layer. Keras must not find the way back: it would never end.
    """

    def __init__(self, layer: keras.layers.Layer) -> None:
        self.layer = layer


class _Record:
    """What a sparse layer knows beyond its own class."""

    def __init__(self, plain_call: dict[str, Any]) -> None:
        #: How Keras called the layer before, for `keras_compat.restore_call`.
        self.plain_call = plain_call
        #: The layer's own `build`, if another one stands before it.
        self.plain_build: Any = None
        #: Sparse weights in the layer and below, by `id` of the variable.
        self.weights: dict[int, SparseWeight] = {}
        #: Techniques of weights that the layer owns.
        self.techniques: list[Any] = []
        #: Techniques of a configuration whose weights are not there yet.
        self.pending: list[dict[str, Any]] = []
        #: LoRA adapters of such a configuration, by the layer's position.
        self.adapters: dict[str, list] = {}


class SparseLayer:
    """In front of the class of every layer that is sparse in place.

    Attributes:
        plain_class: The class of the layer before it was made sparse.
    """

    plain_class: type = keras.layers.Layer

    @property
    def techniques(self) -> tuple[Any, ...]:
        """The techniques of the weights that the layer itself owns."""
        return tuple(vars(self)[_RECORD].techniques)

    @property
    def sparse_weights(self) -> tuple[SparseWeight, ...]:
        """The weights of these techniques."""
        return tuple(
            weight
            for technique in self.techniques
            for weight in technique.sparse_weights
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Builds what is not built, as its weights get techniques."""
        if vars(self)[_RECORD].pending:
            if not calling.fully_built(self):
                if calling.is_symbolic(args, kwargs):
                    # A call more would be a node more in the model's graph.
                    outputs = super().__call__(*args, **kwargs)
                    complete(self)
                    _check_complete(self)
                    return outputs
                calling.build_symbolically(super().__call__, args, kwargs)
            complete(self)
            _check_complete(self)
        return super().__call__(*args, **kwargs)

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Builds the layer as it was built."""
        super().build_from_config(config)
        self.built = True  # As Keras says when it loads a layer.
        complete(self)

    def get_config(self) -> dict[str, Any]:
        """Returns the layer's own configuration with its techniques."""
        plain = self.plain_class
        # The techniques of all weights below are in this configuration.
        with as_plain(keras_compat.all_layers(self)[1:]):
            config = dict(plain.get_config(self))
        config[_KEY] = {
            "class": _class_config(plain),
            "techniques": technique_configs(self),
            "adapters": _adapters(self),
        }
        return config

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: Any = None
    ) -> keras.layers.Layer:
        """Makes the layer from its configuration."""
        config = dict(config)
        sparse = config.pop(_KEY)
        layer = keras.saving.deserialize_keras_object(
            {**sparse["class"], "config": config}, custom_objects
        )
        if sparse["techniques"]:
            apply_configs(layer, sparse["techniques"], sparse["adapters"])
        return layer

    def __reduce__(self) -> tuple:
        """Returns what `pickle` and `copy.deepcopy` need."""
        return keras_compat.reduced(super().__reduce__())

    def save_own_variables(self, store: Any) -> None:
        """Saves the layer's own variables.

        Keras would add adapters to the kernel, which has a mask. Inside of
        `sos.frozen` the dense weights are saved too.
        """
        with keras_compat.reading_stored():
            if getattr(self, "lora_enabled", False):
                keras.layers.Layer.save_own_variables(self, store)
            else:
                super().save_own_variables(store)

    def load_own_variables(self, store: Any) -> None:
        """Loads the layer's own variables."""
        if getattr(self, "lora_enabled", False):
            keras.layers.Layer.load_own_variables(self, store)
        else:
            super().load_own_variables(store)


keras.saving.register_keras_serializable("sos", "SparseLayer")(SparseLayer)


def plain_class(layer: keras.layers.Layer) -> type:
    """Returns the class that a layer has, or had before it was sparse."""
    return getattr(layer, "plain_class", type(layer))


def is_unit(layer: keras.layers.Layer) -> bool:
    """Returns whether a layer's call is looked at as a whole.

    That is so for calls that are described, and for recurrent layers, whose
    cells would compute effective weights at every timestep.
    """
    return uses.describer(plain_class(layer)) is not None or isinstance(
        layer, keras.layers.RNN
    )


@functools.cache
def graph_classes() -> tuple[type, ...]:
    """Returns the classes of models that only call their layers."""
    # Keras does not export the class of functional models.
    inputs = keras.Input((1,), name="check_input")
    functional = type(keras.Model(inputs, inputs, name="check"))
    return (keras.Sequential, functional)


def plain_weights(layer: keras.layers.Layer) -> list[keras.Variable]:
    """Returns the weights of a layer without the variables of techniques."""
    state = {
        id(variable)
        for inner in keras_compat.all_layers(layer)
        if is_technique(inner)
        for variable in keras_compat.own_variables(inner)
    }
    return [v for v in layer.weights if id(v) not in state]


def owners(
    layer: keras.layers.Layer,
) -> Iterator[tuple[keras.layers.Layer, keras.Variable]]:
    """Goes through the weights of a model with the layers that own them.

    Args:
        layer: A layer or model.

    Yields:
        Each weight once, with the layer that a technique becomes part of.
    """
    seen: set[int] = set()
    for inner in _parts(layer):
        for variable in _held_by(inner):
            if id(variable) not in seen:
                seen.add(id(variable))
                yield inner, variable


def attach(
    technique: type,
    owner: keras.layers.Layer,
    paths: Mapping[int, str],
    arguments: Mapping[str, Any],
) -> tuple[SparseWeight, ...]:
    """Makes a technique part of the layer that owns its weights.

    `bind` then makes the calls use it.

    Args:
        technique: The class of the technique.
        owner: The layer, built.
        paths: The paths of the weights by their index in `plain_weights`.
        arguments: Arguments of the technique.

    Returns:
        The sparse weights.
    """
    record = make_sparse(owner)
    with contextlib.ExitStack() as stack:
        # Variables of the technique are named like those of the layer.
        for name in owner.path.split("/")[:-1]:
            stack.enter_context(keras.name_scope(name))
        new = technique.from_owner(owner, paths, arguments)
    # An attribute for each, as TensorFlow's checkpoints leave lists out.
    with keras_compat.unlocked(owner):
        setattr(owner, f"technique_{len(record.techniques)}", new)
    record.techniques.append(new)
    return new.sparse_weights


def bind(layer: keras.layers.Layer, weights: Iterable[SparseWeight]) -> None:
    """Lets all calls in a model use the effective values of sparse weights.

    Args:
        layer: A layer or model that holds the weights.
        weights: The sparse weights.
    """
    by_id = {id(weight.variable): weight for weight in weights}
    _bind(layer, by_id, {})


def detach(layer: keras.layers.Layer) -> None:
    """Gives all layers of a model their own classes back, without techniques.

    The inverse of `attach` and `bind`. Dense weights keep their values.

    Args:
        layer: A layer or model, in no wrapper.
    """
    for inner in keras_compat.all_layers(layer):
        record = vars(inner).get(_RECORD)
        if record is None:
            continue
        for index in range(len(record.techniques)):
            keras_compat.remove_sublayer(inner, f"technique_{index}")
        if record.plain_build is not None:
            object.__setattr__(inner, "build", record.plain_build)
        object.__delattr__(inner, _RECORD)
        inner.__class__ = inner.plain_class
        keras_compat.restore_call(inner, record.plain_call)


def complete(layer: keras.layers.Layer) -> None:
    """Attaches the techniques of a configuration, once the weights are there.

    Args:
        layer: A sparse layer.
    """
    record = vars(layer)[_RECORD]
    if not layer.built:
        return  # The cell of a recurrent layer may be, which has the weights.
    inside = plain_layers(layer)
    for position, adapter in record.adapters.items():
        if int(position) < len(inside):
            keras_compat.copy_adapter(adapter, inside[int(position)])
    variables = plain_weights(layer)
    last = max(
        (int(i) for entry in record.pending for i in entry["paths"]), default=-1
    )
    if not record.pending or len(variables) <= last:
        return
    pending, record.pending = record.pending, []
    owner_of = {id(v): owner for owner, v in owners(layer)}
    # Of layers that share a weight, each has it in its configuration.
    known = {
        id(weight.variable): weight
        for inner in keras_compat.all_layers(layer)
        if is_technique(inner)
        for weight in inner.sparse_weights
    }
    weights = list(known.values())
    for entry in pending:
        by_owner: dict[int, tuple[keras.layers.Layer, dict[int, str]]] = {}
        for index, path in entry["paths"].items():
            variable = variables[int(index)]
            if id(variable) in known:
                continue
            owner = owner_of[id(variable)]
            places = [id(v) for v in plain_weights(owner)]
            _, paths = by_owner.setdefault(id(owner), (owner, {}))
            paths[places.index(id(variable))] = path
        technique = _technique_class(entry["technique"])
        arguments = technique.arguments_from_config(
            entry["technique"]["config"]
        )
        for owner, paths in by_owner.values():
            weights += attach(technique, owner, paths, arguments)
    bind(layer, weights)


def _check_complete(layer: keras.layers.Layer) -> None:
    """Raises if a layer was built without weights that are to be sparse."""
    pending = vars(layer)[_RECORD].pending
    if pending:
        paths = [path for entry in pending for path in entry["paths"].values()]
        raise UsageError(
            f"The configuration of the layer {layer.name!r} makes the weights "
            f"{paths} sparse. Its call builds others, or not all of them. "
            "Build all of its sublayers in a `build` method. Its weights: "
            f"{[v.path for v in plain_weights(layer)]}"
        )


def plain_layers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Returns a layer and those in it, without techniques."""
    return [x for x in keras_compat.all_layers(layer) if not is_technique(x)]


def _adapters(layer: keras.layers.Layer) -> dict[str, list]:
    """Returns the LoRA adapters in a layer by the position of their layer.

    The configuration of a layer that makes others need not hold them.
    """
    adapters = enumerate(map(keras_compat.adapter, plain_layers(layer)))
    return {str(i): adapter for i, adapter in adapters if adapter is not None}


def apply_configs(
    layer: keras.layers.Layer,
    configs: list[dict[str, Any]],
    adapters: dict[str, list],
) -> None:
    """Makes a layer sparse as configurations say, as soon as it is built.

    Args:
        layer: A layer, built or not.
        configs: From `technique_configs` of a layer like it.
        adapters: Rank and alpha of LoRA adapters in it, by the position of
            their layer.
    """
    record = make_sparse(layer)
    record.pending, record.adapters = configs, adapters
    record.plain_build = build = layer.build

    @functools.wraps(build)
    def build_and_complete(*args: Any, **kwargs: Any) -> None:
        build(*args, **kwargs)
        complete(layer)

    # Keras has put an attribute of this name there when the layer was made.
    object.__setattr__(layer, "build", build_and_complete)
    complete(layer)


def technique_configs(layer: keras.layers.Layer) -> list[dict[str, Any]]:
    """Returns the configurations of the techniques in and below a layer."""
    position = {id(v): i for i, v in enumerate(plain_weights(layer))}
    entries: dict[int, dict[str, Any]] = {}
    for weight in vars(layer)[_RECORD].weights.values():
        technique = weight.technique
        if not technique.attached:
            continue  # It is in the configuration of a wrapper.
        if id(technique) not in entries:
            entries[id(technique)] = {
                "technique": keras.saving.serialize_keras_object(technique),
                "paths": {},
            }
            # How Keras would build it; its layer builds it.
            entries[id(technique)]["technique"].pop("build_config", None)
        index = str(position[id(weight.variable)])
        entries[id(technique)]["paths"][index] = weight.path
    return list(entries.values())


@contextmanager
def as_plain(layers: Iterable[keras.layers.Layer]) -> Iterator[None]:
    """Gives sparse layers their own classes back while they are serialised.

    Args:
        layers: Layers, sparse or not.

    Yields:
        Nothing.
    """
    changed = [
        (layer, type(layer)) for layer in layers if _RECORD in vars(layer)
    ]
    try:
        for layer, cls in changed:
            layer.__class__ = cls.plain_class
        yield
    finally:
        for layer, cls in changed:
            layer.__class__ = cls


def serialize_wrapped(layer: keras.layers.Layer) -> dict[str, Any]:
    """Returns the configuration of a layer without a wrapper's techniques.

    Args:
        layer: The layer in a wrapper.
    """
    wrapped = [
        inner
        for inner in keras_compat.all_layers(layer)
        if _RECORD in vars(inner)
        and not any(
            weight.technique.attached
            for weight in vars(inner)[_RECORD].weights.values()
        )
    ]
    with as_plain(wrapped):
        return keras.saving.serialize_keras_object(layer)


def make_sparse(layer: keras.layers.Layer) -> _Record:
    """Gives a layer the generated subclass of its class, and its record.

    Raises:
        UsageError: If the layer has an attribute that the subclass would hide.
    """
    if _RECORD not in vars(layer):
        for name in ("techniques", "sparse_weights", "plain_class"):
            if hasattr(layer, name):
                raise UsageError(
                    f"The layer {layer.name!r} of class {type(layer).__name__} "
                    f"has an attribute `{name}` of its own, which sparse "
                    "layers use for another purpose. Rename it."
                )
        sparse_class = _sparse_class(type(layer))
        record = _Record(keras_compat.accept_training(layer))
        object.__setattr__(layer, _RECORD, record)
        layer.__class__ = sparse_class
    return vars(layer)[_RECORD]


def _parts(
    layer: keras.layers.Layer, seen: set[int] | None = None
) -> Iterator[keras.layers.Layer]:
    """Goes through the layers that techniques can be part of."""
    seen = set() if seen is None else seen
    if id(layer) in seen:
        return
    seen.add(id(layer))
    if not is_technique(layer):
        yield layer
    if not is_unit(layer):
        for inner in keras_compat.sublayers(layer):
            yield from _parts(inner, seen)


def _held_by(layer: keras.layers.Layer) -> list[keras.Variable]:
    if is_unit(layer):
        return plain_weights(layer)
    return keras_compat.own_variables(layer)


def _bind(
    layer: keras.layers.Layer,
    weights: dict[int, SparseWeight],
    done: dict[int, dict[int, SparseWeight]],
) -> dict[int, SparseWeight]:
    """Returns the sparse weights in and below a layer."""
    if id(layer) in done:
        return done[id(layer)]
    done[id(layer)] = found = {}
    if not is_technique(layer):
        found.update(
            (id(v), weights[id(v)]) for v in _held_by(layer) if id(v) in weights
        )
    # In a unit too: a decoder may call the cell of a recurrent layer itself.
    for inner in keras_compat.sublayers(layer):
        found.update(_bind(inner, weights, done))
    calls_only = type(layer) in graph_classes() or is_technique(layer)
    if found and not calls_only:
        make_sparse(layer).weights.update(found)
    return found


@functools.cache
def _sparse_class(plain: type) -> type:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _call(self, args, kwargs)

    call.__signature__ = keras_compat.with_training(
        inspect.signature(plain.call)
    )
    call.__doc__ = plain.call.__doc__
    new = type(
        f"Sparse{plain.__name__}",
        (SparseLayer, plain),
        {
            "call": call,
            "plain_class": plain,
            "__doc__": plain.__doc__,
            "__module__": __name__,
        },
    )
    # All under one name: whichever of them Keras finds has the `from_config`
    # that knows them all.
    return keras.saving.register_keras_serializable("sos", "SparseLayer")(new)


def _call(layer: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Calls a layer's own `call` with effective weights."""
    plain = layer.plain_class
    record = vars(layer)[_RECORD]
    args, kwargs = _training_by_name(plain, args, kwargs)
    training = kwargs.get("training")
    if "training" not in _call_parameters(plain):
        kwargs.pop("training", None)
    unit = keras_compat.substitution_scope()
    in_unit = isinstance(unit, EffectiveWeights) and unit.whole
    if not record.weights or in_unit and unit.holds(record.weights):
        return plain.call(layer, *args, **kwargs)
    if training is None:
        training = keras_compat.training_of_call(layer)
    # No updater runs while a model is put together, as by the default of
    # `training` in a `call`.
    training = training and not keras_compat.is_after_shapes()
    scope = EffectiveWeights(
        record.weights, bool(training), whole=is_unit(layer)
    )
    with scope:
        outputs = None
        if training:
            outputs = _described_outputs(layer, args, kwargs)
        if outputs is None:
            # In training a layer may rematerialise what reads its weights.
            once = is_unit(layer) and not training
            if once or isinstance(layer, keras.layers.RNN):
                scope.compute_all()
            outputs = plain.call(layer, *args, **kwargs)
    scope.hand_on_losses(layer)
    return outputs


@functools.cache
def _call_parameters(plain: type) -> list[str]:
    """Returns the names of the parameters of a class's `call`, without self."""
    return list(inspect.signature(plain.call).parameters)[1:]


def _training_by_name(
    plain: type, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """Turns a positional `training`, and what follows, into keywords."""
    names = _call_parameters(plain)
    position = names.index("training") if "training" in names else len(args)
    if position >= len(args):
        return args, kwargs
    rest = dict(zip(names[position:], args[position:], strict=False))
    return args[:position], {**kwargs, **rest}


def _described_outputs(
    layer: Any, args: tuple, kwargs: dict[str, Any]
) -> Any | None:
    """Returns what techniques compute of a described call, or None."""
    weights = vars(layer)[_RECORD].weights
    if not any(w.technique.samples_outputs for w in weights.values()):
        return None
    described = uses.describe(layer.plain_class, layer, *args, **kwargs)
    if len(described) != 1:
        return None
    (use,) = described
    weight = weights.get(id(use.weight))
    if weight is None or not isinstance(use, uses.LinearMap | uses.LookUp):
        return None
    check_training(weight)
    return weight.technique.use_output(weight, use)


def _class_config(cls: type) -> dict[str, Any]:
    """Returns how Keras finds a class in a file."""
    public = getattr(keras.layers, cls.__name__, None) is cls
    return {
        "module": "keras.layers" if public else cls.__module__,
        "class_name": cls.__name__,
        "registered_name": None
        if public
        else keras.saving.get_registered_name(cls),
    }


def _technique_class(config: dict[str, Any]) -> type:
    name = config["registered_name"]
    technique = keras.saving.get_registered_object(name)
    if technique is None:
        raise UsageError(
            f"The technique {config['class_name']!r} is not known. Import the "
            "module that defines it and decorate it with "
            "`@sos.extend.register` before loading. Received: "
            f"registered_name={name!r}"
        )
    return technique
