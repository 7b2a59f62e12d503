import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import sos
from sos import masks
from sos.advice import SparsityWarning
from sos.errors import UsageError
from sos.held_masks import mask_zeros
from sos.wrappers.base import find_wrappers
from tests.support import techniques

NEEDY = [
    name
    for name in techniques.NAMES
    if sos.extend.techniques()[name].needs_step
]
PENALIZED = [
    name
    for name in techniques.NAMES
    if issubclass(sos.extend.techniques()[name], sos.extend.PenalizedWrapper)
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


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", SparsityWarning)
        yield


def train_on_batch(model):
    model.train_on_batch(*techniques.batch())


# Forgetting the callback.


@needy_techniques
@pytest.mark.parametrize("how", [fit, train_on_batch])
def test_training_without_the_callback_raises(name, how):
    check_refused(compiled(name), how)


@two_techniques
def test_training_on_without_the_callback_raises(name):
    model = compiled(name)
    for steps in (4, 8):
        fit(model, sos.SparsityCallback())
        assert int(model.optimizer.iterations) == steps
        check_refused(model, fit)
        check_refused(model, train_on_batch)


@two_techniques
def test_fit_compiled_again_still_needs_the_callback(name):
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
def test_fit_after_an_interrupted_one_still_needs_the_callback(name):
    model = compiled(name)
    with pytest.raises(KeyboardInterrupt):
        fit(model, sos.SparsityCallback(), Interrupt())
    assert not any(wrapper.step_counter.bound for wrapper in model.layers)
    with pytest.raises(RuntimeError, match="training=True.*SparsityCallback"):
        model(techniques.batch()[0], training=True)
    check_refused(model, train_on_batch)
    check_refused(model, fit)
    fit(model, sos.SparsityCallback())
    assert int(model.optimizer.iterations) == 2 + 4


@pytest.mark.parametrize(
    ("name", "validated"),
    [("L0Regularization", False), ("VariationalDropout", True)],
)
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
    """Records whether the step counters are bound between the batches of "
    "`fit`."""

    def __init__(self):
        super().__init__()
        self.bound = []

    def on_train_batch_end(self, batch, logs=None):
        self.bound += [
            wrapper.step_counter.bound for wrapper in self.model.layers
        ]

    on_epoch_end = on_train_batch_begin = on_train_batch_end


@two_techniques
def test_step_counters_between_batches_are_unbound(name):
    model, watch = compiled(name), Watch()
    fit(model, sos.SparsityCallback(), watch)
    assert watch.bound
    assert not any(watch.bound)


@pytest.mark.oldest
@pytest.mark.parametrize("name", techniques.NAMES)
def test_ordinary_fits_evaluate_and_predict_warn_of_nothing(no_warnings, name):
    settings = {"penalty_weight": 1.0} if name in PENALIZED else {}
    model = compiled(name, **settings)
    # Traces take most of the time; these run the code of the first one.
    model.run_eagerly = name in ("RandomPruning", "FixedMask")
    x, y = techniques.batch(8)

    def check():
        """Needs no callback, and has no penalty."""
        loss = model.evaluate(x, y, verbose=0)
        outputs = model.predict(x, verbose=0)
        assert loss == pytest.approx(((outputs - y) ** 2).mean(), rel=1e-5)
        np.testing.assert_allclose(outputs, model(x), rtol=1e-5, atol=1e-6)

    check()
    for epochs in (2, 1):
        fit(
            model, sos.SparsityCallback(), epochs=epochs, validation_data=(x, y)
        )
        check()
    assert int(model.optimizer.iterations) == 12


# Validation.


def test_validation_in_fit_has_no_penalty_and_training_has():
    model = compiled("VariationalDropout", penalty_weight=1.0)
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
        keras.layers.Dense(2),
        penalty_weight=1.0,
        ramp=sos.ramps.LinearRamp(1, 5),
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
def test_updates_in_fit_land_at_the_ends_of_executions(
    block, ends, schedule, due
):
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


def test_steps_per_execution_above_the_frequency_raises():
    model, recorder = recording(techniques.Staircase(frequency=2))
    model.compile("sgd", "mse", steps_per_execution=3)
    with pytest.raises(ValueError, match="2 steps.*steps_per_execution"):
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
    schedule = sos.schedules.PolynomialDecay(0.0, 0.75, 0, 4, frequency=3)
    model = compiled("MagnitudePruning", schedule=schedule)
    fit(model, sos.SparsityCallback(), batches=4)
    for wrapper in model.layers:
        raw = np.abs(wrapper.layer.kernel.numpy()).ravel()
        mask = techniques.state(wrapper, "mask").numpy().ravel()
        assert mask.sum() == raw.size // 4
        assert raw[mask == 1].min() >= raw[mask == 0].max()


# Logs.


def test_epochs_end_without_another_call_of_the_model():
    """Counting multiply-adds would trace it again after every epoch."""
    calls = []

    class Counting(keras.layers.Layer):
        def call(self, inputs):
            calls.append(inputs)
            return inputs

    model = keras.Sequential(
        [keras.Input((6,)), Counting(), techniques.mlp("MagnitudePruning")]
    )
    model.compile(keras.optimizers.SGD(0.1), "mse")
    fit(model, sos.SparsityCallback())
    before = len(calls)
    fit(model, sos.SparsityCallback(), epochs=3)
    assert len(calls) == before + 1  # The callback forces a trace for each fit.


def test_history_of_a_fit_has_the_sparsity():
    schedule = sos.schedules.PolynomialDecay(
        0.0, 0.5, 0, 8, power=1, frequency=4
    )
    model = compiled("MagnitudePruning", schedule=schedule)
    history = fit(model, sos.SparsityCallback(), epochs=2).history
    np.testing.assert_allclose(history["sparsity"], [0.25, 0.5])


@pytest.mark.oldest
def test_callback_with_a_log_dir_writes_every_weight(tmp_path):
    schedule = sos.schedules.PolynomialDecay(
        0.0, 0.5, 0, 8, power=1, frequency=4
    )
    model = compiled("MagnitudePruning", schedule=schedule)
    fit(model, sos.SparsityCallback(log_dir=str(tmp_path)), epochs=2)
    expected = [(4, 0.25), (8, 0.5)]
    assert techniques.scalars(tmp_path) == {
        "sparsity": expected,
        "sparsity/a/kernel": expected,
        "sparsity/b/kernel": expected,
    }


# Several fits.


def test_initial_epoch_changes_no_step():
    model, recorder = recording(techniques.Staircase(0, 7, 2))
    model.compile("sgd", "mse")
    callback = sos.SparsityCallback()
    fit(model, callback, epochs=1)
    fit(model, callback, initial_epoch=3, epochs=4)
    assert techniques.recorded(recorder.log) == [0, 2, 4, 4, 6, 7]


def test_fit_without_epochs_leaves_the_callback_usable():
    model, recorder = recording(techniques.Staircase(1, 7, 2))
    model.compile("sgd", "mse")
    callback = sos.SparsityCallback()
    fit(model, callback, epochs=0)
    assert not recorder.log
    fit(model, callback, epochs=1)
    assert techniques.recorded(recorder.log) == [1, 3]


@pytest.mark.parametrize(
    ("name", "interrupted"),
    [("MagnitudePruning", False), ("L0Regularization", True)],
)
def test_train_on_batch_in_a_loop_is_counted(name, interrupted):
    model = compiled(name)
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            fit(model, sos.SparsityCallback(), Interrupt())
    before = int(model.optimizer.iterations)
    with sos.SparsityUpdater(model, model.optimizer) as updater:
        for _ in range(3):
            train_on_batch(model)
            updater.step()
    assert int(model.optimizer.iterations) == before + 3
    check_refused(model, train_on_batch)


# Optimizers that do not count.


class Gan(keras.Model):
    """Trains with an optimizer of its own, every second batch if asked to."""

    def __init__(self, layer, optimizer):
        super().__init__()
        self.net = keras.Sequential([keras.Input((6,)), layer])
        self.own = optimizer
        self.build((None, 6))
        optimizer.build(self.net.trainable_variables)

    def build(self, input_shape):
        self.built = True

    def call(self, inputs, training=False):
        return self.net(inputs, training=training)

    def train_step(self, data):
        variables = self.net.trainable_variables
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(self.net(data[0], training=True) ** 2)
            loss += sum(self.net.losses, 0.0)
        self.own.apply(tape.gradient(loss, variables), variables)
        return {"loss": loss}


def gan(name="MagnitudePruning", **settings):
    layer = techniques.wrap(name, keras.layers.Dense(8, name="a"), **settings)
    model = Gan(layer, keras.optimizers.SGD(0.1))
    model.compile()
    return model


@two_techniques
def test_fit_with_another_optimizer_raises_after_one_epoch(name):
    model = gan(name)
    with pytest.raises(
        RuntimeError,
        match=r"step 0.*4 .*SparsityCallback\(optimizer=",
    ):
        fit(model, sos.SparsityCallback(), epochs=3)
    assert int(model.own.iterations) == 4


def test_callback_with_the_optimizer_that_counts_trains(no_warnings):
    schedule = sos.schedules.PolynomialDecay(0.0, 0.75, 0, 8, frequency=2)
    model = gan(schedule=schedule)
    callback = sos.SparsityCallback(optimizer=model.own)
    history = fit(model, callback, epochs=2).history
    assert history["sparsity"][-1] == 0.75
    # The optimizer that `compile` made was not used.
    assert int(model.optimizer.iterations) == 0


def test_fit_of_fixed_masks_needs_no_optimizer_that_counts(no_warnings):
    fit(gan("FixedMask"), sos.SparsityCallback())


def test_fit_whose_optimizer_stops_later_raises_after_that_epoch():
    model = gan()
    model.own = model.optimizer
    model.run_eagerly = True

    class Replace(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                model.own = keras.optimizers.SGD(0.1)

    with pytest.raises(RuntimeError, match="step 4"):
        fit(model, sos.SparsityCallback(), Replace(), epochs=3)


def test_fit_of_epochs_shorter_than_the_accumulation_trains(no_warnings):
    model = techniques.mlp("MagnitudePruning")
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=6)
    model.compile(optimizer, "mse")
    fit(model, sos.SparsityCallback(), batches=4, epochs=3)
    assert int(optimizer.iterations) == 2


def test_fit_of_overflows_through_a_whole_epoch_raises_nothing(no_warnings):
    policy = keras.DTypePolicy("mixed_float16")
    layer = techniques.wrap(
        "MagnitudePruning", keras.layers.Dense(2, dtype=policy)
    )
    model = keras.Sequential([keras.Input((6,)), layer])
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(0.01), initial_scale=2.0**60
    )
    model.compile(optimizer, "mse")
    fit(model, sos.SparsityCallback(), batches=4, epochs=2)
    assert int(optimizer.iterations) == 0


def test_fit_without_an_optimizer_raises():
    model = compiled("MagnitudePruning")
    model.optimizer = None
    with pytest.raises(TypeError, match="optimizer"):
        fit(model, sos.SparsityCallback())


# Two updaters.


def test_fit_with_two_callbacks_raises():
    for callbacks in (
        [sos.SparsityCallback(), sos.SparsityCallback()],
        [sos.SparsityCallback()] * 2,
    ):
        model = compiled("MagnitudePruning")
        with pytest.raises(UsageError, match="one `sos.SparsityCallback`.*2"):
            fit(model, *callbacks)
        assert int(model.optimizer.iterations) == 0


@two_techniques
def test_callback_inside_an_updater_raises(name):
    model = compiled(name)
    with sos.SparsityUpdater(model, model.optimizer):
        with pytest.raises(RuntimeError, match="'a', 'b'"):
            fit(model, sos.SparsityCallback())
        assert all(wrapper.step_counter.bound for wrapper in model.layers)
    fit(model, sos.SparsityCallback())
    assert int(model.optimizer.iterations) == 4


@two_techniques
def test_updater_started_during_fit_raises(name):
    model = compiled(name)
    updater = sos.SparsityUpdater(model, keras.optimizers.SGD())

    class Start(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 1:
                updater.start()

    with pytest.raises(RuntimeError, match="one at a time"):
        fit(model, sos.SparsityCallback(), Start())
    updater.stop()
    assert int(model.optimizer.iterations) == 1


# Weights of an earlier moment.

LATE = sos.schedules.PolynomialDecay(0.0, 0.75, 0, 8, power=1, frequency=2)


class Scores(keras.callbacks.Callback):
    """Logs the values that others are to monitor."""

    def __init__(self, *values):
        super().__init__()
        self.values = values

    def on_epoch_end(self, epoch, logs=None):
        logs["score"] = self.values[epoch]


def stopping(patience=1, **settings):
    return keras.callbacks.EarlyStopping(
        "score", mode="min", patience=patience, **settings
    )


def fit_scored(scores, *callbacks):
    model = compiled("MagnitudePruning", schedule=LATE)
    fit(model, Scores(*scores), *callbacks, epochs=len(scores))
    return model


@pytest.mark.parametrize("last", [False, True])
def test_fit_that_restores_a_less_sparse_epoch_warns(last):
    callbacks = [
        sos.SparsityCallback(),
        stopping(restore_best_weights=True),
    ]
    if not last:
        callbacks.reverse()
    message = "37.50%.*75.00%.*75.00%.*start_from_epoch"
    with pytest.warns(SparsityWarning, match=message):
        model = fit_scored([1, 2, 3, 4], *callbacks)
    assert sos.sparsity_report(model).sparsity == 0.375


def test_fit_that_restores_dense_weights_warns():
    model = compiled("MagnitudePruning", schedule=LATE)
    dense = model.get_weights()
    restore = keras.callbacks.LambdaCallback(
        on_train_end=lambda logs: model.set_weights(dense)
    )
    with pytest.warns(SparsityWarning, match="0.00%.*75.00%"):
        fit(model, sos.SparsityCallback(), restore, epochs=2)


def test_fit_that_restores_weights_from_after_the_schedule_warns_of_nothing(
    no_warnings,
):
    for settings in (
        {"restore_best_weights": True},
        {"restore_best_weights": True, "start_from_epoch": 1},
        {},
    ):
        fit_scored([4, 1, 2, 3], stopping(**settings), sos.SparsityCallback())


def test_fit_that_stops_before_the_end_of_the_schedule_warns():
    for schedule, reached in (
        (
            sos.schedules.PolynomialDecay(
                0.0, 0.5, 0, 16, power=1, frequency=2
            ),
            "25.00%",
        ),
        (sos.schedules.ConstantSparsity(0.5, 99, frequency=1), "0.00%"),
    ):
        model = compiled("MagnitudePruning", schedule=schedule)
        callbacks = [Scores(1, 2, 3), stopping(patience=0)]
        message = f"{reached}.*50.00%"
        with pytest.warns(SparsityWarning, match=message):
            fit(model, *callbacks, sos.SparsityCallback(), epochs=3)
        assert int(model.optimizer.iterations) == 8


def checkpoint(directory, **settings):
    return keras.callbacks.ModelCheckpoint(
        directory / "best.weights.h5",
        monitor="score",
        mode="min",
        save_best_only=True,
        save_weights_only=True,
        **settings,
    )


def test_checkpoint_of_a_less_sparse_epoch_warns(tmp_path):
    with pytest.warns(SparsityWarning, match="epoch 1.*37.50%"):
        fit_scored([1, 2, 3], checkpoint(tmp_path), sos.SparsityCallback())


def test_checkpoint_from_after_the_schedule_warns_of_nothing(
    no_warnings, tmp_path
):
    for scores, settings in (
        ([4, 1, 2], {}),
        ([4, 5, 6], {"initial_value_threshold": 3.0}),
    ):
        callback = checkpoint(tmp_path, **settings)
        fit_scored(scores, callback, sos.SparsityCallback())


def test_callback_list_used_again_trains(no_warnings):
    model = compiled("MagnitudePruning", schedule=LATE)
    callbacks = keras.callbacks.CallbackList(
        [sos.SparsityCallback()], add_history=True, model=model
    )
    x, y = techniques.batch(8)
    for _ in range(3):
        model.fit(x, y, batch_size=2, verbose=0, callbacks=callbacks)
    names = [type(callback).__name__ for callback in callbacks.callbacks]
    assert names == ["SparsityCallback", "History", "_LastCallback"]


# Penalties that no loss contains.


class WithPenalties(keras.distillation.Distiller):
    def compute_loss(self, *args, training=True, **kwargs):
        loss = super().compute_loss(*args, training=training, **kwargs)
        return loss + sum(self.student.losses)


def distiller(cls, name, **settings):
    teacher = keras.Sequential([keras.Input((6,)), keras.layers.Dense(2)])
    model = cls(
        teacher=teacher,
        student=techniques.mlp(name, **settings),
        distillation_losses=keras.distillation.LogitsDistillation(),
    )
    model.compile(keras.optimizers.SGD(0.1), keras.losses.MeanSquaredError())
    return model


def test_fit_with_the_penalties_in_no_loss_warns_each_time():
    model = distiller(keras.distillation.Distiller, "L0Regularization")
    for _ in range(2):
        with pytest.warns(SparsityWarning, match="'a', 'b'"):
            fit(model, sos.SparsityCallback(), epochs=2)


def test_fit_with_the_penalties_in_its_own_loss_warns_of_nothing(no_warnings):
    model = distiller(WithPenalties, "L0Regularization")
    for _ in range(2):
        fit(model, sos.SparsityCallback())
    model = distiller(
        keras.distillation.Distiller, "VariationalDropout", penalty_weight=0.0
    )
    fit(model, sos.SparsityCallback())


def test_fit_with_penalties_of_frozen_layers_warns_of_nothing(no_warnings):
    model = compiled("L0Regularization")
    model.layers[0].trainable = False
    model.compile("sgd", "mse")
    fit(model, sos.SparsityCallback())


def test_fit_with_penalties_replaced_by_a_regularizer_warns():
    model = compiled("L0Regularization")
    for variable in model.trainable_variables:
        variable.regularizer = keras.regularizers.L2(1e-3)
    with pytest.warns(SparsityWarning, match="no effect"):
        fit(model, sos.SparsityCallback())


@pytest.mark.parametrize("eager", [False, True])
def test_fit_with_penalties_that_are_only_read_warns(eager):
    class Logging(keras.distillation.Distiller):
        def compute_loss(self, *args, training=True, **kwargs):
            sum(self.student.losses)
            return super().compute_loss(*args, training=training, **kwargs)

    model = distiller(Logging, "L0Regularization")
    model.run_eagerly = eager
    read = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: model.student.losses
    )
    x, y = techniques.batch(8)
    with pytest.warns(SparsityWarning, match="no effect"):
        fit(model, sos.SparsityCallback(), read, validation_data=(x, y))


def test_fit_after_an_interrupted_one_warns_of_nothing(no_warnings):
    model = compiled("L0Regularization")
    with pytest.raises(KeyboardInterrupt):
        fit(model, sos.SparsityCallback(), Interrupt())
    # With the step that was compiled.
    fit(model, sos.SparsityCallback())


# Averages of weights.


@pytest.mark.parametrize(
    ("swapped", "overwrite"), [(False, 3), (True, None), (True, 3)]
)
def test_fit_with_moving_averages_keeps_masks_and_sparsity(
    no_warnings, swapped, overwrite
):
    model = techniques.mlp("MagnitudePruning", schedule=LATE)
    optimizer = keras.optimizers.SGD(
        0.1, use_ema=True, ema_overwrite_frequency=overwrite
    )
    model.compile(optimizer, "mse")
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    callbacks = [sos.SparsityCallback()]
    for _ in range(2):
        history = fit(
            model, *[swap] * swapped, *callbacks, batches=4, epochs=2
        ).history
    assert history["sparsity"][-1] == 0.75
    assert sos.sparsity_report(model).sparsity == 0.75


# Schedules that are laid over `fit`.


def over_fit(**arguments):
    """A sparse model without any number of steps, compiled."""
    model = sos.sparsify(
        techniques.dense_mlp(), "MagnitudePruning", sparsity=0.9
    )
    model.compile(keras.optimizers.SGD(0.1), "mse", **arguments)
    return model


def steps_of(model):
    (steps,) = {w.schedule.steps() for w in find_wrappers(model)}
    return steps


def zeros_of(model):
    zeros, size = mask_zeros(find_wrappers(model))
    return zeros / size


def exact(model, sparsity=0.9):
    """Asserts that every mask has exactly the zeros of a sparsity."""
    for path, mask in techniques.sparse_state(model).items():
        assert mask.sum() == masks.keep_count(mask.size, sparsity), path


@pytest.mark.parametrize("technique", techniques.NAMES)
def test_fit_with_every_technique_needs_one_number_and_the_callback(technique):
    cls = sos.extend.techniques()[technique]
    number = {"sparsity": 0.9}
    if issubclass(cls, sos.extend.PenalizedWrapper):
        number = {"num_examples": 8}
    sparse = sos.sparsify(techniques.dense_mlp(), technique, **number)
    sparse.compile("adam", "mse")
    history = fit(sparse, sos.SparsityCallback(), epochs=3)
    assert np.isfinite(history.history["loss"]).all()
    rows = [r for r in sos.sparsity_report(sparse).rows if r["technique"]]
    assert [r["technique"] for r in rows] == [technique, technique]
    if issubclass(cls, sos.extend.MaskedWrapper):
        exact(sparse)
        assert {r["target"] for r in rows} == {0.9}
        assert history.history["sparsity"][-1] == pytest.approx(0.9, abs=0.02)


def test_fit_lays_the_schedule_over_all_epochs():
    model = over_fit()
    rows = sos.sparsity_report(model).rows
    assert [r["target"] for r in rows if r["technique"]] == [0.9, 0.9]
    x, y = techniques.batch()
    model.evaluate(x, y, verbose=0)
    assert zeros_of(model) == 0
    fit(model, sos.SparsityCallback(), batches=5, epochs=4)
    assert steps_of(model) == (0, 15, 1)
    exact(model)


def test_fit_of_one_step_reaches_the_target():
    model = over_fit()
    fit(model, sos.SparsityCallback(), batches=1)
    assert steps_of(model) == (0, 1, 1)
    exact(model)


def test_fit_of_no_epoch_leaves_the_schedule_open():
    model = over_fit()
    fit(model, sos.SparsityCallback(), epochs=0)
    assert zeros_of(model) == 0
    fit(model, sos.SparsityCallback(), epochs=2)
    assert steps_of(model) == (0, 6, 1)


@pytest.mark.parametrize("batches, steps", [(20, (0, 15, 8)), (4, (0, 3, 8))])
def test_fit_with_long_executions_updates_once_in_each(batches, steps):
    model = over_fit(steps_per_execution=8)
    fit(model, sos.SparsityCallback(), batches=batches)
    assert steps_of(model) == steps
    exact(model)


@pytest.mark.parametrize("scales_loss", [False, True])
def test_fit_with_accumulation_counts_steps_of_the_optimizer(scales_loss):
    model = over_fit()
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=3)
    if scales_loss:
        optimizer = keras.optimizers.LossScaleOptimizer(
            optimizer, initial_scale=1.0
        )
    model.compile(optimizer, "mse")
    fit(model, sos.SparsityCallback(), batches=6, epochs=4)
    assert int(model.optimizer.iterations) == 8
    assert steps_of(model) == (0, 6, 1)
    exact(model)


def test_fit_after_one_that_failed_at_once_lays_out_the_schedule():
    model = over_fit()
    x, _ = techniques.batch(4)
    with pytest.raises(ValueError, match="7"):
        model.fit(
            x, np.zeros((4, 7)), verbose=0, callbacks=[sos.SparsityCallback()]
        )
    fit(model, sos.SparsityCallback(), batches=8)
    assert steps_of(model) == (0, 6, 1)
    exact(model)


def test_fit_with_fewer_batches_than_accumulated_ones_raises():
    model = over_fit()
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=9)
    model.compile(optimizer, "mse")
    with pytest.raises(UsageError, match="train_steps=0"):
        fit(model, sos.SparsityCallback())
    assert zeros_of(model) == 0


def test_fit_from_a_later_epoch_lays_the_schedule_over_the_rest():
    model = over_fit()
    model.optimizer.build(model.trainable_variables)
    model.optimizer.iterations.assign(100)
    fit(model, sos.SparsityCallback(), initial_epoch=3, epochs=5)
    assert steps_of(model) == (100, 106, 1)
    exact(model)


def test_second_fit_leaves_the_schedule_as_it_was(no_warnings):
    model = over_fit()
    fit(model, sos.SparsityCallback(), epochs=2)
    fit(model, sos.SparsityCallback(), epochs=10)
    assert steps_of(model) == (0, 6, 1)
    exact(model)


def batches_without_length():
    x, y = techniques.batch(2)
    while True:
        yield x, y


def test_fit_of_unknown_length_raises_before_it_trains():
    def data():
        return tf.data.Dataset.from_generator(
            batches_without_length,
            output_signature=(
                tf.TensorSpec((2, 6)),
                tf.TensorSpec((2, 2)),
            ),
        )

    model = over_fit()
    callback = sos.SparsityCallback()
    with pytest.raises(UsageError, match="steps_per_epoch.*`end_step`"):
        model.fit(data(), callbacks=[callback], verbose=0)
    assert int(model.optimizer.iterations) == 0
    model.fit(data(), callbacks=[callback], verbose=0, steps_per_epoch=4)
    assert steps_of(model) == (0, 3, 1)
    exact(model)


@pytest.mark.parametrize("form", ["model.keras", "model.weights.h5"])
def test_a_saved_model_continues_the_schedule_of_its_training(tmp_path, form):
    model = over_fit()

    class Save(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 0:
                save = (
                    model.save
                    if form == "model.keras"
                    else (model.save_weights)
                )
                save(tmp_path / form)

    fit(model, sos.SparsityCallback(), Save(), epochs=4)
    assert steps_of(model) == (0, 12, 1)
    if form == "model.keras":
        loaded = keras.models.load_model(tmp_path / form)
    else:
        loaded = over_fit()
        loaded.load_weights(tmp_path / form)
    assert steps_of(loaded) == (0, 12, 1)
    assert 0 < zeros_of(loaded) < 0.9
    assert int(loaded.optimizer.iterations) == 4
    fit(loaded, sos.SparsityCallback(), initial_epoch=1, epochs=4)
    exact(loaded)
    for one, other in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(one, other)


class Crash(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("first", [0, 1])
def test_a_restarted_program_continues_the_schedule(
    tmp_path, no_warnings, first
):
    """`BackupAndRestore` restores it, wherever it is in the list."""

    def callbacks():
        backup = keras.callbacks.BackupAndRestore(tmp_path)
        pair = [backup, sos.SparsityCallback()]
        return pair[first:] + pair[:first]

    with pytest.raises(KeyboardInterrupt):
        fit(over_fit(), *callbacks(), Crash(), epochs=4)
    resumed = over_fit()
    fit(resumed, *callbacks(), epochs=4)
    assert steps_of(resumed) == (0, 12, 1)
    whole = over_fit()
    fit(whole, sos.SparsityCallback(), epochs=4)
    for one, other in zip(whole.weights, resumed.weights, strict=True):
        np.testing.assert_array_equal(one, other)


def test_fit_on_two_replicas_lays_the_schedule_over_global_steps():
    with techniques.two_replicas().scope():
        model = over_fit()
    fit(model, sos.SparsityCallback(), epochs=2)
    assert steps_of(model) == (0, 6, 1)
    exact(model)
