"""Checks that a model under masks of ones is its dense self, bit for bit."""

import re
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import sos
from sos.wrappers.base import find_wrappers
from tests.support.layers import BATCH


def ones(model: keras.Model, **kwargs: Any) -> keras.Model:
    """Returns a copy of a model with masks of ones."""
    return sos.sparsify(model, "FixedMask", sparsity=0.0, **kwargs)


def halves(model: keras.Model, **kwargs: Any) -> keras.Model:
    """Returns a copy of a model with random masks, half of them zeros."""
    return sos.sparsify(model, "FixedMask", sparsity=0.5, **kwargs)


def own_variables(layer: keras.layers.Layer) -> list[keras.Variable]:
    """Returns the variables that the dense layer has too, in order."""
    state = {
        id(variable)
        for wrapper in find_wrappers(layer)
        for weight in wrapper.sparse_weights
        for variable in weight.state.values()
    }
    return [v for v in layer.variables if id(v) not in state]


def masked_values(model: keras.Model) -> list[np.ndarray]:
    """Returns the values of the dense model's variables, with zeros."""
    masks = {
        id(weight.variable): weight.state["mask"].numpy()
        for wrapper in find_wrappers(model)
        for weight in wrapper.sparse_weights
    }
    return [v.numpy() * masks.get(id(v), 1) for v in own_variables(model)]


def assert_bits(a: Any, b: Any, what: str = "values") -> None:
    """Asserts that two structures hold the same bits.

    Args:
        a: Arrays, tensors or numbers in any structure.
        b: The same structure.
        what: What they are, for the message.
    """
    keras.tree.assert_same_structure(a, b)
    for x, y in zip(keras.tree.flatten(a), keras.tree.flatten(b), strict=True):
        x, y = (np.asarray(keras.ops.convert_to_numpy(v)) for v in (x, y))
        assert (x.dtype, x.shape) == (y.dtype, y.shape), what
        # A comparison of values gives the better message.
        np.testing.assert_array_equal(x, y, err_msg=what)
        assert x.tobytes() == y.tobytes() or x.dtype == object, what


def without_number(name: str) -> str:
    """Returns a name without the number that Keras may have given it."""
    return re.sub(r"_\d+$", "", name)


def names(model: keras.Model) -> list[str]:
    """Returns the names of a model's layers."""
    return [without_number(layer.name) for layer in model.layers]


def kinds(layer: keras.layers.Layer) -> list[tuple]:
    """Returns what identifies each variable of the dense layer."""
    return [
        # Paths depend on how Keras built the layer, from a call or a file.
        (without_number(v.name), v.dtype, tuple(v.shape), v.trainable)
        for v in own_variables(layer)
    ]


def assert_same_state(
    dense: keras.layers.Layer, sparse: keras.layers.Layer
) -> None:
    """Asserts that two models have equal variables, and trainable flags."""
    assert kinds(dense) == kinds(sparse)
    pairs = zip(own_variables(dense), own_variables(sparse), strict=True)
    for a, b in pairs:
        assert_bits(a, b, a.path)
    trainable = [v.path for v in dense.trainable_variables]
    assert len(trainable) == len(sparse.trainable_variables)
    optimizers = [getattr(m, "optimizer", None) for m in (dense, sparse)]
    if None not in optimizers:
        before, after = ([v.numpy() for v in o.variables] for o in optimizers)
        assert_bits(before, after, "variables of the optimizer")


def two_batches(x: Any, outputs: int = 2) -> tf.data.Dataset:
    """Returns two batches of inputs and targets.

    Args:
        x: One batch, as the model takes it. The second one is its reverse.
        outputs: The size of the model's output, of rank 2.
    """
    generator = np.random.default_rng(7)
    y = generator.normal(size=(2 * BATCH, outputs)).astype("float32")
    x = keras.tree.map_structure(lambda v: np.concatenate([v, v[::-1]]), x)
    if isinstance(x, list):
        x = tuple(x)
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(
        BATCH, drop_remainder=True
    )


def compile_model(
    model: keras.Model, eager: bool, *, rate: float = 0.05, **kwargs: Any
) -> None:
    """Compiles a model with momentum, without XLA."""
    kwargs.setdefault("loss", "mse")
    optimizer = keras.optimizers.SGD(rate, momentum=0.9)
    model.compile(optimizer, run_eagerly=eager, jit_compile=False, **kwargs)


def fit(model: keras.Model, data: Any) -> dict[str, list[float]]:
    """Trains a model on all batches and returns the logs."""
    driven = any(wrapper.needs_step for wrapper in find_wrappers(model))
    callbacks = [sos.SparsityCallback()] * driven
    logs = model.fit(data, callbacks=callbacks, shuffle=False, verbose=0)
    return {k: v for k, v in logs.history.items() if k != "sparsity"}


def evaluate(model: keras.Model, data: Any) -> dict[str, float]:
    """Evaluates a model and returns the logs."""
    return model.evaluate(data, return_dict=True, verbose=0)


def predict(model: keras.Model, data: Any) -> Any:
    """Returns the outputs of a model for the first batch."""
    return model.predict(data.take(1), verbose=0)


def save_and_load(model: keras.Model, directory: Any) -> keras.Model:
    """Returns a model from the file that it was saved to."""
    path = directory / "model.keras"
    model.save(path)
    return keras.models.load_model(path)


def equalize_seeds(
    dense: keras.layers.Layer, sparse: keras.layers.Layer
) -> None:
    """Gives random generators equal states, which Keras does not save."""
    pairs = zip(own_variables(dense), own_variables(sparse), strict=True)
    for a, b in pairs:
        if a.name == "seed_generator_state":
            b.assign(a)


def assert_same(
    action: Callable[..., Any], dense: Any, sparse: Any, *args: Any
) -> None:
    """Asserts that something gives the same for both models."""
    what = f"{action.__name__} of {dense.name}"
    assert_bits(action(dense, *args), action(sparse, *args), what)


def assert_identity(
    dense: keras.Model,
    data: Any,
    directory: Any,
    *,
    eager: bool = True,
    thorough: bool = True,
    sparse: keras.Model | None = None,
    **kwargs: Any,
) -> keras.Model:
    """Asserts all of the property, for a model without state between calls.

    Args:
        dense: The model, built.
        data: Two batches for it.
        directory: Where to save; None where Keras could not load the file.
        eager: Whether steps run eagerly, which takes less time than a trace.
        thorough: Whether to train what was loaded, and to look at outputs
            beside losses.
        sparse: The same model under masks of ones; made by default.
        **kwargs: As for `compile_model`.

    Returns:
        The sparse model, trained.
    """
    whole = sparse is None
    sparse = ones(dense) if whole else sparse
    if whole:
        assert isinstance(sparse, type(dense))
        assert sparse.name == dense.name
        assert names(sparse) == names(dense)
    assert_same_state(dense, sparse)
    assert find_wrappers(sparse)
    for model in (dense, sparse):
        compile_model(model, eager, **kwargs)
    if thorough:
        assert_same(predict, dense, sparse, data)
    assert_same(fit, dense, sparse, data)
    assert_same_state(dense, sparse)
    if thorough:
        assert_same(evaluate, dense, sparse, data)
    assert_same(predict, dense, sparse, data)
    assert len(dense.losses) == len(sparse.losses)

    if directory is not None:
        assert_same_in_files(dense, sparse, data, directory, eager, thorough)

    plain = sos.strip(sparse)
    if whole:
        assert type(plain) is type(dense)
    assert kinds(plain) == kinds(dense)
    assert_bits(
        [v.numpy() for v in plain.variables],
        [v.numpy() for v in dense.variables],
        "variables after `strip`",
    )
    compile_model(plain, eager)
    assert_same(predict, dense, plain, data)
    return sparse


def assert_same_in_files(
    dense: keras.Model,
    sparse: keras.Model,
    data: Any,
    directory: Any,
    eager: bool,
    thorough: bool = True,
) -> None:
    """Asserts that compiled models are saved, loaded and trained on alike."""
    loaded = [save_and_load(model, directory) for model in (dense, sparse)]
    assert len(find_wrappers(loaded[1])) == len(find_wrappers(sparse))
    # Saving has changed nothing.
    assert_same_state(dense, sparse)
    equalize_seeds(*loaded)
    assert_same_state(*loaded)
    for model in loaded:
        # Keras does not save it.
        model.run_eagerly = eager
    assert_same(predict, *loaded, data)
    if thorough:
        assert_same(fit, *loaded, data)
        assert_same_state(*loaded)
