"""The only module that uses private names of Keras; each has a test."""

import inspect
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import tensorflow as tf

_local = threading.local()


def all_layers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Returns a layer and all its sublayers, nested ones too, each once."""
    return layer._flatten_layers()


def sublayers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Returns a layer's direct sublayers."""
    return list(layer._layers)


def own_variables(layer: keras.layers.Layer) -> list[keras.Variable]:
    """Returns a layer's variables without those of its sublayers."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def lora_base(layer: keras.layers.Layer) -> keras.Variable | None:
    """Returns the weight that a LoRA adapter froze, None without one."""
    if not getattr(layer, "lora_enabled", False):
        return None
    name = "_kernel" if hasattr(layer, "_kernel") else "_embeddings"
    return getattr(layer, name)


def adapter(layer: keras.layers.Layer) -> list | None:
    """Returns the rank and alpha of a LoRA adapter, None without one."""
    if not getattr(layer, "lora_enabled", False):
        return None
    return [layer.lora_rank, layer.lora_alpha]


def copy_adapter(adapter: list | None, layer: keras.layers.Layer) -> None:
    """Enables LoRA in a built layer that has no adapter yet.

    Args:
        adapter: Rank and alpha, from `keras_compat.adapter` of another layer.
        layer: The layer.
    """
    if adapter is not None and layer.built and not layer.lora_enabled:
        rank, alpha = adapter
        layer.enable_lora(rank, lora_alpha=alpha)


def kernel(layer: keras.layers.Layer) -> keras.Variable:
    """Returns the kernel variable of a dense or convolutional layer.

    In layers that may have adapters, `layer.kernel` is not a variable, but the
    sum with the adapter.
    """
    return layer._kernel if hasattr(layer, "_kernel") else layer.kernel


def embeddings(layer: keras.layers.Layer) -> keras.Variable:
    """Returns the table variable of an embedding, without an adapter."""
    return layer._embeddings


def set_mask(outputs: tf.Tensor, mask: tf.Tensor) -> None:
    """Sets the mask of a layer's outputs, for the layers that use them."""
    outputs._keras_mask = mask


def copy_remat_mode(
    source: keras.layers.Layer, target: keras.layers.Layer
) -> None:
    """Copies the rematerialisation mode, which no configuration has."""
    target._remat_mode = source._remat_mode


def pickle_state(state: tuple) -> tuple:
    """Returns the state of a layer for `pickle`, without the layer's class.

    A generated class cannot be found by its name.

    Args:
        state: Result of Keras's `__reduce__`, which has the class.
    """
    return (keras.layers.Layer._unpickle_model, *state[1:])


def add_training_argument(layer: keras.layers.Layer) -> dict[str, Any]:
    """Makes Keras pass `training` to a layer whose `call` was replaced.

    Keras reads the signature of `call` only when a layer is created.

    Args:
        layer: The layer.

    Returns:
        The previous values of changed attributes by name, for `restore_call`.
    """
    before = {name: getattr(layer, name) for name in _CALL_ATTRIBUTES}
    before["_call_has_context_arg"] = dict(layer._call_has_context_arg)
    layer._call_signature = with_training(layer._call_signature)
    layer.call_signature_parameters = list(layer._call_signature.parameters)
    layer._call_has_training_arg = True
    layer._call_has_context_arg["training"] = True
    return before


# Attributes in which Keras keeps the parameters of a layer's `call`.
_CALL_ATTRIBUTES = (
    "_call_signature",
    "call_signature_parameters",
    "_call_has_training_arg",
    "_call_has_context_arg",
)


def restore_call(layer: keras.layers.Layer, before: dict[str, Any]) -> None:
    """Undoes `add_training_argument`.

    Args:
        layer: The layer.
        before: Result of `add_training_argument`.
    """
    for name, value in before.items():
        setattr(layer, name, value)


def with_training(signature: inspect.Signature) -> inspect.Signature:
    """Returns a signature with a parameter `training` added if necessary."""
    if "training" in signature.parameters:
        return signature
    parameters = list(signature.parameters.values())
    kind = inspect.Parameter.VAR_KEYWORD
    last = bool(parameters) and parameters[-1].kind == kind
    training = inspect.Parameter(
        "training", inspect.Parameter.KEYWORD_ONLY, default=None
    )
    parameters.insert(len(parameters) - last, training)
    return signature.replace(parameters=parameters)


def training_of_call(layer: keras.layers.Layer) -> bool:
    """Returns the `training` argument of the current Keras call."""
    unset = object()
    context = layer._get_call_context()
    training = context.get_value("training", unset)
    if training is unset:
        # Outside of a call, Keras has opened a context for this layer.
        layer._maybe_reset_call_context()
        return False
    return bool(training)


def only_infers_shapes() -> bool:
    """Returns whether Keras only infers the shapes of a call's outputs."""
    with keras.SymbolicScope() as scope:
        return scope.original_scope is not None


@contextmanager
def new_name_counts() -> Iterator[None]:
    """Numbers unnamed layers as in a new process.

    `keras.utils.clear_session` would also reset settings.
    """
    state = inspect.getmodule(keras.backend.get_uid).global_state
    name = "object_name_uids"
    before = state.get_global_attribute(name)
    state.set_global_attribute(name, None)
    try:
        yield
    finally:
        state.set_global_attribute(name, before)


@contextmanager
def unlocked(layer: keras.layers.Layer) -> Iterator[None]:
    """Allows adding variables and sublayers to a built layer."""
    locked = layer._tracker.locked
    layer._tracker.unlock()
    try:
        yield
    finally:
        if locked:
            layer._tracker.lock()


def remove_sublayer(layer: keras.layers.Layer, name: str) -> None:
    """Deletes an attribute that is a layer, and stops tracking it.

    Args:
        layer: The layer that has the attribute, built or not.
        name: Name of the attribute.
    """
    inner = getattr(layer, name)
    delattr(layer, name)
    layer._tracker.untrack(inner)


def uncompile(model: keras.Model) -> None:
    """Undoes `compile`: removes the optimizer, the loss and the metrics.

    Args:
        model: A model, compiled or not.
    """
    for name in (*_FUNCTIONS, "generate_function"):
        if getattr(model, name, None) is not None:
            setattr(model, name, None)
    if not model.compiled:
        return
    for name in ("optimizer", "_compile_config", "_compiled_trainable_state"):
        if name in vars(model):
            delattr(model, name)
    model.compiled = False
    model.loss = None
    model._compile_loss = None
    model._compile_metrics = None
    model._loss_tracker = None


_FUNCTIONS = ("train_function", "test_function", "predict_function")


@contextmanager
def without_compiled_functions(model: keras.layers.Layer) -> Iterator[None]:
    """Makes `predict` and similar methods compile new functions inside.

    Functions that were compiled before would ignore scopes opened since.

    Args:
        model: A model.
    """
    names = ("test_function", "predict_function", "generate_function")
    before = [
        (inner, name, getattr(inner, name))
        for inner in all_layers(model)
        for name in names
        if getattr(inner, name, None) is not None
    ]
    try:
        for inner, name, _ in before:
            setattr(inner, name, None)
        yield
    finally:
        for inner, name, function in before:
            setattr(inner, name, function)


def is_distributed(variable: keras.Variable) -> bool:
    """Returns whether a variable has copies on several replicas."""
    value = variable._value
    return (
        isinstance(value, tf.distribute.DistributedValues)
        and len(value.values) > 1
    )


@contextmanager
def reading_stored() -> Iterator[None]:
    """Gives variables their stored values, despite a `SubstitutionScope`."""
    before = getattr(_local, "reads_stored", False)
    _local.reads_stored = True
    try:
        yield
    finally:
        _local.reads_stored = before


class SubstitutionScope(keras.StatelessScope):
    """Scope in which some variables have other values.

    Unlike in Keras's own scope, assignments inside reach their variables at
    once: batch statistics, states of recurrent layers, metrics. Scopes nest.

    A subclass overrides `substitute` and `assigned_value`.
    """

    def __init__(self) -> None:
        super().__init__(collect_losses=True)
        self._outer = None
        self._outer_substitution = None

    def forward_losses(self, layer: keras.layers.Layer) -> None:
        """Returns collected losses to the layers that added them.

        Call it after the scope is closed.

        Args:
            layer: The layer that was called inside.
        """
        if self._outer is not None:
            if self._outer.collect_losses:
                self._outer.losses.extend(self.losses)
        elif self.losses:
            for inner in layer._flatten_layers():
                inner._losses += [
                    x for x in self.losses if id(x) in inner._loss_ids
                ]

    def substitute(self, variable: keras.Variable) -> tf.Tensor | None:
        """Returns the value of a variable inside, None for its stored one."""
        raise NotImplementedError

    def assigned_value(self, variable: keras.Variable, value: Any) -> Any:
        """Returns the value to store when `value` is assigned inside."""
        raise NotImplementedError

    def get_current_value(self, variable: keras.Variable) -> tf.Tensor | None:
        """Returns the value for Keras, None for the variable's stored one."""
        if not getattr(_local, "reads_stored", False):
            with reading_stored():
                value = self.substitute(variable)
            if value is not None:
                return value
        if self._outer is None:
            return None
        return self._outer.get_current_value(variable)

    def add_update(self, update: tuple) -> None:
        """Assigns to a variable at once, outside of this scope."""
        variable, value = update
        value = self.assigned_value(variable, value)
        self.__exit__(None, None, None)
        try:
            variable.assign(value)
        finally:
            self.__enter__()

    def __enter__(self) -> "SubstitutionScope":
        """Opens the scope."""
        super().__enter__()
        self._outer = self.original_scope
        self._outer_substitution = getattr(_local, "scope", None)
        _local.scope = self
        return self

    def __exit__(self, *args: Any, **kwargs: Any) -> None:
        """Closes the scope."""
        _local.scope = self._outer_substitution
        super().__exit__(*args, **kwargs)


def substitution_scope() -> SubstitutionScope | None:
    """Returns the innermost scope, if it is a `SubstitutionScope`."""
    probe = keras.StatelessScope(initialize_variables=False)
    with probe:
        scope = probe.original_scope
    return scope if isinstance(scope, SubstitutionScope) else None


def stored_value(variable: keras.Variable) -> tf.Tensor:
    """Returns the stored value of a variable, in its stored dtype.

    A `SubstitutionScope` and the dtype policy of the called layer have no
    effect. A plain `keras.StatelessScope` has.
    """
    scope = getattr(_local, "scope", None)
    if scope is None:
        return tf.convert_to_tensor(variable.value)
    with reading_stored():
        value = scope.get_current_value(variable)
    if value is None:
        value = variable._value
    if value is None:  # Not initialised, as Keras only infers shapes.
        value = variable.value
    return tf.convert_to_tensor(value)


def inner_optimizers(
    optimizer: keras.optimizers.Optimizer,
) -> list[keras.optimizers.Optimizer]:
    """Returns the optimizers that update variables: itself, or inner ones.

    Args:
        optimizer: Any optimizer, possibly one that scales the loss or delegates
            variables to other optimizers. The latter must be built.
    """
    inner = getattr(optimizer, "inner_optimizer", None)
    if inner is not None:
        return inner_optimizers(inner)
    inner = getattr(optimizer, "optimizers", None)
    return [optimizer] if inner is None else list(inner)


def gradient_accumulation_steps(optimizer: keras.optimizers.Optimizer) -> int:
    """Returns the number of batches per step of an optimizer.

    Args:
        optimizer: Any optimizer. One that scales the loss takes its number of
            steps from its inner optimizer.
    """
    inner = getattr(optimizer, "inner_optimizer", None)
    if inner is not None:
        return gradient_accumulation_steps(inner)
    return optimizer.gradient_accumulation_steps or 1


def exclude_from_weight_decay(
    optimizer: keras.optimizers.Optimizer, variables: Iterable[keras.Variable]
) -> None:
    """Adds variables to those that an optimizer does not decay.

    Keras's method of that name replaces previous exclusions.

    Args:
        optimizer: An optimizer that updates variables itself.
        variables: The variables.
    """
    excluded = set(getattr(optimizer, "_exclude_from_weight_decay", ()))
    excluded |= {optimizer._var_key(variable) for variable in variables}
    optimizer._exclude_from_weight_decay = excluded
    optimizer._exclude_from_weight_decay_cache = {}


def decays(
    optimizer: keras.optimizers.Optimizer, variable: keras.Variable
) -> bool:
    """Returns whether an optimizer's weight decay applies to a variable.

    Args:
        optimizer: An optimizer that updates variables itself.
        variable: The variable.
    """
    return optimizer._use_weight_decay(variable.value)


def trained_variables(
    optimizer: keras.optimizers.Optimizer,
) -> Sequence[keras.Variable]:
    """Returns the variables that an optimizer was built with, in order."""
    return optimizer._trainable_variables
