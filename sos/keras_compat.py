"""Everything private of Keras that `sos` uses; each name has a test."""

import inspect
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import tensorflow as tf

_local = threading.local()


def all_layers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Returns a layer and all layers that it holds, each once."""
    return layer._flatten_layers()


def sublayers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Returns the layers that a layer holds itself."""
    return list(layer._layers)


def own_variables(layer: keras.layers.Layer) -> list[keras.Variable]:
    """Returns the weights that a layer holds itself, not in its sublayers."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def lora_base(layer: keras.layers.Layer) -> keras.Variable | None:
    """Returns the weight that an enabled LoRA adapter froze, if any."""
    if not getattr(layer, "lora_enabled", False):
        return None
    name = "_kernel" if hasattr(layer, "_kernel") else "_embeddings"
    return getattr(layer, name)


def adapter(layer: keras.layers.Layer) -> list | None:
    """Returns rank and alpha of a layer's LoRA adapter, if there is one."""
    if not getattr(layer, "lora_enabled", False):
        return None
    return [layer.lora_rank, layer.lora_alpha]


def copy_adapter(adapter: list | None, layer: keras.layers.Layer) -> None:
    """Enables LoRA in a built layer like one that has it.

    Args:
        adapter: From `adapter` of the other layer.
        layer: The layer. One that has an adapter already is left alone.
    """
    if adapter is not None and layer.built and not layer.lora_enabled:
        rank, alpha = adapter
        layer.enable_lora(rank, lora_alpha=alpha)


def kernel(layer: keras.layers.Layer) -> keras.Variable:
    """Returns the kernel variable of a dense or convolutional layer.

    Where adapters are possible, `layer.kernel` is their sum, not a variable.
    """
    return layer._kernel if hasattr(layer, "_kernel") else layer.kernel


def embeddings(layer: keras.layers.Layer) -> keras.Variable:
    """Returns the table of an embedding, without an adapter."""
    return layer._embeddings


def copy_remat_mode(
    source: keras.layers.Layer, target: keras.layers.Layer
) -> None:
    """Copies how a layer is rematerialised, which no configuration holds."""
    target._remat_mode = source._remat_mode


def reduced(state: tuple) -> tuple:
    """Returns what `pickle` needs of a layer, without the layer's class.

    Args:
        state: What Keras returns, which names the class of the layer. A
            generated class cannot be found by its name.
    """
    return (keras.layers.Layer._unpickle_model, *state[1:])


def accept_training(layer: keras.layers.Layer) -> dict[str, Any]:
    """Lets Keras hand `training` to a layer whose `call` was replaced.

    Keras reads the signature of `call` when the layer is made.

    Returns:
        What it changed, for `restore_call`.
    """
    before = {name: getattr(layer, name) for name in _CALL_ATTRIBUTES}
    before["_call_has_context_arg"] = dict(layer._call_has_context_arg)
    layer._call_signature = with_training(layer._call_signature)
    layer.call_signature_parameters = list(layer._call_signature.parameters)
    layer._call_has_training_arg = True
    layer._call_has_context_arg["training"] = True
    return before


# What Keras knows of the arguments of a layer's `call`.
_CALL_ATTRIBUTES = (
    "_call_signature",
    "call_signature_parameters",
    "_call_has_training_arg",
    "_call_has_context_arg",
)


def restore_call(layer: keras.layers.Layer, before: dict[str, Any]) -> None:
    """Undoes `accept_training`.

    Args:
        layer: The layer.
        before: What `accept_training` returned.
    """
    for name, value in before.items():
        setattr(layer, name, value)


def with_training(signature: inspect.Signature) -> inspect.Signature:
    """Returns a signature that has the parameter `training`."""
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
    """Returns the `training` of the Keras call that is running."""
    missing = object()
    context = layer._get_call_context()
    training = context.get_value("training", missing)
    if training is missing:
        # No call was running, and Keras has opened one for this layer.
        layer._maybe_reset_call_context()
        return False
    return bool(training)


def is_after_shapes() -> bool:
    """Returns whether Keras runs a call for the shapes of its outputs alone."""
    with keras.SymbolicScope() as scope:
        return scope.original_scope is not None


@contextmanager
def unlocked(layer: keras.layers.Layer) -> Iterator[None]:
    """Lets a built layer get further variables and sublayers."""
    locked = layer._tracker.locked
    layer._tracker.unlock()
    try:
        yield
    finally:
        if locked:
            layer._tracker.lock()


def remove_sublayer(layer: keras.layers.Layer, name: str) -> None:
    """Removes an attribute that is a layer, also from what Keras tracks.

    Args:
        layer: The layer that has the attribute, built or not.
        name: The attribute's name.
    """
    inner = getattr(layer, name)
    delattr(layer, name)
    layer._tracker.untrack(inner)


def uncompile(model: keras.Model) -> None:
    """Makes a model as it was before `compile`, without optimizer and metrics.

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
    """Lets `predict` and the like compile again what they call.

    A function that was compiled before the scope knows nothing of it.

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
    """Returns whether a variable has a copy on each of several replicas."""
    value = variable._value
    return (
        isinstance(value, tf.distribute.DistributedValues)
        and len(value.values) > 1
    )


@contextmanager
def reading_stored() -> Iterator[None]:
    """Lets variables read as if no `SubstitutionScope` were open."""
    before = getattr(_local, "reads_stored", False)
    _local.reads_stored = True
    try:
        yield
    finally:
        _local.reads_stored = before


class SubstitutionScope(keras.StatelessScope):
    """Gives some variables other values, and changes nothing else.

    Unlike in Keras's own scope, what is assigned inside reaches its variable at
    once: batch statistics, states of recurrent layers, metrics. Scopes nest.

    A subclass overrides `substitute` and `assigned_value`.
    """

    def __init__(self) -> None:
        super().__init__(collect_losses=True)
        self._outer = None
        self._outer_substitution = None

    def hand_on_losses(self, layer: keras.layers.Layer) -> None:
        """Gives the collected losses to the layers that added them.

        Args:
            layer: The layer that was called in the scope, which is closed.
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
        """Returns the value that a variable is to have, None for its own."""
        raise NotImplementedError

    def assigned_value(self, variable: keras.Variable, value: Any) -> Any:
        """Returns what is assigned to a variable where `value` was to be."""
        raise NotImplementedError

    def get_current_value(self, variable: keras.Variable) -> tf.Tensor | None:
        """Returns the value for Keras, None for the variable's own."""
        if not getattr(_local, "reads_stored", False):
            with reading_stored():
                value = self.substitute(variable)
            if value is not None:
                return value
        if self._outer is None:
            return None
        return self._outer.get_current_value(variable)

    def add_update(self, update: tuple) -> None:
        """Assigns to a variable as if this scope were not there."""
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
    """Returns the value of a variable in the dtype in which it is stored.

    Neither a `SubstitutionScope` nor the dtype policy of a layer that is being
    called changes it; the mapping of a plain `keras.StatelessScope` does.
    """
    scope = getattr(_local, "scope", None)
    if scope is None:
        return tf.convert_to_tensor(variable.value)
    with reading_stored():
        value = scope.get_current_value(variable)
    if value is None:
        value = variable._value
    if value is None:  # Not initialised: Keras is only after shapes.
        value = variable.value
    return tf.convert_to_tensor(value)


def inner_optimizers(
    optimizer: keras.optimizers.Optimizer,
) -> list[keras.optimizers.Optimizer]:
    """Returns the optimizers that update variables: itself, or those inside.

    Args:
        optimizer: Any optimizer, also one that scales the loss or gives
            variables to other optimizers. The latter knows them once built.
    """
    inner = getattr(optimizer, "inner_optimizer", None)
    if inner is not None:
        return inner_optimizers(inner)
    inner = getattr(optimizer, "optimizers", None)
    return [optimizer] if inner is None else list(inner)


def exclude_from_weight_decay(
    optimizer: keras.optimizers.Optimizer, variables: Iterable[keras.Variable]
) -> None:
    """Adds variables to those that an optimizer does not decay.

    Keras's method of that name forgets what was excluded before.

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
    """Returns whether weight decay, if there is any, acts on a variable.

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
