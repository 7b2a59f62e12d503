"""Base class of all techniques."""

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

#: Arguments of every technique that are not hyperparameters.
LAYER_ARGUMENTS = ("include", "paths", "name", "trainable")


class SparseWrapper(keras.layers.Layer):
    """Base class of techniques, which make the weights of a layer sparse.

    The layer's weights stay dense variables. In a call the layer reads
    effective weights, which the technique computes from them, through a
    `keras.StatelessScope`. So pruned weights may come back, and gradients flow
    through the computation.

    A technique is a wrapper around a layer, as in
    `sos.MagnitudePruning(keras.layers.Dense(8), sparsity=0.9)`, or part of a
    layer that `sos.sparsify` made sparse, in `layer.techniques`. To write one,
    override `build_weight`, `training_weight` and `evaluation_weight`, and
    `use_output` to sample outputs rather than weights.

    Args:
        layer: The Keras 3 layer (or model) to wrap. Wrap an RNN, not its cell.
        include: One or several regular expressions. A weight is made sparse if
            `re.search` finds one in its path as the model's report prints it.
            By default all trainable weights of rank 2 or more, except biases.
        paths: The weights as `{index in the layer's weights: path}`, instead of
            `include`. `sparsify` and saved models use it.
        name: Name of the wrapper; by default that of the wrapped layer.
        **kwargs: `trainable`, as for any layer.

    Attributes:
        techniques: A tuple of the wrapper itself, for code that reads the
            techniques of layers.

    Raises:
        TypeError: If `layer` is not a Keras 3 layer.
        ValueError: If a regular expression is invalid or, when the layer is
            built, matches no weight.

    Example: a technique that prunes weights by a fixed threshold.
    >>> import keras, sos
    >>> @sos.extend.register
    ... class Threshold(sos.extend.SparseWrapper):
    ...     needs_step = False
    ...
    ...     def training_weight(self, weight):
    ...         kept = keras.ops.abs(weight.value) > 0.1
    ...         return weight.value * keras.ops.cast(kept, "float32")
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> _ = model.layers[0].kernel.assign([[0.05, 0.5]] * 4)
    >>> sparse = sos.sparsify(model, "Threshold")
    >>> sos.sparsity_report(sparse).sparsity
    0.5
    """

    #: Whether training calls need the training step.
    needs_step = True

    #: Whether `training_weight` samples from a distribution of the weight.
    #: Then `sos.sampled` does so, too.
    has_posterior = False

    #: Number of products with tensors of the weight's shape in a training call,
    #: where the dense layer computes one.
    training_products = 1

    #: Hyperparameters of which exactly one is required.
    needs_one_of: tuple[str, ...] = ()

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
        unknown = set(kwargs) - {"trainable"}
        if unknown:
            known = arguments.defaults(type(self), keras.layers.Layer)
            raise ArgumentError(
                f"{type(self).__name__} has no argument "
                f"{', '.join(map(repr, sorted(unknown)))}. "
                f"Its arguments: {sorted(known)}"
            )
        # Keras reads the signature of `call` when the layer is created.
        self.call = calling.call_like(self, layer)
        # With a float32 policy and no autocasting, the technique reads dense
        # weights in their stored dtype, inputs pass unchanged, and the wrapped
        # layer applies its own policy.
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
        self.include = selection.check_include(include)
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

        These are the arguments of the constructor, and of the constructors to
        which it passes `**kwargs`, whose defaults can be written as JSON. A
        technique overrides this method only for exceptions.

        Returns:
            The defaults by name. `sos.extend.REQUIRED` marks an argument
            without a default.
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

        Subclasses create objects, such as schedules, from numbers and names.

        Args:
            hyperparameters: Hyperparameters and other arguments by name.
            inherited: Further ones by name. `hyperparameters` replace them; an
                object, such as a schedule, replaces its numbers.

        Returns:
            Arguments of the constructor. Resolving them again changes nothing.

        Raises:
            UsageError: If a value is invalid.
            TypeError: If arguments exclude each other, or one is missing.
        """
        return {**inherited, **hyperparameters}

    # Methods that techniques override.

    def build_weight(self, weight: SparseWeight) -> None:
        """Creates the technique's variables of a weight, with `add_state`."""

    def training_weight(self, weight: SparseWeight) -> tf.Tensor:
        """Returns the effective weight in training.

        Args:
            weight: The weight.

        Returns:
            A tensor of the weight's shape, which is cast to the weight's dtype.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must override `training_weight`."
        )

    def evaluation_weight(self, weight: SparseWeight) -> tf.Tensor:
        """Returns the effective weight in evaluation, with exact zeros.

        Args:
            weight: The weight.

        Returns:
            A tensor of the weight's shape, which is cast to the weight's dtype.
        """
        return self.training_weight(weight)

    def use_output(
        self, weight: SparseWeight, use: LinearMap | LookUp
    ) -> tf.Tensor | None:
        """Returns sampled outputs of a call in training, None without any.

        Args:
            weight: The weight.
            use: The use of the weight by the call.

        Returns:
            The outputs of the call, after `use.finish`. None to run the call
            with `training_weight`.
        """
        return None

    def assigned_weight(
        self, weight: SparseWeight, value: tf.Tensor
    ) -> tf.Tensor:
        """Returns the dense weight for an assigned effective weight.

        Layers that project a weight in their `call`, such as
        `keras.layers.SpectralNormalization`, assign to it.

        Args:
            weight: The weight.
            value: The assigned value, a tensor of the weight's shape.

        Returns:
            A tensor of the weight's shape.

        Raises:
            UsageError: If the technique has no inverse.
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
        """Returns the sparsity to reach in training, None if unknown."""
        return None

    # Methods that techniques call.

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
        """The weights that become sparse; empty before the layer is built."""
        return tuple(self._sparse.items)

    def hyperparameter(self, name: str) -> tf.Tensor:
        """Returns the value of a `Hyperparameter` as a scalar tensor."""
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

        It keeps its dtype under mixed precision. If it is not trainable, it is
        equal on all replicas and must be assigned outside of `strategy.run`.

        Args:
            name: Name of the variable, and of its attribute in checkpoints.
            shape: Shape of the variable.
            dtype: Dtype of the variable.
            initializer: A Keras initializer.
            trainable: Whether the optimizer trains it.
            **kwargs: `regularizer`, and arguments of `keras.Variable`.

        Returns:
            The variable.
        """
        if not trainable:
            kwargs.setdefault("aggregation", "only_first_replica")
        regularizer = kwargs.pop("regularizer", None)
        # Not `add_weight`, which has no `synchronization`.
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
        # Keras and TensorFlow's checkpoints save attributes by their names.
        setattr(self, name, variable)
        return variable

    def add_weight_state(
        self, weight: SparseWeight, name: str, **kwargs: Any
    ) -> keras.Variable:
        """Adds a variable of the technique with the shape of a weight.

        Args:
            weight: The weight.
            name: Key in `weight.state`, and suffix of the variable's name.
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
        """Returns the key of a weight's noise at this step on this replica.

        The technique needs a `Hyperparameter` named `seed`.

        Args:
            weight: The weight.
            kind: Purpose of the noise.
            per_call: Whether calls in different scopes (`sos.noise_scope`) get
                independent noise, as for activations.

        Returns:
            A key for the functions of `sos.noise`, int32 of shape [2].
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
        """Builds the wrapped layer if necessary, then calls this one."""
        if not args:
            first = next(iter(inspect.signature(self.call).parameters))
            if first in kwargs:
                args = (kwargs.pop(first),)
        if not self.sparse_weights:
            if not calling.fully_built(self.layer):
                # Keras passes only the first shape to `build`.
                calling.build_symbolically(self.layer, args, kwargs)
            # Keras may skip it for a loaded layer, which it marks as built.
            self.build()
        return super().__call__(*args, **kwargs)

    def build(self, input_shape: Any = None) -> None:
        """Builds the wrapped layer, chooses its weights and adds state.

        Args:
            input_shape: Shape of the wrapped layer's input; not needed if the
                layer is built.

        Raises:
            ValueError: If no weight can be made sparse.
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
        """Calls the wrapped layer with effective weights.

        Args:
            inputs: First input of the wrapped layer.
            *args: Its other inputs.
            training: Whether the call is in training.
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
        """Returns the effective weights in evaluation, in the weights' dtypes.

        Returns:
            Tensors by weight.
        """
        return {
            weight: effective_value(weight, training=False)
            for weight in self.sparse_weights
        }

    def check_updated(self) -> None:
        """Raises an error if a training call lacks the step that it needs.

        Raises:
            RuntimeError: If no updater is bound.
        """
        if self.needs_step and not self.step_counter.bound:
            raise RuntimeError(
                f"The layer {self.name!r} ({type(self).__name__}) was called "
                "with `training=True` outside of `sos.SparsityCallback` and "
                "`sos.SparsityUpdater`: it would never become sparse. Pass "
                "`callbacks=[sos.SparsityCallback()]` to every `fit`, or train "
                "inside `with sos.SparsityUpdater(model, optimizer) as "
                "updater:` and call `updater.step()` after every step. For "
                "samples of the weights at inference, open "
                "`sos.sampled(model, seed=...)`."
            )

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the wrapped layer's output spec."""
        if "training" not in inspect.signature(self.layer.call).parameters:
            kwargs.pop("training", None)
        return self.layer.compute_output_spec(*args, **kwargs)

    def compute_output_shape(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the wrapped layer's output shape."""
        return self.layer.compute_output_shape(*args, **kwargs)

    def compute_mask(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the wrapped layer's output mask."""
        return self.layer.compute_mask(*args, **kwargs)

    def quantize(self, *args: Any, **kwargs: Any) -> None:
        """Raises an error: quantizing the dense weights would lose the zeros.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            f"The sparse layer {self.name!r} cannot be quantized, as this "
            "would quantize its dense weights, without the zeros. `sos.strip` "
            "the model first, then quantize."
        )

    def get_config(self) -> dict[str, Any]:
        """Returns the layer's configuration, for `from_config`."""
        config = super().get_config()
        del config["dtype"]
        config.update(self.hyperparameter_variables.values())
        if self.attached:
            # The layer's own configuration has the paths of the weights.
            for name in ("name", "trainable"):
                config.pop(name, None)
            return config
        config["layer"] = sparse_layer.serialize_wrapped(self.layer)
        config["include"] = self.include
        if self._paths is not None:
            # Keys in JSON are strings.
            config["paths"] = {str(i): p for i, p in self._paths.items()}
        return config

    @classmethod
    def arguments_from_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Turns entries of a configuration into arguments of the constructor.

        A technique overrides it if its `get_config` serialises an object.

        Args:
            config: A configuration, without the entry `layer`.

        Returns:
            Arguments of the constructor by name.
        """
        return dict(config)

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: Any = None
    ) -> "SparseWrapper":
        """Creates a wrapper from its configuration."""
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
        """Creates a technique that is part of a layer, not a wrapper.

        Args:
            layer: The layer, built.
            paths: Paths of the weights by their index in the layer's weights.
            arguments: Arguments of the constructor.

        Returns:
            The technique, built.
        """
        technique = cls(sparse_layer.Owner(layer), paths=paths, **arguments)
        technique.build()
        return technique

    def __getattr__(self, name: str) -> Any:
        """Returns `techniques`, or the `layer` that the technique is part of.

        They are not properties, as Keras follows all attributes that it lists.
        """
        if name == "techniques":
            return (self,)
        if name == "layer" and "_owner" in vars(self):
            return self._owner.layer
        raise AttributeError(
            f"{type(self).__name__!r} object has no attribute {name!r}"
        )

    def get_build_config(self) -> dict[str, Any]:
        """Returns the wrapped layer's build configuration.

        It may need more than one shape.
        """
        return {"layer": self.layer.get_build_config()}

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Builds the wrapped layer from its configuration, then this one."""
        if not self.layer.built and config.get("layer"):
            self.layer.build_from_config(config["layer"])
            self.layer.built = True  # As Keras does when it loads a layer.
        if self.sparse_weights or self._paths is None:
            return
        # A layer without a `build` method creates its weights when called.
        layer = core(self.layer)
        if max(self._paths) < len(sparse_layer.plain_weights(layer)):
            self.build()

    # Implementation.

    def _choose_paths(self) -> dict[int, str]:
        """Returns the paths of the weights that `include` chooses, by index."""
        sparse = set()
        for inner in find_wrappers(self.layer):
            sparse |= {id(w.variable) for w in inner.sparse_weights}
        layer = core(self.layer)
        eligible = selection.eligible(layer)
        available = {
            index: variable
            for index, variable in enumerate(sparse_layer.plain_weights(layer))
            if id(variable) in eligible - sparse
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
    """Returns the layer inside of one or several wrappers, or itself."""
    while isinstance(layer, SparseWrapper):
        layer = layer.layer
    return layer


def find_wrappers(layer: keras.layers.Layer) -> list[SparseWrapper]:
    """Returns the techniques of a model, in the order of their weights.

    Args:
        layer: A layer or model.

    Returns:
        The techniques, itself included, each once.
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
    """Returns the layers of a model that have techniques.

    These are the layers that `sos.sparsify` made sparse, and wrappers. They
    have the attributes `techniques` and `sparse_weights`. Each sparse weight
    belongs to one layer.

    Args:
        model: A model or layer, built.

    Returns:
        The layers in the order of their weights; empty for a dense model.

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
        The weights by path, in the order of the model's weights. Paths do not
        begin with the model's name. Duplicate paths, of nested models, get the
        suffixes `#2`, `#3` and so on.
    """
    order = {id(v): i for i, v in enumerate(model.weights)}
    weights = sorted(
        (w for t in find_wrappers(model) for w in t.sparse_weights),
        key=lambda weight: order[id(weight.variable)],
    )
    paths = selection.unique(
        {
            i: selection.path_in(model, weight)
            for i, weight in enumerate(weights)
        }
    )
    return {paths[i]: weight for i, weight in enumerate(weights)}


def check_keras_layer(layer: Any, function: str) -> None:
    """Checks that an argument `model` is a Keras 3 model or layer.

    Args:
        layer: The argument.
        function: Name of the function that received it.

    Raises:
        TypeError: If it is not a Keras 3 model or layer.
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
    advice = "Pass a layer or model created with `keras` 3."
    if module.split(".")[0] in ("tf_keras", "tensorflow", "keras"):
        advice = (
            f"This layer is of `{module}`, which is Keras 2, or not the Keras "
            f"{keras.__version__} in use here. Create it with `import keras` "
            "instead of `tf_keras`, or `tf.keras` with TF_USE_LEGACY_KERAS."
        )
    raise ArgumentError(
        f"{technique} wraps Keras 3 layers. {advice} "
        f"Received: layer={layer!r} of type {module}.{type(layer).__name__}"
    )
