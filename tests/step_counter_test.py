import keras
import numpy as np
import pytest
import tensorflow as tf

import sos
from sos.step_counter import StepCounter
from tests.support import techniques

RAMP = sos.ramps.LinearRamp(begin_step=2, end_step=6)


def factor(step):
    """The closed form of RAMP."""
    return min(max((step - 2) / 4, 0.0), 1.0)


def shifts(steps):
    """What SGD with rate 1 makes of a `techniques.Shift` after each step."""
    return -np.cumsum([factor(t) for t in range(steps)])


def shift_model(uses=1):
    inputs = keras.Input((6,))
    layer = techniques.Shift(
        keras.layers.Dense(6, name="x"), penalty_weight=1.0, ramp=RAMP
    )
    outputs = inputs
    for _ in range(uses):
        outputs = layer(outputs)
    return keras.Model(inputs, outputs), layer


def data(size=8):
    return techniques.normal(size, 6), techniques.normal(size, 6, seed=1)


def test_step_without_an_optimizer_raises():
    counter = StepCounter()
    assert not counter.bound
    with pytest.raises(RuntimeError, match="SparsityCallback"):
        _ = counter.step
    optimizer = keras.optimizers.SGD()
    counter.bind(optimizer)
    optimizer.iterations.assign(41)
    assert counter.bound
    assert int(counter.step) == 41
    assert counter.step.dtype == tf.int32
    counter.unbind()
    assert not counter.bound


def test_step_counter_whose_owner_is_gone_is_unbound():
    class Owner:
        pass

    counter, owner = StepCounter(), Owner()
    counter.bind(keras.optimizers.SGD(), owner=owner)
    assert counter.bound
    del owner
    assert not counter.bound
    with pytest.raises(RuntimeError, match="SparsityCallback"):
        _ = counter.step


def test_step_is_read_anew_in_compiled_code():
    counter, optimizer = StepCounter(), keras.optimizers.SGD()
    counter.bind(optimizer)
    read = tf.function(lambda: counter.step)
    for step in (0, 3, 1000):
        optimizer.iterations.assign(step)
        assert int(read()) == step


@pytest.mark.parametrize("uses", [1, 3])
@pytest.mark.parametrize("jit_compile", [False, True])
def test_ramp_is_exact_at_every_step(uses, jit_compile):
    model, layer = shift_model(uses)
    optimizer = keras.optimizers.SGD(1.0, clipvalue=1.0)
    optimizer.build(model.trainable_variables)
    step = techniques.train_step(model, optimizer, jit_compile=jit_compile)
    found = []
    with sos.SparsityUpdater(model, optimizer) as updater:
        for _ in range(8):
            step(*data())
            updater.step()
            found.append(techniques.shift_of(layer))
    np.testing.assert_allclose(found, shifts(8), rtol=1e-6)


def test_loss_holds_the_penalty_of_its_step():
    model, layer = shift_model()
    (weight,) = layer.sparse_weights
    weight.state["shift"].assign(tf.ones((6, 6)))
    optimizer = keras.optimizers.SGD()
    with sos.SparsityUpdater(model, optimizer):
        for step in range(9):
            optimizer.iterations.assign(step)
            (penalty,) = model.losses
            assert float(penalty) == pytest.approx(36 * factor(step), rel=1e-6)
        optimizer.iterations.assign(0)


def fit_shift(optimizer, batches=12, **compile_settings):
    """Trains in `fit` and returns the shift after each call of the step."""
    model, layer = shift_model()
    model.compile(optimizer, "mse", **compile_settings)
    found = []
    watch = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: found.append(
            techniques.shift_of(layer)
        )
    )
    x, y = data(batches * 2)
    callbacks = [sos.SparsityCallback(), watch]
    model.fit(x, y, batch_size=2, verbose=0, callbacks=callbacks)
    return found


@pytest.mark.parametrize(
    "settings", [{}, {"jit_compile": True}, {"run_eagerly": True}]
)
def test_ramp_is_exact_in_fit(settings):
    found = fit_shift(keras.optimizers.SGD(1.0, clipvalue=1.0), **settings)
    np.testing.assert_allclose(found, shifts(12), rtol=1e-6)


def test_ramp_is_exact_in_blocks_of_steps():
    optimizer = keras.optimizers.SGD(1.0, clipvalue=1.0)
    found = fit_shift(optimizer, steps_per_execution=4)
    assert int(optimizer.iterations) == 12
    assert set(np.round(found, 5)) == set(np.round(shifts(12)[3::4], 5))


def test_accumulation_counts_steps_of_the_optimizer():
    optimizer = keras.optimizers.SGD(
        1.0, clipvalue=1.0, gradient_accumulation_steps=3
    )
    found = fit_shift(optimizer, batches=24)
    assert int(optimizer.iterations) == 8
    np.testing.assert_allclose(found[2::3], shifts(8), rtol=1e-6)


def accumulating(schedule):
    model = techniques.mlp("MagnitudePruning", schedule=schedule)
    recorder = techniques.Recorder()
    for wrapper in model.layers:
        wrapper.ranking = recorder
    return model, recorder


def test_accumulation_updates_masks_once_per_step():
    model, recorder = accumulating(techniques.Staircase(frequency=2))
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=3)
    model.compile(optimizer, "mse")
    x, y = techniques.batch(48)
    callbacks = [sos.SparsityCallback()]
    model.fit(x, y, batch_size=2, verbose=0, callbacks=callbacks)
    assert int(optimizer.iterations) == 8
    assert techniques.recorded(recorder.log) == [0, 2, 4, 6, 8]


def overflowing_step(model, optimizer):
    @tf.function
    def step(x, y, size):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True) - y))
            loss = loss * size + sum(model.losses, 0.0)
            scaled = optimizer.scale_loss(loss)
        variables = model.trainable_variables
        gradients = tape.gradient(scaled, variables)
        optimizer.apply_gradients(zip(gradients, variables, strict=True))

    return step


def test_overflow_stops_ramp_and_schedule_for_a_step():
    model, layer = shift_model()
    sgd = keras.optimizers.SGD(1.0, clipvalue=1.0)
    optimizer = keras.optimizers.LossScaleOptimizer(sgd, initial_scale=4.0)
    optimizer.build(model.trainable_variables)
    step = overflowing_step(model, optimizer)
    found, done = [], []
    with sos.SparsityUpdater(model, optimizer) as updater:
        for i in range(12):
            overflow = i in (0, 3, 4, 11)
            step(*data(), tf.constant(np.inf if overflow else 1e-3, tf.float32))
            updater.step()
            updater.step()  # changes nothing
            found.append(techniques.shift_of(layer))
            done.append(updater.iterations)
    assert done == [0, 1, 2, 2, 2, 3, 4, 5, 6, 7, 8, 8]
    expected = [0.0, *shifts(8)]
    np.testing.assert_allclose(found, [expected[n] for n in done], rtol=1e-6)


def test_overflow_repeats_no_mask_update():
    model, recorder = accumulating(techniques.Staircase(begin=1, frequency=2))
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.01))
    optimizer.build(model.trainable_variables)
    step = overflowing_step(model, optimizer)
    with sos.SparsityUpdater(model, optimizer) as updater:
        for size in (1, np.inf, np.inf, 1, 1, np.inf, 1, 1):
            step(*techniques.batch(), tf.constant(size, tf.float32))
            updater.step()
    assert techniques.recorded(recorder.log) == [1, 3, 5]


def test_float16_policy_in_fit_counts_each_step_once():
    keras.utils.set_random_seed(0)
    policy = keras.DTypePolicy("mixed_float16")
    recorder = techniques.Recorder()
    wrapper = sos.MagnitudePruning(
        keras.layers.Dense(2, dtype=policy),
        schedule=techniques.Staircase(),
        ranking=recorder,
    )
    model = keras.Sequential([keras.Input((6,)), wrapper])
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(0.01), initial_scale=2.0**30
    )
    model.compile(optimizer, "mse")
    x, y = techniques.batch(64)
    model.fit(x, y, batch_size=2, verbose=0, callbacks=[sos.SparsityCallback()])
    steps = int(optimizer.iterations)
    assert 0 < steps < 32  # the first steps overflow
    assert techniques.recorded(recorder.log) == list(range(steps + 1))
