"""Weight decay leaves the variables of techniques alone."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import sos
from sos import keras_compat
from sos.advice import SparsityWarning
from sos.weight_decay import decayed_techniques, exclude_techniques
from tests.support import techniques


class DecayOnly(keras.optimizers.Optimizer):
    """Decays by a twentieth of a weight a step, and does nothing else."""

    def __init__(self, **kwargs):
        super().__init__(learning_rate=0.1, weight_decay=0.5, **kwargs)

    def update_step(self, gradient, variable, learning_rate):
        pass


def state(model):
    return [
        variable.numpy()
        for wrapper in model.layers
        for weight in wrapper.sparse_weights
        for variable in weight.state.values()
    ]


def kernels(model):
    return [wrapper.layer.kernel.numpy() for wrapper in model.layers]


def check(model, before, steps):
    for old, new in zip(before[0], state(model), strict=True):
        np.testing.assert_array_equal(old, new)
    for old, new in zip(before[1], kernels(model), strict=True):
        np.testing.assert_allclose(new, old * 0.95**steps, rtol=1e-5)


def _one_for_all():
    optimizer = DecayOnly()
    return lambda variable: optimizer


OPTIMIZERS = {
    "itself": DecayOnly,
    "accumulation": lambda: DecayOnly(gradient_accumulation_steps=2),
    "loss_scaling": lambda: keras.optimizers.LossScaleOptimizer(
        DecayOnly(), initial_scale=1.0
    ),
    "map": lambda: keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(DecayOnly(), {".*/kernel": DecayOnly()})
    ),
    "function": lambda: keras.optimizers.MultiOptimizer(_one_for_all()),
}


# The kind of the technique and that of the optimizer do not meet in the code.
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("VariationalDropout", "itself"),
        *(("L0Regularization", kind) for kind in OPTIMIZERS),
    ],
)
def test_fit_decays_weights_but_not_what_a_technique_adds(name, kind):
    model = techniques.mlp(name)
    optimizer = OPTIMIZERS[kind]()
    model.compile(optimizer, "mse")
    before = state(model), kernels(model)
    x, y = techniques.batch(8)
    for _ in range(2):
        model.fit(
            x, y, batch_size=2, verbose=0, callbacks=[sos.SparsityCallback()]
        )
    check(model, before, steps=4 if kind == "accumulation" else 8)


@pytest.mark.parametrize(
    ("name", "replicas"), [("L0Regularization", 2), ("VariationalDropout", 1)]
)
def test_loops_decay_weights_but_not_what_a_technique_adds(name, replicas):
    strategy = (
        techniques.two_replicas()
        if replicas == 2
        else tf.distribute.get_strategy()
    )
    with strategy.scope():
        model = techniques.mlp(name)
        optimizer = DecayOnly()
        optimizer.build(model.trainable_variables)
    inner = techniques.train_step(model, optimizer).python_function
    step = tf.function(lambda x, y: strategy.run(lambda: inner(x, y)))

    def read(variables):
        return [keras.ops.convert_to_numpy(v).copy() for v in variables]

    added = [w.state for r in model.layers for w in r.sparse_weights]
    added = [v for values in added for v in values.values()]
    weights = [r.layer.kernel for r in model.layers]
    before = read(added), read(weights)
    with sos.SparsityUpdater(model, optimizer) as updater:
        for _ in range(3):
            step(*techniques.batch())
            updater.step()
    for old, new in zip(before[0], read(added), strict=True):
        np.testing.assert_array_equal(old, new)
    for old, new in zip(before[1], read(weights), strict=True):
        np.testing.assert_allclose(new, old * 0.95**3, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        (
            "VariationalDropout",
            lambda decay: keras.optimizers.AdamW(1e-3, weight_decay=decay),
        ),
        (
            "L0Regularization",
            # Its second rate is for what it leaves to Adam.
            lambda decay: keras.optimizers.Muon(
                1e-3, weight_decay=decay, adam_weight_decay=decay
            ),
        ),
    ],
)
def test_weight_decay_without_a_penalty_gives_no_sparsity(name, make):
    means = []
    for decay in (0.0, 100.0):
        model = techniques.mlp(name, penalty_weight=0.0)
        model.compile(make(decay), "mse", run_eagerly=True)
        x, y = techniques.batch(16)
        model.fit(
            x, y, batch_size=2, verbose=0, callbacks=[sos.SparsityCallback()]
        )
        means.append(np.mean([value.mean() for value in state(model)]))
    # Otherwise decay would leave 0.9^8 = 43 % of it.
    assert means[1] == pytest.approx(means[0], rel=0.02)


def test_exclude_techniques_keeps_the_exclusions_of_the_user():
    model = techniques.mlp("L0Regularization")
    optimizer = DecayOnly()
    optimizer.exclude_from_weight_decay(
        var_list=[model.layers[0].layer.kernel], var_names=["bias"]
    )
    exclude_techniques(model, optimizer)
    exclude_techniques(model, optimizer)
    decayed = [
        variable.path
        for variable in model.trainable_variables
        if keras_compat.decays(optimizer, variable)
    ]
    assert decayed == [model.layers[1].layer.kernel.path]


def test_exclude_techniques_of_no_decay_changes_nothing():
    model = techniques.mlp("L0Regularization")
    optimizer = keras.optimizers.Adam()
    before = set(vars(optimizer))
    exclude_techniques(model, optimizer)
    assert set(vars(optimizer)) == before


@pytest.mark.parametrize("how", ["exclude", "set"])
def test_weight_decay_that_comes_back_warns(how):
    model = techniques.mlp("L0Regularization")
    optimizer = DecayOnly() if how == "exclude" else keras.optimizers.SGD()
    model.compile(optimizer, "mse")

    class Change(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if how == "exclude":
                # Keras forgets what was excluded before.
                optimizer.exclude_from_weight_decay(var_names=["bias"])
            else:
                optimizer.weight_decay = 0.5

    x, y = techniques.batch(8)
    with pytest.warns(SparsityWarning, match="weight decay.*log_alpha"):
        model.fit(x, y, verbose=0, callbacks=[sos.SparsityCallback(), Change()])
    assert len(decayed_techniques(model, optimizer)) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error", SparsityWarning)
        model.fit(x, y, verbose=0, callbacks=[sos.SparsityCallback()])


# What is private of Keras.


@pytest.mark.oldest
def test_exclude_from_weight_decay_does_what_keras_does():
    variables = [keras.Variable(np.ones(2)) for _ in range(3)]
    found, expected = DecayOnly(), DecayOnly()
    expected.exclude_from_weight_decay(var_list=variables[:2])
    for variable in variables[:2]:
        keras_compat.exclude_from_weight_decay(found, [variable])
    for optimizer in (found, expected):
        decays = [keras_compat.decays(optimizer, v) for v in variables]
        assert decays == [False, False, True]
        optimizer.build(variables)
        assert list(keras_compat.trained_variables(optimizer)) == variables
        optimizer.apply([tf.ones(2)] * 3)
    values = [float(variable.numpy()[0]) for variable in variables]
    assert values == pytest.approx([1.0, 1.0, 0.95**2])


@pytest.mark.oldest
def test_inner_optimizers_of_each_kind_are_found():
    a, b = DecayOnly(), DecayOnly()
    for optimizer, inner in (
        (a, [a]),
        (keras.optimizers.LossScaleOptimizer(a), [a]),
        (
            keras.optimizers.MultiOptimizer(
                keras.optimizers.OptimizerMap(b, {"x": a})
            ),
            [a, b],
        ),
    ):
        assert keras_compat.inner_optimizers(optimizer) == inner
