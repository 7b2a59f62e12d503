"""The base of all techniques: a layer that runs with effective weights."""

import copy
import inspect
import types
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from sos import arguments, keras_compat, noise
from sos.errors import ArgumentError, UsageError
from sos.step_counter import StepCounter
from sos.uses import LinearMap, LookUp
from sos.wrappers import calling, selection, sparse_layer
from sos.wrappers.effective import effective_value
from sos.wrappers.hyperparameters import HyperparameterVariables
from sos.wrappers.sparse_weight import SparseWeight, SparseWeights

#: Arguments of every technique that concern the layer it wraps.
LAYER_ARGUMENTS = ("include", "paths", "name", "trainable")


class SparseWrapper(keras.layers.Layer):
    """Makes weights of a layer sparse; the base of all techniques.

    The layer's weights stay dense variables. In a call the layer sees effective
    weights that the technique computes from them, through
    `keras.StatelessScope`: pruned weights may come back, and the gradient of a
    weight is that of the effective one.

    A technique is a wrapper around a layer, as in
    `sos.MagnitudePruning(keras.layers.Dense(8), sparsity=0.9)`, or part of one
    that `sos.sparsify` made sparse, in `layer.techniques`. It overrides
    `build_weight`, `training_weight` and `evaluation_weight`, and where it
    samples outputs rather than weights, `use_output`.

    Args:
        layer: The Keras 3 layer (or model) to wrap. Wrap an RNN, not its cell.
        include: Regular expressions, one or several, that are searched for in
            the paths of the layer's weights and choose those to be made sparse.
            By default all trainable weights of rank 2 or more, biases not.
        paths: The chosen weights, as `{index in its weights: path}`, in the
            place of `include`. `sparsify` and saved models use this.
        name: Name of the layer; by default that of the wrapped layer.
        **kwargs: `trainable`, as for any layer.

    Attributes:
        techniques: The wrapper itself in a tuple, as layers that are sparse in
            place have their techniques.

    Raises:
        TypeError: If `layer` is not a Keras 3 layer.
        ValueError: If a regular expression is wrong or, when the layer is
            built, no weight is chosen.
    """

    #: Whether training calls need the training step.
    needs_step = True

    #: Whether `training_weight` draws from a distribution of the weight, which
    #: `sos.sampled` draws from too.
    has_posterior = False

    def __init__(
        self,
        layer: keras.layers.Layer,
        *,
        include: str | Sequence[str] | None = None,
        paths: Mapping[int | str, str] | None = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        owner = layer if isinstance(layer, sparse_layer.Owner) else None
        layer = owner.layer if owner else layer
        _check_layer(layer, type(self).__name__)
        # With a float32 policy and no autocasting, the dense weights are read
        # here in the dtype in which they are stored, and the wrapped layer
        # opens a scope of its own policy. The inputs pass untouched.
        unknown = set(kwargs) - {"trainable"}
        if unknown:
            known = arguments.defaults(type(self), keras.layers.Layer)
            raise ArgumentError(
                f"{type(self).__name__} has no argument "
                f"{', '.join(map(repr, sorted(unknown)))}. "
                f"Its arguments: {sorted(known)}"
            )
        # Keras reads the signature of `call` when the layer is made.
        self.call = calling.call_like(self, layer)
        super().__init__(
            name=name or layer.name,
            dtype="float32",
            autocast=False,
            **kwargs,
        )
        if owner is None:
            self.layer = layer
        else:
            self._owner = owner
        self.include = selection.check_patterns(include)
        self._paths = None
        if paths is not None:
            self._paths = {int(index): path for index, path in paths.items()}
        self.supports_masking = layer.supports_masking
        self.step_counter = StepCounter()
        self._sparse = SparseWeights()
        self.hyperparameter_variables = HyperparameterVariables()

    # Hyperparameters.

    @classmethod
    def hyperparameters(cls) -> dict[str, Any]:
        """Returns the technique's hyperparameters with their defaults.

        These are all arguments of the constructor, and of the constructors that
        it passes `**kwargs` on to, whose defaults JSON can hold. A technique
        overrides this only if an argument is something else.

        Returns:
            The defaults by name; `sos.extend.REQUIRED` for arguments without
            one.
        """
        return {
            name: copy.deepcopy(default)
            for name, default in arguments.defaults(cls, SparseWrapper).items()
            if name not in LAYER_ARGUMENTS
            and (default is arguments.REQUIRED or arguments.is_json(default))
        }

    @classmethod
    def resolve_hyperparameters(
        cls,
        hyperparameters: Mapping[str, Any],
        inherited: Mapping[str, Any] = types.MappingProxyType({}),
    ) -> dict[str, Any]:
        """Turns hyperparameters into arguments of the constructor.

        Families of techniques make objects of numbers and names here, such as
        schedules.

        Args:
            hyperparameters: Hyperparameters and other arguments by name.
            inherited: Further ones. Those in `hyperparameters` replace them,
                and so does an object that stands for several numbers.

        Returns:
            Arguments of the constructor. Resolved again, they do not change.

        Raises:
            UsageError: If a value is invalid.
            TypeError: If arguments exclude each other, or one is missing.
        """
        return {**inherited, **hyperparameters}

    # What a technique overrides.

    def build_weight(self, weight: SparseWeight) -> None:
        """Creates the technique's variables of a weight, with `add_state`."""

    def training_weight(self, weight: SparseWeight) -> tf.Tensor:
        """The effective weight in training.

        Args:
            weight: The weight.

        Returns:
            A tensor of the weight's shape; it is cast to the weight's dtype.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must override `training_weight`."
        )

    def evaluation_weight(self, weight: SparseWeight) -> tf.Tensor:
        """The effective weight in evaluation, with exact zeros.

        Args:
            weight: The weight.

        Returns:
            A tensor of the weight's shape; it is cast to the weight's dtype.
        """
        return self.training_weight(weight)

    def use_output(
        self, weight: SparseWeight, use: LinearMap | LookUp
    ) -> tf.Tensor | None:
        """The outputs of a call in training whose use of a weight is known.

        A technique overrides it to sample outputs in the place of weights.

        Args:
            weight: The weight.
            use: What the call does with it.

        Returns:
            The outputs of the call, through `use.finish`; None to make the call
            with `training_weight`.
        """
        return None

    def assigned_weight(
        self, weight: SparseWeight, value: tf.Tensor
    ) -> tf.Tensor:
        """The dense weight after a layer assigned to its effective one.

        Layers that project a weight in their `call`, such as
        `keras.layers.SpectralNormalization`, do that.

        Args:
            weight: The weight.
            value: What the layer assigned.

        Returns:
            A tensor of the weight's shape.

        Raises:
            UsageError: If the technique cannot take a value back.
        """
        raise UsageError(
            f"The layer {self.layer.name!r} assigns to its weight "
            f"{weight.path} in its call. {type(self).__name__} cannot turn a "
            "sample of a weight back into its parameters. Leave this weight "
            "dense by a rule, or use a technique with masks."
        )

    def weights_changed(self) -> None:
        """Called once the weights and the technique's variables are there."""

    def target_sparsity(self) -> float | None:
        """The sparsity that the technique is to reach, None where unknown."""
        return None

    # What a technique uses.

    @property
    def attached(self) -> bool:
        """Whether the technique is part of its layer, not a wrapper."""
        return "_owner" in vars(self)

    @property
    def samples_outputs(self) -> bool:
        """Whether the technique overrides `use_output`."""
        return type(self).use_output is not SparseWrapper.use_output

    @property
    def sparse_weights(self) -> tuple[SparseWeight, ...]:
        """The weights that are made sparse; empty before the layer is built."""
        return tuple(self._sparse.items)

    def hyperparameter(self, name: str) -> tf.Tensor:
        """The current value of a `Hyperparameter`, as a scalar tensor."""
        return self.hyperparameter_variables.tensor(name)

    def add_state(
        self,
        name: str,
        shape: Sequence[int],
        *,
        dtype: str = "float32",
        initializer: Any = "zeros",
        trainable: bool = False,
        **kwargs: Any,
    ) -> keras.Variable:
        """Adds a variable of the technique.

        It keeps its dtype under mixed precision. If not trainable, it is equal
        on all replicas and has to be assigned outside of `strategy.run`.

        Args:
            name: Its name, which is also the attribute's name in checkpoints.
            shape: Its shape.
            dtype: Its dtype.
            initializer: A Keras initializer.
            trainable: Whether the optimizer trains it.
            **kwargs: Passed to `keras.Variable`, but for `regularizer`.

        Returns:
            The variable.
        """
        if not trainable:
            kwargs.setdefault("aggregation", "only_first_replica")
        regularizer = kwargs.pop("regularizer", None)
        # Not `add_weight`, which knows no `synchronization`.
        variable = keras.Variable(
            keras.initializers.get(initializer),
            shape=tuple(shape),
            dtype=dtype,
            trainable=trainable,
            autocast=False,
            name=name,
            **kwargs,
        )
        variable.regularizer = regularizer
        # As an attribute, Keras saves it, and TensorFlow's checkpoints have it
        # under this name.
        setattr(self, name, variable)
        return variable

    def add_weight_state(
        self, weight: SparseWeight, name: str, **kwargs: Any
    ) -> keras.Variable:
        """Adds a variable of the technique with the shape of a weight.

        Args:
            weight: The weight.
            name: Key in `weight.state` and, with the weight's name where there
                are several, name of the variable.
            **kwargs: As for `add_state`.

        Returns:
            The variable.
        """
        variables = [other.variable for other in self.sparse_weights]
        short_name = selection.short_name(weight.variable, variables)
        full_name = f"{short_name}_{name}"
        variable = self.add_state(full_name, weight.variable.shape, **kwargs)
        weight.state[name] = variable
        return variable

    def noise_key(
        self, weight: SparseWeight, kind: str, *, per_call: bool = False
    ) -> tf.Tensor:
        """The key of a weight's noise at this step on this replica.

        The technique needs a `Hyperparameter` named `seed`.

        Args:
            weight: The weight.
            kind: What the noise is for.
            per_call: Whether calls under other labels (`sos.noise_scope`) get
                noise of their own, as noise on activations does.

        Returns:
            A key for `tf.random.stateless_*`, int32 of shape [2].
        """
        sample = noise.current_sample()
        if sample is not None:
            name = f"{weight.path}:{kind}:posterior"
            return noise.key(self.hyperparameter("seed"), name, sample)
        label = noise.current_noise_scope() if per_call else ""
        return noise.key(
            self.hyperparameter("seed"),
            f"{weight.path}:{kind}:{label}",
            self.step_counter.step,
        )

    # The layer.

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Builds the wrapped layer if need be, then calls this one."""
        if not args:
            first = next(iter(inspect.signature(self.call).parameters))
            if first in kwargs:
                args = (kwargs.pop(first),)
        if not self.sparse_weights:
            if not calling.fully_built(self.layer):
                # Keras hands `build` the first shape alone.
                calling.build_symbolically(self.layer, args, kwargs)
            # Not left to Keras, which may hold a loaded layer for built.
            self.build()
        return super().__call__(*args, **kwargs)

    def build(self, input_shape: Any = None) -> None:
        """Builds the wrapped layer, chooses its weights and adds state.

        Args:
            input_shape: Shape of the wrapped layer's input; not needed when
                that layer is built already.

        Raises:
            ValueError: If no weight is chosen.
        """
        if not self.layer.built:
            self.layer.build(input_shape)
        weights = sparse_layer.plain_weights(core(self.layer))
        if self._paths is None:
            self._paths = self._choose_paths()
        self._sparse.items = [
            SparseWeight(weights[index], path, self)
            for index, path in self._paths.items()
        ]
        self.hyperparameter_variables.build(self)
        for weight in self.sparse_weights:
            self.build_weight(weight)
        self.weights_changed()
        if not self.attached:
            sparse_layer.bind(self.layer, self.sparse_weights)

    def call(
        self, inputs: Any, *args: Any, training: bool = False, **kwargs: Any
    ) -> Any:
        """Calls the wrapped layer, which reads effective weights.

        Args:
            inputs: First input of the wrapped layer.
            *args: Its other inputs.
            training: Whether to call it as in training.
            **kwargs: Its other keyword arguments.

        Returns:
            The wrapped layer's outputs.

        Raises:
            RuntimeError: In training, if no updater is bound.
        """
        if training:
            self.check_updated()
        return self.layer(inputs, *args, training=bool(training), **kwargs)

    def evaluation_weights(self) -> dict[SparseWeight, tf.Tensor]:
        """The effective weights in evaluation, in the dtypes of the weights."""
        return {
            weight: effective_value(weight, training=False)
            for weight in self.sparse_weights
        }

    def check_updated(self) -> None:
        """Raises if a call in training would not count.

        Raises:
            RuntimeError: If no updater has bound the clock.
        """
        if self.needs_step and not self.step_counter.bound:
            raise RuntimeError(
                f"The layer {self.name!r} ({type(self).__name__}) was called "
                "with `training=True` outside of `sos.SparsityCallback` and "
                "`sos.SparsityUpdater`: it would never become sparse. Pass "
                "`callbacks=[sos.SparsityCallback()]` to every `fit`, or train "
                "inside `with sos.SparsityUpdater(model, optimizer) as "
                "updater:` and call `updater.step()` after every step. For "
                "samples of the weights "
                "at inference, open `sos.sampled(model, seed=...)`."
            )

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        """That of the wrapped layer."""
        if "training" not in inspect.signature(self.layer.call).parameters:
            kwargs.pop("training", None)
        return self.layer.compute_output_spec(*args, **kwargs)

    def compute_output_shape(self, *args: Any, **kwargs: Any) -> Any:
        """That of the wrapped layer."""
        return self.layer.compute_output_shape(*args, **kwargs)

    def compute_mask(self, *args: Any, **kwargs: Any) -> Any:
        """That of the wrapped layer."""
        return self.layer.compute_mask(*args, **kwargs)

    def quantize(self, *args: Any, **kwargs: Any) -> None:
        """Refuses, as quantized dense weights would lose the zeros.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            f"The sparse layer {self.name!r} cannot be quantized, as its dense "
            "weights would be. `sos.strip` the model first, then quantize."
        )

    def get_config(self) -> dict[str, Any]:
        """The layer's configuration, which `from_config` takes."""
        config = super().get_config()
        del config["dtype"]
        config.update(self.hyperparameter_variables.values())
        if self.attached:
            # The layer's configuration says which weights.
            for name in ("name", "trainable"):
                config.pop(name, None)
            return config
        config["layer"] = sparse_layer.serialize_wrapped(self.layer)
        config["include"] = self.include
        if self._paths is not None:
            # JSON has only text as keys.
            config["paths"] = {str(i): p for i, p in self._paths.items()}
        return config

    @classmethod
    def arguments_from_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Turns entries of a configuration into arguments of the constructor.

        A technique overrides it where `get_config` serialises an object.

        Args:
            config: A configuration, without a layer.
        """
        return dict(config)

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: Any = None
    ) -> "SparseWrapper":
        """Makes the wrapper from its configuration."""
        config = dict(config)
        layer = keras.saving.deserialize_keras_object(
            config.pop("layer"), custom_objects
        )
        return cls(layer, **cls.arguments_from_config(config))

    @classmethod
    def from_owner(
        cls,
        layer: keras.layers.Layer,
        paths: Mapping[int, str],
        arguments: Mapping[str, Any],
    ) -> "SparseWrapper":
        """Makes a technique that is part of a layer.

        Args:
            layer: The layer, built.
            paths: The paths of the weights by their index in the layer.
            arguments: Arguments of the constructor.
        """
        technique = cls(sparse_layer.Owner(layer), paths=paths, **arguments)
        technique.build()
        return technique

    def __getattr__(self, name: str) -> Any:
        """Returns the layer that the technique is part of, and `techniques`."""
        # Not properties: Keras follows all attributes that it can list.
        if name == "techniques":
            return (self,)
        if name == "layer" and "_owner" in vars(self):
            return self._owner.layer
        raise AttributeError(
            f"{type(self).__name__!r} object has no attribute {name!r}"
        )

    def get_build_config(self) -> dict[str, Any]:
        """That of the wrapped layer, as it may need more than one shape."""
        return {"layer": self.layer.get_build_config()}

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Builds the wrapped layer as it was built, then this one."""
        if not self.layer.built and config.get("layer"):
            self.layer.build_from_config(config["layer"])
            self.layer.built = True  # As Keras says when it loads a layer.
        if self.sparse_weights or self._paths is None:
            return
        # A layer without a `build` method gets its weights when it is called.
        layer = core(self.layer)
        if max(self._paths) < len(sparse_layer.plain_weights(layer)):
            self.build()

    # Details.

    def _choose_paths(self) -> dict[int, str]:
        """Applies `include`, or the default, to the built layer's weights."""
        taken = set()
        for inner in find_wrappers(self.layer):
            taken |= {id(w.variable) for w in inner.sparse_weights}
        layer = core(self.layer)
        eligible = selection.eligible(layer)
        available = {
            index: variable
            for index, variable in enumerate(sparse_layer.plain_weights(layer))
            if id(variable) in eligible - taken
        }
        try:
            return selection.choose(
                available, self.include, selection.dense_reasons(layer)
            )
        except UsageError as error:
            raise UsageError(
                f"{type(self).__name__} found nothing to make sparse in the "
                f"layer {self.layer.name!r}: {error}"
            ) from error


def core(layer: keras.layers.Layer) -> keras.layers.Layer:
    """The layer inside one or several wrappers, or the layer itself."""
    while isinstance(layer, SparseWrapper):
        layer = layer.layer
    return layer


def find_wrappers(layer: keras.layers.Layer) -> list[SparseWrapper]:
    """The sparse wrappers of a model, in the order of their weights.

    Args:
        layer: A layer or model.

    Returns:
        The wrappers in it, itself included, each once.
    """
    wrappers = [
        inner
        for inner in keras_compat.all_layers(layer)
        if isinstance(inner, SparseWrapper)
    ]
    order = {id(v): i for i, v in enumerate(layer.weights)}
    return sorted(
        wrappers,
        key=lambda wrapper: min(
            (order[id(w.variable)] for w in wrapper.sparse_weights), default=-1
        ),
    )


def sparse_layers(model: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Returns the layers of a model that hold techniques.

    These are the layers that `sos.sparsify` made sparse in place, and wrappers.
    All of them have the attributes `techniques` and `sparse_weights`. Each
    sparse weight belongs to one of them.

    Args:
        model: A model or layer, built.

    Returns:
        The layers, each once, in the order of their weights; none of a model
        without techniques.

    Raises:
        TypeError: If `model` is not a Keras 3 model or layer.

    Example:
    >>> import keras, sos
    >>> model = keras.Sequential(
    ...     [
    ...         keras.Input((16,)),
    ...         keras.layers.Dense(8, name="hidden"),
    ...         keras.layers.Dense(4, name="logits"),
    ...     ]
    ... )
    >>> pruned = sos.prune(model, 0.5, rules={"logits": None})
    >>> for layer in sos.sparse_layers(pruned):
    ...     print(layer.name, [w.path for w in layer.sparse_weights])
    hidden ['hidden/kernel']
    """
    check_keras_layer(model, "sparse_layers")
    layers = {}
    for technique in find_wrappers(model):
        layer = technique.layer if technique.attached else technique
        layers.setdefault(id(layer), layer)
    return list(layers.values())


def weights_by_path(model: keras.layers.Layer) -> dict[str, SparseWeight]:
    """Returns the sparse weights of a model by their paths in the report.

    Args:
        model: A model or layer, built.

    Returns:
        The weights by path, in the order of the model's weights. A path has no
        name of the model in front. Equal ones of two nested models end in `#2`
        and so on.
    """
    order = {id(v): i for i, v in enumerate(model.weights)}
    weights = sorted(
        (w for t in find_wrappers(model) for w in t.sparse_weights),
        key=lambda weight: order[id(weight.variable)],
    )
    paths = selection.unique(
        {
            # Whether Keras puts it there depends on how the model was made.
            i: weight.path.removeprefix(f"{model.name}/")
            for i, weight in enumerate(weights)
        }
    )
    return {paths[i]: weight for i, weight in enumerate(weights)}


def check_keras_layer(layer: Any, function: str) -> None:
    """Raises if an argument `model` is not a Keras 3 model or layer.

    Args:
        layer: The argument.
        function: Name of the function that received it.

    Raises:
        ArgumentError: If it is anything else.
    """
    if not isinstance(layer, keras.layers.Layer):
        cls = type(layer)
        raise ArgumentError(
            f"`{function}` takes a Keras 3 model or layer. Received: "
            f"model={layer!r} of type {cls.__module__}.{cls.__name__}"
        )


def _check_layer(layer: Any, technique: str) -> None:
    if isinstance(layer, keras.layers.Layer):
        return
    module = type(layer).__module__
    advice = "Pass a layer or model made with `keras` 3."
    if module.split(".")[0] in ("tf_keras", "tensorflow", "keras"):
        advice = (
            f"This one comes from `{module}`, which is Keras 2 or another "
            f"Keras than the Keras {keras.__version__} in use here; make it "
            "with `import keras` in the place of `tf_keras` or a `tf.keras` "
            "under TF_USE_LEGACY_KERAS."
        )
    raise ArgumentError(
        f"{technique} wraps Keras 3 layers. {advice} "
        f"Received: layer={layer!r} of type {module}.{type(layer).__name__}"
    )
