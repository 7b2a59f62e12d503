"""Makes whole models sparse, and converts them to plain models."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from sos import keras_compat
from sos.advice import warn
from sos.arguments import check_number, format_values
from sos.copying import copy_model
from sos.errors import ArgumentError, UsageError
from sos.masks import keep_count
from sos.plan import Assignment, Reasons, Rules, make_plan
from sos.rankings import PerTensorRanking, undecided
from sos.wrappers.base import (
    SparseWrapper,
    check_keras_layer,
    core,
    find_wrappers,
)
from sos.wrappers.fixed_mask import FixedMask
from sos.wrappers.sparse_layer import (
    as_plain,
    attach,
    bind,
    detach,
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
    """Applies a technique that makes a model sparse while it trains.

    `technique` applies to all trainable weights of rank 2 or more, except
    biases and the exceptions in `rules`. `sos.sparsity_report` shows the
    technique of every weight, or why it stays dense.

    The model keeps its class and its methods. Layers with sparse weights become
    instances of a generated subclass of their class, with the techniques in
    `layer.techniques`. So do subclassed models and layers that contain them.
    Weights are sparse in every call of their layer. Code that reads a weight
    directly (`self.dense.kernel`) gets the sparse value inside the `call` of a
    layer or subclassed model that contains it, and inside `sos.frozen`. A
    `Lambda` layer contains no weights, and reads dense ones.

    Technique, rules and hyperparameters can be names and numbers of a config:
    `sos.sparsify(model, **config.sparsity)`.

    Args:
        model: A Keras 3 model that is built.
        technique: A registered technique or its name; None leaves all weights
            dense that no rule matches.
        rules: Exceptions, as a mapping or a sequence of pairs. A key is a
            regular expression, for weights in whose path `re.search` finds it
            (paths as in the report, without the model's name); a layer of
            `model`, for its weights and its sublayers'; or a weight of `model`,
            such as `layer.kernel` (in pairs, as a Keras variable cannot be a
            key of a mapping). A value is None to leave the weights dense, a
            technique or its name, or a dictionary of hyperparameters, which may
            have the key `technique`. A rule inherits hyperparameters that it
            does not change, unless it has another technique.
        copy: Whether the result gets copies of the layers and weights. If not,
            `model` itself becomes sparse.
        **hyperparameters: Hyperparameters of the technique
            (`sos.extend.hyperparameters` lists them), or objects that replace
            several of them, such as `schedule`.

    Returns:
        A model of the class of `model`, with the same weights, to compile and
        train with `sos.SparsityCallback` or `sos.SparsityUpdater`.

    Raises:
        TypeError: If `model` is not a Keras 3 model or cannot be copied, or if
            a hyperparameter is unknown, missing or excluded by another, or a
            rule is of a wrong type.
        UsageError: If `model` is not built or already sparse, a hyperparameter
            is out of range, a rule matches no weight or its key is not part of
            `model`, two rules match one weight, or all weights stay dense.

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
    ...     rules={model.get_layer("logits"): {"sparsity": 0.5}},
    ... )
    >>> [layer.techniques[0].target_sparsity() for layer in sparse.layers]
    [0.9, 0.5]
    >>> sparse = sos.sparsify(model, "L0Regularization", num_examples=60_000)
    """
    _check_model(model, "sparsify")
    plan, reasons = make_plan(model, technique, rules, hyperparameters)
    sparse, _ = _make_sparse(model, plan, reasons, copy)
    return sparse


def prune(
    model: keras.Model,
    sparsity: float,
    *,
    rules: Rules | None = None,
    copy: bool = True,
) -> keras.Model:
    """Prunes a trained model at once, by magnitude.

    In each trainable weight of rank 2 or more, except biases, the elements of
    the smallest magnitude get a mask of 0. Of n elements exactly
    `round(n * (1 - sparsity))` are kept, but at least one; among equal
    magnitudes the first. The masks do not change in training (`sos.FixedMask`).
    Pruned elements are zero in every call. `layer.kernel` still has their
    values, which `sos.set_masks` can restore.

    Pruning gradually in training loses less accuracy: use `sos.sparsify` with
    "MagnitudePruning".

    Args:
        model: A Keras 3 model that is built.
        sparsity: Fraction of zeros in each weight, in [0, 1).
        rules: Exceptions, with keys as for `sos.sparsify`. The values are None
            to leave the weights dense, or `{"sparsity": number}`.
        copy: Whether the result gets copies of the layers and weights. If not,
            `model` itself becomes sparse.

    Returns:
        A model of the class of `model`. Evaluate it, fine-tune it with
        `callbacks=[sos.SparsityCallback()]`, save it or `sos.strip` it.

    Raises:
        TypeError: If `model` is not a Keras 3 model or cannot be copied, or if
            a rule is of a wrong type.
        UsageError: If `model` is not built or sparse already, a sparsity is out
            of range, a weight is NaN, a rule matches no weight or its key is
            not part of `model`, two rules match one weight, or nothing is left
            to prune. Then nothing changes.

    Warns:
        SparsityWarning: If the magnitudes of a weight are all equal, and it
            stays dense, or if a weight keeps one element although its sparsity
            leaves none.

    Example:
    >>> import keras, sos
    >>> model = keras.Sequential(
    ...     [
    ...         keras.Input((16,)),
    ...         keras.layers.Dense(8, name="hidden"),
    ...         keras.layers.Dense(4, name="logits"),
    ...     ]
    ... )
    >>> pruned = sos.prune(model, 0.75, rules={"logits": {"sparsity": 0.5}})
    >>> for path, mask in sos.get_masks(pruned).items():
    ...     print(path, f"keeps {mask.sum()} of {mask.size}")
    hidden/kernel keeps 32 of 128
    logits/kernel keeps 16 of 32
    """
    _check_model(model, "prune")
    sparsity = check_number(
        "sparsity", sparsity, "[0, 1)", ", the fraction of zeros"
    )
    plan, reasons = make_plan(model, FixedMask, rules, {"sparsity": sparsity})
    sparsities: dict[int, float] = {}
    paths: dict[int, str] = {}
    for assignment in plan:
        value = _sparsity_of_rule(assignment)
        sparsities.update(dict.fromkeys(assignment.paths, value))
        paths.update(assignment.paths)
        # With a sparsity, `FixedMask` would create a random mask.
        assignment.arguments = {}
    variables = {
        position: variable
        for position, (_, variable) in enumerate(owners(model))
        if position in paths
    }
    masks, unranked = _magnitude_masks(variables, sparsities, paths)
    sparse, weights = _make_sparse(model, plan, reasons, copy)
    for position, mask in masks.items():
        weights[position].state["mask"].assign(mask)
    # Last, as a warning may be an error.
    _warn_of_masks(masks, sparsities, paths, unranked)
    return sparse


def _sparsity_of_rule(assignment: Assignment) -> float:
    """Returns the sparsity to which `prune` prunes some weights of a layer."""
    weights = list(assignment.paths.values())
    if assignment.technique is not FixedMask or set(assignment.arguments) != {
        "sparsity"
    }:
        raise UsageError(
            'A rule of `prune` must be None or {"sparsity": number}. For the '
            f"weights {weights} it has: "
            f"technique={assignment.technique.__name__}, "
            f"{assignment.arguments}. For other techniques use `sos.sparsify`."
        )
    return check_number(
        "sparsity",
        assignment.arguments["sparsity"],
        "[0, 1)",
        f", the fraction of zeros, also in the rule for {weights}",
    )


def _magnitude_masks(
    variables: dict[int, keras.Variable],
    sparsities: dict[int, float],
    paths: dict[int, str],
) -> tuple[dict[int, Any], set[int]]:
    """Computes masks by magnitude.

    Args:
        variables: Weights by any keys.
        sparsities: Sparsities by the same keys.
        paths: Paths by the same keys.

    Returns:
        The masks by key, and the keys of weights whose magnitudes are all
        equal, with masks of ones.

    Raises:
        UsageError: If a weight is NaN.
    """
    scores = {
        key: keras.ops.abs(keras_compat.stored_value(variable))
        for key, variable in variables.items()
    }
    invalid = [
        paths[key]
        for key, score in scores.items()
        if keras.ops.any(keras.ops.isnan(score))
    ]
    if invalid:
        raise UsageError(
            "`prune` cannot rank NaN. Find the step at which the weights "
            "became NaN (`keras.callbacks.TerminateOnNaN` stops there). "
            f"Received: NaN in {format_values(invalid)}"
        )
    ranking = PerTensorRanking()
    values = list(scores.values())
    masks = ranking.masks(values, [sparsities[key] for key in scores])
    by_key = dict(zip(scores, masks, strict=True))
    equal = undecided(ranking, values, masks)
    unranked = {key for key, same in zip(scores, equal, strict=True) if same}
    for key in unranked:
        by_key[key] = np.ones(variables[key].shape, "uint8")
    return by_key, unranked


def _warn_of_masks(
    masks: dict[int, Any],
    sparsities: dict[int, float],
    paths: dict[int, str],
    unranked: set[int],
) -> None:
    for key, mask in masks.items():
        size = int(np.prod(mask.shape))
        if key in unranked:
            warn(
                f"The magnitudes of {paths[key]} are all equal: `sos.prune` "
                "has no order in which to prune its elements, and it stays "
                "dense. Load or train the weights before you prune, or leave "
                "it dense by a rule."
            )
        elif size and not keep_count(size, sparsities[key]):
            warn(
                f"A sparsity of {sparsities[key]:.6g} leaves none of the "
                f"{size} elements of {paths[key]}: it keeps 1. Lower its "
                "sparsity, or leave it dense by a rule."
            )


def _make_sparse(
    model: keras.Model, plan: Sequence[Assignment], reasons: Reasons, copy: bool
) -> tuple[keras.Model, dict[int, SparseWeight]]:
    """Makes a model sparse as planned.

    Args:
        model: The model of the plan.
        plan: Assignments from `make_plan`.
        reasons: Reasons from `make_plan`.
        copy: As for `sparsify`.

    Returns:
        The sparse model, and its sparse weights by their position in
        `sparse_layer.owners`.
    """
    sparse = copy_model(model) if copy else model
    before = list(owners(model))
    after = list(owners(sparse))
    sparse_reasons = Reasons()
    for (_, old), (_, new) in zip(before, after, strict=True):
        reason = reasons.get(old)
        if reason is not None:
            sparse_reasons.add(new, reason)
    weights: dict[int, SparseWeight] = {}
    try:
        for assignment in plan:
            new = _attach(after, assignment)
            weights.update(zip(assignment.paths, new, strict=True))
        bind(sparse, weights.values())
    except BaseException:
        # The model may be the user's own, not a copy.
        detach(sparse)
        raise
    sparse.sparsity_reasons = sparse_reasons
    _forget_traces(sparse)
    return sparse, weights


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
    """Drops compiled functions, which contain the calls of dense layers."""
    for inner in keras_compat.all_layers(model):
        for name in ("train", "test", "predict"):
            if getattr(inner, f"{name}_function", None) is not None:
                getattr(inner, f"make_{name}_function")(force=True)
        # KerasHub's generative models.
        if getattr(inner, "generate_function", None) is not None:
            inner.generate_function = None


def strip(
    model: keras.layers.Layer, *, copy: bool = True
) -> keras.layers.Layer:
    """Converts a sparse model to a plain Keras model with zeros in its weights.

    Its outputs are the evaluation outputs of the sparse model. It does not
    depend on `sos`, nor do files that it is saved to. A model without sparse
    layers does not change.

    Args:
        model: A model or layer, sparse or plain.
        copy: Whether the result gets copies of the layers and weights. If not,
            `model` itself becomes plain: its weights get their zeros, and the
            variables of the techniques are removed. This needs layers that
            `sos.sparsify` or `sos.prune` made sparse, not wrappers. Compile it
            again, and models that contain it: their optimizers and compiled
            functions may refer to the removed variables.

    Returns:
        A model or layer of the original class; `model` itself with
        `copy=False`. Then it is not compiled if it was sparse.

    Raises:
        TypeError: If `model` is not a Keras 3 model or layer.
        UsageError: If a subclassed layer or model contains a wrapper, which
            only its own code could replace. With `copy=False`, if there are
            wrappers, the model is being trained, or `sos.frozen` or
            `sos.sampled` is open. Then nothing changes.

    Example:
    >>> import keras, sos
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(8)])
    >>> plain = sos.strip(sos.prune(model, 0.75))
    >>> sos.sparse_layers(plain)
    []
    >>> sos.sparsity_report(plain).rows[0]["sparsity"]
    0.75
    """
    check_keras_layer(model, "strip")
    techniques = find_wrappers(model)
    if not copy:
        _strip_in_place(model, techniques)
        return model
    _check_wrappers(model)
    with as_plain(keras_compat.all_layers(model)):
        plain = copy_model(model, replace=core)
    pairs = zip(
        plain_weights(core(model)), plain_weights(core(plain)), strict=True
    )
    values = {
        id(variable): value
        for variable, value in _evaluation_values(techniques)
    }
    for old, new in pairs:
        if id(old) in values:
            new.assign(values[id(old)])
    return plain


def _strip_in_place(
    model: keras.layers.Layer, techniques: Sequence[SparseWrapper]
) -> None:
    wrappers = [t.name for t in techniques if not t.attached]
    if wrappers:
        raise UsageError(
            f"The wrappers {wrappers} cannot be replaced in place: other "
            "layers refer to them. Use `strip(model, copy=True)`, or make "
            "models sparse with `sos.sparsify`. Received: copy=False"
        )
    if keras_compat.substitution_scope() is not None:
        # Assignments inside keep the values of masked elements.
        raise UsageError(
            "`strip` cannot change weights inside `sos.frozen`, `sos.sampled` "
            "or the call of a sparse layer. Close the scope before "
            "`strip(model, copy=False)`, or copy the model. "
            "Received: copy=False"
        )
    training = [t.layer.name for t in techniques if t.step_counter.bound]
    if training:
        raise UsageError(
            f"The layers {training} are being trained. Leave the scope of "
            "`sos.SparsityUpdater`, or wait for the end of `fit`, before "
            "`strip(model, copy=False)`, or copy the model. "
            "Received: copy=False"
        )
    values = _evaluation_values(techniques)
    layers = [
        layer
        for layer in keras_compat.all_layers(model)
        if not isinstance(layer, SparseWrapper)
    ]
    detach(model)
    for variable, value in values:
        variable.assign(value)
    if not techniques:
        return
    for layer in layers:
        if "sparsity_reasons" in vars(layer):
            del layer.sparsity_reasons
        if isinstance(layer, keras.Model):
            keras_compat.uncompile(layer)


def _evaluation_values(
    techniques: Sequence[SparseWrapper],
) -> list[tuple[keras.Variable, Any]]:
    """Returns pairs of sparse weights and their values in evaluation."""
    return [
        (weight.variable, value)
        for technique in techniques
        for weight, value in technique.evaluation_weights().items()
    ]


def _check_wrappers(layer: keras.layers.Layer) -> None:
    """Raises an error if a subclassed layer or model contains a wrapper."""
    layer = core(layer)
    for inner in keras_compat.sublayers(layer):
        if isinstance(inner, SparseWrapper) and inner.attached:
            continue
        if isinstance(inner, SparseWrapper) and (
            type(layer) not in graph_classes()
        ):
            raise UsageError(
                f"The layer {layer.name!r} of class {type(layer).__name__} "
                "contains wrappers, which only its own code could replace. "
                "Build the layer without them, and assign the values of "
                "`wrapper.evaluation_weights()` to its weights. Or use "
                "`sos.sparsify` on the plain layer, which can be stripped."
            )
        _check_wrappers(inner)


def _check_model(model: Any, function: str) -> None:
    if not isinstance(model, keras.Model):
        module = type(model).__module__
        advice = (
            "Wrap a single layer with the technique itself, as in "
            "`sos.MagnitudePruning(layer, ...)`."
            if isinstance(model, keras.layers.Layer)
            else "Models of `tf_keras`, and of `tf.keras` with "
            "TF_USE_LEGACY_KERAS, are Keras 2 models."
        )
        raise ArgumentError(
            f"`{function}` takes a model of Keras 3 "
            f"({keras.__version__} here). {advice} Received: {model!r} of type "
            f"{module}.{type(model).__name__}"
        )
    if not model.built:
        raise UsageError(
            f"The model {model.name!r} has no weights yet, as it is not built. "
            "Give it an `Input`, or call it on a batch, before "
            f"`{function}`."
        )
    if find_wrappers(model):
        raise UsageError(
            f"The model {model.name!r} has sparse layers already. For several "
            "techniques call `sparsify` once, with `rules`; or `strip` the "
            "model first."
        )
