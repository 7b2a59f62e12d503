"""Makes layers sparse in place.

The class of a sparse layer is a generated subclass of its original class, as in
`torch.nn.utils.parametrize`. `call` runs with effective weights, and the
configuration contains the techniques, so that copies by configuration
(`clone_model`, sub-models, `.keras` files, `copy.deepcopy`) stay sparse.
References to the layer, and the methods of models that use it, stay valid.
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

#: Attribute of a sparse layer's record, which Keras does not track.
_RECORD = "_sparse_record"
#: Key of the techniques in a layer's configuration.
_KEY = "sparse"


class Owner:
    """Reference to the layer that owns a technique.

    A technique that gets an `Owner` instead of a layer is part of that layer.
    It hides the layer from Keras, which would follow the cycle without end.
    """

    def __init__(self, layer: keras.layers.Layer) -> None:
        self.layer = layer


class _Record:
    """State of a sparse layer."""

    def __init__(self, plain_call: dict[str, Any]) -> None:
        #: Attributes for `keras_compat.restore_call`.
        self.plain_call = plain_call
        #: The layer's original `build`, if it was replaced.
        self.plain_build: Any = None
        self._weights: dict[int, SparseWeight] = {}
        #: Techniques of weights that the layer owns.
        self.techniques: list[Any] = []
        #: Configurations of techniques whose weights are not built yet.
        self.pending: list[dict[str, Any]] = []
        #: LoRA adapters for these weights, by the position of the sublayer.
        self.adapters: dict[str, list] = {}

    @property
    def weights(self) -> dict[int, SparseWeight]:
        """Sparse weights of the layer and its sublayers, by variable `id`.

        A sublayer has no reference to this layer, so `detach` of it leaves its
        weights here. They are dropped when they are read.
        """
        self._weights = {
            key: weight
            for key, weight in self._weights.items()
            if _is_attached(weight)
        }
        return self._weights

    def add_weights(self, weights: Mapping[int, SparseWeight]) -> None:
        """Adds sparse weights by variable `id`."""
        self._weights.update(weights)


def _is_attached(weight: SparseWeight) -> bool:
    """Returns whether a weight's technique was not removed by `detach`."""
    technique = weight.technique
    if not technique.attached:
        return True  # A wrapper.
    record = vars(technique.layer).get(_RECORD)
    return record is not None and any(
        technique is other for other in record.techniques
    )


class SparseLayer:
    """Mixin before the original class of every sparse layer.

    Attributes:
        plain_class: The original class of the layer.
    """

    plain_class: type = keras.layers.Layer

    @property
    def techniques(self) -> tuple[Any, ...]:
        """The techniques of the layer's weights, without its sublayers'."""
        return tuple(vars(self)[_RECORD].techniques)

    @property
    def sparse_weights(self) -> tuple[SparseWeight, ...]:
        """The sparse weights of these techniques."""
        return tuple(
            weight
            for technique in self.techniques
            for weight in technique.sparse_weights
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Builds the layer and attaches its techniques, then calls it."""
        if vars(self)[_RECORD].pending:
            if not calling.fully_built(self):
                if calling.is_symbolic(args, kwargs):
                    # A second call would add a node to the model's graph.
                    outputs = super().__call__(*args, **kwargs)
                    complete(self)
                    _check_complete(self)
                    return outputs
                calling.build_symbolically(super().__call__, args, kwargs)
            complete(self)
            _check_complete(self)
        return super().__call__(*args, **kwargs)

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Builds the layer and attaches its techniques."""
        super().build_from_config(config)
        self.built = True  # As Keras does when it loads a layer.
        complete(self)

    def get_config(self) -> dict[str, Any]:
        """Returns the layer's original configuration and its techniques."""
        plain = self.plain_class
        # This configuration includes the techniques of sublayers.
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
        """Creates a sparse layer from its configuration."""
        config = dict(config)
        sparse = config.pop(_KEY)
        layer = keras.saving.deserialize_keras_object(
            {**sparse["class"], "config": config}, custom_objects
        )
        if sparse["techniques"]:
            apply_configs(layer, sparse["techniques"], sparse["adapters"])
        return layer

    def __reduce__(self) -> tuple:
        """Returns the state for `pickle` and `copy.deepcopy`."""
        return keras_compat.pickle_state(super().__reduce__())

    def save_own_variables(self, store: Any) -> None:
        """Saves the layer's own variables.

        LoRA adapters are saved separately: Keras would add them to the kernel,
        which has a mask. Dense weights are saved, also inside `sos.frozen`.
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


_register = keras.saving.register_keras_serializable("sos", "SparseLayer")
_register(SparseLayer)


def plain_class(layer: keras.layers.Layer) -> type:
    """Returns the class of a layer, the original one of a sparse layer."""
    return getattr(layer, "plain_class", type(layer))


def is_unit(layer: keras.layers.Layer) -> bool:
    """Returns whether a layer owns the techniques of its sublayers' weights.

    These are layers with a registered use, and recurrent layers, whose cells
    would compute effective weights at every timestep.
    """
    return uses.describer(plain_class(layer)) is not None or isinstance(
        layer, keras.layers.RNN
    )


@functools.cache
def graph_classes() -> tuple[type, ...]:
    """Returns the classes of Sequential and functional models."""
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
    """Yields the weights of a model with the layers that own them.

    Args:
        layer: A layer or model.

    Yields:
        The layer that would own a technique, and the weight; each weight once.
    """
    seen: set[int] = set()
    for inner in _parts(layer):
        for variable in _owned_weights(inner):
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

    Calls use it after `bind`.

    Args:
        technique: The class of the technique.
        owner: The layer, built.
        paths: Paths of the weights by their index in `plain_weights`.
        arguments: Arguments of the technique.

    Returns:
        The sparse weights.
    """
    record = make_sparse(owner)
    with contextlib.ExitStack() as stack:
        # The paths of the technique's variables begin with the layer's path.
        for name in owner.path.split("/")[:-1]:
            stack.enter_context(keras.name_scope(name))
        new = technique.from_owner(owner, paths, arguments)
    # One attribute each, as TensorFlow's checkpoints omit such lists.
    with keras_compat.unlocked(owner):
        setattr(owner, f"technique_{len(record.techniques)}", new)
    record.techniques.append(new)
    return new.sparse_weights


def bind(layer: keras.layers.Layer, weights: Iterable[SparseWeight]) -> None:
    """Makes all calls in a model use the effective values of sparse weights.

    Args:
        layer: A layer or model that contains the weights.
        weights: The sparse weights.
    """
    by_id = {id(weight.variable): weight for weight in weights}
    _bind(layer, by_id, {})


def detach(layer: keras.layers.Layer) -> None:
    """Removes all techniques of a model, and restores the layers' classes.

    It undoes `attach` and `bind`. Dense weights keep their values.

    Args:
        layer: A layer or model without wrappers.
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
    """Attaches the pending techniques of a layer if its weights are built.

    Args:
        layer: A sparse layer.
    """
    record = vars(layer)[_RECORD]
    if not layer.built:
        return  # A recurrent layer's cell may be built, and have the weights.
    layers = plain_layers(layer)
    for position, adapter in record.adapters.items():
        if int(position) < len(layers):
            keras_compat.copy_adapter(adapter, layers[int(position)])
    variables = plain_weights(layer)
    last = max(
        (int(i) for entry in record.pending for i in entry["paths"]), default=-1
    )
    if not record.pending or len(variables) <= last:
        return
    pending, record.pending = record.pending, []
    owner_of = {id(v): owner for owner, v in owners(layer)}
    # The configurations of layers that share a weight all include it.
    attached = {
        id(weight.variable): weight
        for inner in keras_compat.all_layers(layer)
        if is_technique(inner)
        for weight in inner.sparse_weights
    }
    weights = list(attached.values())
    for entry in pending:
        by_owner: dict[int, tuple[keras.layers.Layer, dict[int, str]]] = {}
        for index, path in entry["paths"].items():
            variable = variables[int(index)]
            if id(variable) in attached:
                continue
            owner = owner_of[id(variable)]
            ids = [id(v) for v in plain_weights(owner)]
            _, paths = by_owner.setdefault(id(owner), (owner, {}))
            paths[ids.index(id(variable))] = path
        technique = _technique_class(entry["technique"])
        arguments = technique.arguments_from_config(
            entry["technique"]["config"]
        )
        for owner, paths in by_owner.values():
            weights += attach(technique, owner, paths, arguments)
    bind(layer, weights)


def _check_complete(layer: keras.layers.Layer) -> None:
    """Raises an error if a layer lacks weights of pending techniques."""
    pending = vars(layer)[_RECORD].pending
    if pending:
        paths = [path for entry in pending for path in entry["paths"].values()]
        raise UsageError(
            f"The configuration of the layer {layer.name!r} makes the weights "
            f"{paths} sparse, but its call did not build all of them. Build "
            "all of its sublayers in a `build` method. Its weights: "
            f"{[v.path for v in plain_weights(layer)]}"
        )


def plain_layers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Returns a layer and all its sublayers, without techniques."""
    return [x for x in keras_compat.all_layers(layer) if not is_technique(x)]


def _adapters(layer: keras.layers.Layer) -> dict[str, list]:
    """Returns the LoRA adapters of sublayers by their positions.

    The configuration of a layer that creates sublayers may omit them.
    """
    adapters = enumerate(map(keras_compat.adapter, plain_layers(layer)))
    return {str(i): adapter for i, adapter in adapters if adapter is not None}


def apply_configs(
    layer: keras.layers.Layer,
    configs: list[dict[str, Any]],
    adapters: dict[str, list],
) -> None:
    """Makes a layer sparse by configurations, as soon as it is built.

    Args:
        layer: A layer, built or not.
        configs: Result of `technique_configs` of a similar layer.
        adapters: Rank and alpha of LoRA adapters of sublayers, by position.
    """
    record = make_sparse(layer)
    record.pending, record.adapters = configs, adapters
    record.plain_build = build = layer.build

    @functools.wraps(build)
    def build_and_complete(*args: Any, **kwargs: Any) -> None:
        build(*args, **kwargs)
        complete(layer)

    # Keras sets an attribute of this name when it creates a layer.
    object.__setattr__(layer, "build", build_and_complete)
    complete(layer)


def technique_configs(layer: keras.layers.Layer) -> list[dict[str, Any]]:
    """Returns the configurations of a layer's and its sublayers' techniques."""
    position = {id(v): i for i, v in enumerate(plain_weights(layer))}
    entries: dict[int, dict[str, Any]] = {}
    for weight in vars(layer)[_RECORD].weights.values():
        technique = weight.technique
        if not technique.attached:
            continue  # A wrapper has its own configuration.
        if id(technique) not in entries:
            entries[id(technique)] = {
                "technique": keras.saving.serialize_keras_object(technique),
                "paths": {},
            }
            # The layer builds it, not Keras.
            entries[id(technique)]["technique"].pop("build_config", None)
        index = str(position[id(weight.variable)])
        entries[id(technique)]["paths"][index] = weight.path
    return list(entries.values())


@contextmanager
def as_plain(layers: Iterable[keras.layers.Layer]) -> Iterator[None]:
    """Gives sparse layers their original classes, to serialise them.

    Args:
        layers: Layers, sparse or not.

    Yields:
        Nothing.
    """
    classes = [
        (layer, type(layer)) for layer in layers if _RECORD in vars(layer)
    ]
    try:
        for layer, cls in classes:
            layer.__class__ = cls.plain_class
        yield
    finally:
        for layer, cls in classes:
            layer.__class__ = cls


def serialize_wrapped(layer: keras.layers.Layer) -> dict[str, Any]:
    """Returns the configuration of a layer without a wrapper's techniques.

    Args:
        layer: The wrapped layer.
    """
    layers = [
        inner
        for inner in keras_compat.all_layers(layer)
        if _RECORD in vars(inner)
        and not any(
            weight.technique.attached
            for weight in vars(inner)[_RECORD].weights.values()
        )
    ]
    with as_plain(layers):
        return keras.saving.serialize_keras_object(layer)


def make_sparse(layer: keras.layers.Layer) -> _Record:
    """Changes the class of a layer to a generated subclass, with a record.

    Raises:
        UsageError: If the layer has an attribute that the subclass would hide.
    """
    if _RECORD not in vars(layer):
        for name in ("techniques", "sparse_weights", "plain_class"):
            if hasattr(layer, name):
                raise UsageError(
                    f"The layer {layer.name!r} of class {type(layer).__name__} "
                    f"has an attribute `{name}`, a name that sparse layers "
                    "use. Rename it."
                )
        sparse_class = _sparse_class(type(layer))
        record = _Record(keras_compat.add_training_argument(layer))
        object.__setattr__(layer, _RECORD, record)
        layer.__class__ = sparse_class
    return vars(layer)[_RECORD]


def _parts(
    layer: keras.layers.Layer, seen: set[int] | None = None
) -> Iterator[keras.layers.Layer]:
    """Yields the layers that can own techniques."""
    seen = set() if seen is None else seen
    if id(layer) in seen:
        return
    seen.add(id(layer))
    if not is_technique(layer):
        yield layer
    if not is_unit(layer):
        for inner in keras_compat.sublayers(layer):
            yield from _parts(inner, seen)


def _owned_weights(layer: keras.layers.Layer) -> list[keras.Variable]:
    if is_unit(layer):
        return plain_weights(layer)
    return keras_compat.own_variables(layer)


def _bind(
    layer: keras.layers.Layer,
    weights: dict[int, SparseWeight],
    results: dict[int, dict[int, SparseWeight]],
) -> dict[int, SparseWeight]:
    """Records the sparse weights of a layer and its sublayers.

    Args:
        layer: The layer.
        weights: All sparse weights by variable `id`.
        results: Results by the `id` of the layer; extended here.

    Returns:
        The sparse weights of the layer and its sublayers by variable `id`.
    """
    if id(layer) in results:
        return results[id(layer)]
    results[id(layer)] = by_id = {}
    if not is_technique(layer):
        by_id.update(
            (id(v), weights[id(v)])
            for v in _owned_weights(layer)
            if id(v) in weights
        )
    # In units too: a decoder may call the cell of a recurrent layer directly.
    for inner in keras_compat.sublayers(layer):
        by_id.update(_bind(inner, weights, results))
    calls_only = type(layer) in graph_classes() or is_technique(layer)
    if by_id and not calls_only:
        make_sparse(layer).add_weights(by_id)
    return by_id


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
    # All have one name, and that name means the mixin, whose `from_config` is
    # that of all: libraries such as KerasHub look for subclasses of a class
    # among the registered ones.
    _register(new)
    _register(SparseLayer)
    return new


def _call(layer: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Runs a layer's original `call` with effective weights."""
    plain = layer.plain_class
    record = vars(layer)[_RECORD]
    args, kwargs = _training_by_name(plain, args, kwargs)
    training = kwargs.get("training")
    if "training" not in _call_parameters(plain):
        kwargs.pop("training", None)
    weights = record.weights
    outer = keras_compat.substitution_scope()
    in_unit = isinstance(outer, EffectiveWeights) and outer.whole
    if not weights or in_unit and outer.holds(weights):
        return plain.call(layer, *args, **kwargs)
    if training is None:
        training = keras_compat.training_of_call(layer)
    # While Keras infers shapes no updater is bound, and `training` may be true
    # by the default of a `call`.
    training = training and not keras_compat.only_infers_shapes()
    scope = EffectiveWeights(weights, bool(training), whole=is_unit(layer))
    with scope:
        outputs = None
        if training:
            outputs = _sampled_outputs(layer, args, kwargs)
        if outputs is None:
            # Not in training, where the layer may rematerialise its weights.
            compute_once = is_unit(layer) and not training
            if compute_once or isinstance(layer, keras.layers.RNN):
                scope.compute_all()
            outputs = plain.call(layer, *args, **kwargs)
    scope.forward_losses(layer)
    return outputs


@functools.cache
def _call_parameters(plain: type) -> list[str]:
    """Returns the names of the parameters of a class's `call`, without self."""
    return list(inspect.signature(plain.call).parameters)[1:]


def _training_by_name(
    plain: type, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """Turns a positional `training`, and later arguments, into keywords."""
    names = _call_parameters(plain)
    position = names.index("training") if "training" in names else len(args)
    if position >= len(args):
        return args, kwargs
    rest = dict(zip(names[position:], args[position:], strict=False))
    return args[:position], {**kwargs, **rest}


def _sampled_outputs(
    layer: Any, args: tuple, kwargs: dict[str, Any]
) -> Any | None:
    """Returns the outputs that a technique samples, None without any."""
    weights = vars(layer)[_RECORD].weights
    if not any(w.technique.samples_outputs for w in weights.values()):
        return None
    call_uses = uses.describe(layer.plain_class, layer, *args, **kwargs)
    if len(call_uses) != 1:
        return None
    (use,) = call_uses
    weight = weights.get(id(use.weight))
    if weight is None or not isinstance(use, uses.LinearMap | uses.LookUp):
        return None
    check_training(weight)
    return weight.technique.use_output(weight, use)


def _class_config(cls: type) -> dict[str, Any]:
    """Returns the names by which Keras finds a class when loading a file."""
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
            f"The technique {config['class_name']!r} is not registered. Import "
            "the module that defines it, decorated with "
            "`@sos.extend.register`, before loading. Received: "
            f"registered_name={name!r}"
        )
    return technique
