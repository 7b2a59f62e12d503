import keras
import numpy as np
import pytest

import sos
from tests.support import techniques

NEEDY = [
    name for name in techniques.NAMES if sos.techniques()[name].needs_clock
]
PENALIZED = [
    name
    for name in techniques.NAMES
    if issubclass(sos.techniques()[name], sos.PenalizedWrapper)
]

needy_techniques = pytest.mark.parametrize("name", NEEDY)
# One of each kind, where every technique would take long.
two_techniques = pytest.mark.parametrize(
    "name", ["MagnitudePruning", "L0Regularization"]
)


def compiled(name, **settings):
    model = techniques.mlp(name, **settings)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


def fit(model, *callbacks, batches=4, **settings):
    x, y = techniques.batch(batches * 2)
    settings = {"batch_size": 2, "verbose": 0, **settings}
    return model.fit(x, y, callbacks=list(callbacks), **settings)


def check_refused(model, how=fit):
    before = [v.numpy() for v in model.variables]
    with pytest.raises(RuntimeError, match="SparsityCallback"):
        how(model)
    for old, new in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(old, new.numpy())


def train_on_batch(model):
    model.train_on_batch(*techniques.batch())


# Forgetting the callback.


@needy_techniques
@pytest.mark.parametrize("how", [fit, train_on_batch])
def test_training_without_the_callback_is_refused(name, how):
    check_refused(compiled(name), how)


@two_techniques
@pytest.mark.parametrize("how", [fit, train_on_batch])
def test_training_on_without_the_callback_is_refused(name, how):
    model = compiled(name)
    fit(model, sos.SparsityCallback())
    check_refused(model, how)
    fit(model, sos.SparsityCallback())
    assert int(model.optimizer.iterations) == 8
    check_refused(model, how)


@two_techniques
def test_compiling_again_does_not_bypass_the_callback(name):
    model = compiled(name)
    fit(model, sos.SparsityCallback())
    model.compile(keras.optimizers.SGD(0.1), "mse")
    check_refused(model)
    fit(model, sos.SparsityCallback())


class Interrupt(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 1:
            raise KeyboardInterrupt


@two_techniques
def test_an_interrupted_fit_leaves_no_way_around_the_callback(name):
    model = compiled(name)
    with pytest.raises(KeyboardInterrupt):
        fit(model, sos.SparsityCallback(), Interrupt())
    assert not any(wrapper.clock.bound for wrapper in model.layers)
    with pytest.raises(RuntimeError, match="nothing drives its clock"):
        model(techniques.batch()[0], training=True)
    check_refused(model, train_on_batch)
    check_refused(model, fit)
    fit(model, sos.SparsityCallback())
    assert int(model.optimizer.iterations) == 2 + 4


@pytest.mark.parametrize("name", PENALIZED)
@pytest.mark.parametrize("validated", [False, True])
def test_evaluation_after_an_interrupted_fit_has_no_penalty(name, validated):
    model = compiled(name, penalty_weight=1e3)
    model.optimizer.learning_rate = 0.0
    x, y = techniques.batch(8)
    if validated:
        # The compiled evaluation is made, and used again.
        model.evaluate(x, y, verbose=0)
    with pytest.raises(KeyboardInterrupt):
        fit(model, sos.SparsityCallback(), Interrupt())
    expected = ((model.predict(x, verbose=0) - y) ** 2).mean()
    assert model.evaluate(x, y, verbose=0) == pytest.approx(expected, rel=1e-5)


class Watch(keras.callbacks.Callback):
    """Notes whether the clocks are bound between the batches of `fit`."""

    def __init__(self):
        super().__init__()
        self.bound = []

    def on_train_batch_end(self, batch, logs=None):
        self.bound += [wrapper.clock.bound for wrapper in self.model.layers]

    on_epoch_end = on_train_batch_begin = on_train_batch_end


@two_techniques
def test_clocks_are_bound_while_a_compiled_step_runs_only(name):
    model, watch = compiled(name), Watch()
    fit(model, sos.SparsityCallback(), watch)
    assert watch.bound
    assert not any(watch.bound)


@pytest.mark.parametrize("name", techniques.NAMES)
def test_evaluate_and_predict_need_no_callback(name):
    model = compiled(name)
    x, y = techniques.batch()
    for trained in (False, True):
        loss = model.evaluate(x, y, verbose=0)
        outputs = model.predict(x, verbose=0)
        assert loss == pytest.approx(((outputs - y) ** 2).mean(), rel=1e-5)
        np.testing.assert_allclose(outputs, model(x), rtol=1e-5, atol=1e-6)
        if not trained:
            fit(model, sos.SparsityCallback())


# Validation.


@pytest.mark.parametrize("name", PENALIZED)
def test_validation_has_no_penalty_and_training_has(name):
    model = compiled(name, penalty_weight=1.0)
    model.optimizer.learning_rate = 0.0
    x, y = techniques.batch(8)
    callbacks = [sos.SparsityCallback()]
    history = model.fit(
        x,
        y,
        epochs=2,
        validation_data=(x, y),
        callbacks=callbacks,
        verbose=0,
    ).history
    expected = ((model.predict(x, verbose=0) - y) ** 2).mean()
    np.testing.assert_allclose(history["val_loss"], expected, rtol=1e-5)
    # Both epochs, the second after a validation: about a unit per weight.
    assert min(history["loss"]) > expected + 10


def test_training_goes_on_after_a_validation():
    layer = techniques.Shift(
        keras.layers.Dense(2), penalty_weight=1.0, ramp=sos.LinearRamp(1, 5)
    )
    model = keras.Sequential([keras.Input((6,)), layer])
    model.compile(keras.optimizers.SGD(1.0, clipvalue=1.0), "mse")
    x, y = techniques.batch(8)
    model.fit(
        x,
        y,
        batch_size=4,
        epochs=4,
        validation_data=(x, y),
        callbacks=[sos.SparsityCallback()],
        verbose=0,
    )
    ramp = [min(max((t - 1) / 4, 0), 1) for t in range(8)]
    assert techniques.shift_of(layer) == pytest.approx(-sum(ramp), rel=1e-6)


def test_evaluation_outside_of_fit_has_no_penalty_after_it():
    model = compiled("VariationalDropout", penalty_weight=1.0)
    x, y = techniques.batch()
    fit(model, sos.SparsityCallback())
    loss = model.evaluate(x, y, verbose=0)
    expected = ((model.predict(x, verbose=0) - y) ** 2).mean()
    assert loss == pytest.approx(expected, rel=1e-5)


# Updates.


def recording(schedule):
    recorder = techniques.Recorder()
    model = techniques.mlp("MagnitudePruning", schedule=schedule)
    for wrapper in model.layers:
        wrapper.ranking = recorder
    return model, recorder


@pytest.mark.parametrize(
    ("block", "ends"),
    # With 6 batches an epoch, a block of 4 leaves one of 2.
    [(1, range(1, 13)), (4, [4, 6, 10, 12]), (6, [6, 12])],
)
@pytest.mark.parametrize(
    ("schedule", "due"),
    [
        (techniques.Staircase(2, 12, 6), [2, 8, 12]),
        (techniques.Staircase(0, 11, 7), [0, 7, 11]),
        (techniques.Staircase(3, 100, 6), [3, 9]),
    ],
)
def test_updates_in_fit_land_at_the_ends_of_blocks(block, ends, schedule, due):
    model, recorder = recording(schedule)
    model.compile("sgd", "mse", steps_per_execution=block)
    landed = []
    watch = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: landed.append(
            (
                int(model.optimizer.iterations),
                techniques.recorded(recorder.log)[-1:],
            )
        )
    )
    fit(model, sos.SparsityCallback(), watch, batches=6, epochs=2)
    # Of two updates in one block, the later is made.
    expected = [([t for t in due if t <= end] or [None])[-1] for end in ends]
    assert landed == [
        (end, [] if step is None else [step])
        for end, step in zip(ends, expected, strict=True)
    ]


def test_blocks_longer_than_the_frequency_are_refused():
    model, recorder = recording(techniques.Staircase(frequency=2))
    model.compile("sgd", "mse", steps_per_execution=3)
    with pytest.raises(ValueError, match="every 2 steps.*steps_per_execution"):
        fit(model, sos.SparsityCallback())
    assert not recorder.log


def test_second_fit_goes_on_with_the_schedule():
    model, recorder = recording(techniques.Staircase(0, 7, 2))
    model.compile("sgd", "mse")
    callback = sos.SparsityCallback()
    for _ in range(2):
        fit(model, callback)
    # The step at which the second starts is updated again.
    assert techniques.recorded(recorder.log) == [0, 2, 4, 4, 6, 7]


def test_masks_after_fit_are_those_of_the_final_weights_where_due():
    schedule = sos.PolynomialDecay(0.0, 0.75, 0, 4, frequency=3)
    model = compiled("MagnitudePruning", schedule=schedule)
    fit(model, sos.SparsityCallback(), batches=4)
    for wrapper in model.layers:
        raw = np.abs(wrapper.layer.kernel.numpy()).ravel()
        mask = techniques.state(wrapper, "mask").numpy().ravel()
        assert mask.sum() == raw.size // 4
        assert raw[mask == 1].min() >= raw[mask == 0].max()


# Logs.


def test_history_has_the_sparsity():
    schedule = sos.PolynomialDecay(0.0, 0.5, 0, 8, power=1, frequency=4)
    model = compiled("MagnitudePruning", schedule=schedule)
    history = fit(model, sos.SparsityCallback(), epochs=2).history
    np.testing.assert_allclose(history["sparsity"], [0.25, 0.5])


def test_tensorboard_gets_every_weight(tmp_path):
    schedule = sos.PolynomialDecay(0.0, 0.5, 0, 8, power=1, frequency=4)
    model = compiled("MagnitudePruning", schedule=schedule)
    fit(model, sos.SparsityCallback(log_dir=str(tmp_path)), epochs=2)
    expected = [(4, 0.25), (8, 0.5)]
    assert techniques.scalars(tmp_path) == {
        "sparsity": expected,
        "sparsity/a/kernel": expected,
        "sparsity/b/kernel": expected,
    }
