"""Makes whole models sparse, and plain again."""

from typing import Any

import keras

from sos import keras_compat
from sos.copying import copy_model
from sos.errors import ArgumentError, UsageError
from sos.plan import Assignment, Reasons, Rules, make_plan
from sos.wrappers.base import SparseWrapper, core, find_wrappers
from sos.wrappers.sparse_layer import (
    as_plain,
    attach,
    bind,
    graph_classes,
    owners,
    plain_weights,
)
from sos.wrappers.sparse_weight import SparseWeight


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
    `technique` unless a rule says otherwise. `sos.sparsity_report` shows for
    every weight its technique, or why it stays dense.

    The model keeps its class and its methods. The layers that own the weights
    become instances of a generated subclass of their class, with the techniques
    in `layer.techniques`; so do subclassed models and layers that hold such
    layers. Weights are sparse in every call of a layer, from wherever it is
    made; what code reads for itself (`self.dense.kernel`) is sparse inside the
    `call` of the layers and subclassed models that hold the weight, and inside
    `sos.frozen`. A `Lambda` layer holds no weights: it reads dense ones.

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
            `model` itself becomes sparse.
        **hyperparameters: Hyperparameters of the technique
            (`sos.extend.hyperparameters` lists them), or objects that it takes
            in their place, such as `schedule`.

    Returns:
        A model of the class of `model`, with the same weights, to compile and
        train with `sos.SparsityCallback` or `sos.SparsityUpdater`.

    Raises:
        TypeError: If `model` is not a Keras 3 model or cannot be copied, or if
            a hyperparameter is unknown, missing or excluded by another.
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
    >>> [layer.techniques[0].target_sparsity() for layer in sparse.layers]
    [0.9, 0.5]
    """
    _check_model(model)
    plan, reasons = make_plan(model, technique, rules, hyperparameters)
    sparse = copy_model(model) if copy else model
    before = list(owners(model))
    after = list(owners(sparse))
    sparse_reasons = Reasons()
    for (_, old), (_, new) in zip(before, after, strict=True):
        reason = reasons.get(old)
        if reason is not None:
            sparse_reasons.add(new, reason)
    weights = [
        weight for assignment in plan for weight in _attach(after, assignment)
    ]
    bind(sparse, weights)
    sparse.sparsity_reasons = sparse_reasons
    _forget_traces(sparse)
    return sparse


def _attach(
    places: list[tuple[keras.layers.Layer, keras.Variable]],
    assignment: Assignment,
) -> tuple[SparseWeight, ...]:
    owner = places[next(iter(assignment.paths))][0]
    index = {id(v): i for i, v in enumerate(plain_weights(owner))}
    paths = {
        index[id(places[position][1])]: path
        for position, path in assignment.paths.items()
    }
    return attach(assignment.technique, owner, paths, assignment.arguments)


def _forget_traces(model: keras.Model) -> None:
    """Drops compiled functions, which know the calls as they were before."""
    for inner in keras_compat.all_layers(model):
        for name in ("train", "test", "predict"):
            if getattr(inner, f"{name}_function", None) is not None:
                getattr(inner, f"make_{name}_function")(force=True)
        # KerasHub's generative models.
        if getattr(inner, "generate_function", None) is not None:
            inner.generate_function = None


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
    _check_wrappers(model)
    with as_plain(keras_compat.all_layers(model)):
        plain = copy_model(model, replace=core)
    pairs = zip(
        plain_weights(core(model)), plain_weights(core(plain)), strict=True
    )
    values = {
        id(weight.variable): value
        for technique in find_wrappers(model)
        for weight, value in technique.evaluation_weights().items()
    }
    for old, new in pairs:
        if id(old) in values:
            new.assign(values[id(old)])
    return plain


def _check_wrappers(layer: keras.layers.Layer) -> None:
    """Raises if a wrapper is held by a layer that only its code replaces."""
    layer = core(layer)
    for inner in keras_compat.sublayers(layer):
        if isinstance(inner, SparseWrapper) and inner.attached:
            continue
        if isinstance(inner, SparseWrapper) and (
            type(layer) not in graph_classes()
        ):
            raise UsageError(
                f"The layer {layer.name!r} of class {type(layer).__name__} "
                "holds sparse layers that only its own code could replace. "
                "Build the layer without them, then assign to its weights the "
                "values of `wrapper.evaluation_weights()`; or make the plain "
                "layer sparse with `sos.sparsify`, which can be stripped."
            )
        _check_wrappers(inner)


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
