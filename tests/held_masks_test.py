"""Masks that do not fit their schedule when training starts."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import sos
from sos.advice import SparsityWarning
from tests.support import techniques

GROWTH = sos.schedules.PolynomialDecay(0.0, 0.75, 0, 8, power=1, frequency=2)
UNITS, INPUTS = 8, 6


def pruned(schedule, sparsity, technique=sos.MagnitudePruning, **arguments):
    """A model whose masks have a sparsity, as after an earlier training."""
    keras.utils.set_random_seed(0)
    layer = technique(
        keras.layers.Dense(UNITS, name="a"), schedule=schedule, **arguments
    )
    model = keras.Sequential([keras.Input((INPUTS,)), layer])
    mask = np.ones((INPUTS, UNITS))
    mask.flat[: round(mask.size * sparsity)] = 0
    layer.set_masks([mask])
    return model


def sparsity_of(model):
    masks = [techniques.state(w, "mask").numpy() for w in model.layers]
    return 1 - sum(m.sum() for m in masks) / sum(m.size for m in masks)


def sparsities(model, steps, start=0):
    """The sparsity at the start and after each step of a new optimizer."""
    optimizer = keras.optimizers.SGD()
    optimizer.iterations.assign(start)
    found = []
    with sos.SparsityUpdater(model, optimizer) as updater:
        found.append(sparsity_of(model))
        for _ in range(steps):
            optimizer.iterations.assign_add(1)
            updater.step()
            found.append(sparsity_of(model))
    return found


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", SparsityWarning)
        yield


def fit(model, epochs, **arguments):
    x = techniques.normal(16, INPUTS)
    y = techniques.normal(16, UNITS, seed=1)
    arguments = {"batch_size": 4, "verbose": 0, **arguments}
    callbacks = [*arguments.pop("callbacks", ()), sos.SparsityCallback()]
    return model.fit(x, y, epochs=epochs, callbacks=callbacks, **arguments)


# A counter that began anew.


def test_fit_after_compile_with_a_new_optimizer_keeps_the_sparsity():
    model = pruned(GROWTH, 0.0)
    model.compile("adam", "mse")
    assert fit(model, 2).history["sparsity"][-1] == 0.75
    masks = [techniques.state(w, "mask").numpy() for w in model.layers]
    model.compile(keras.optimizers.Adam(1e-4), "mse")
    with pytest.warns(SparsityWarning, match=r"75.00%.*step 0"):
        history = fit(model, 1).history
    assert history["sparsity"] == [0.75]
    for wrapper, mask in zip(model.layers, masks, strict=True):
        np.testing.assert_array_equal(techniques.state(wrapper, "mask"), mask)


def test_masks_are_held_until_the_schedule_reaches_their_sparsity():
    model = pruned(GROWTH, 0.5)
    with pytest.warns(SparsityWarning, match="50.00%"):
        found = sparsities(model, 9)
    # The schedule has 0.1875 at step 2, 0.375 at 4, 0.5625 at 6.
    assert found == [0.5] * 6 + [0.5625] * 2 + [0.75] * 2


def test_masks_are_held_before_the_schedule_begins():
    schedule = sos.schedules.PolynomialDecay(
        0.0, 0.5, 2, 4, power=1, frequency=1
    )
    model = pruned(schedule, 0.5)
    with pytest.warns(SparsityWarning, match=r"step 0.*0.00%"):
        assert set(sparsities(model, 5)) == {0.5}


def test_held_masks_need_no_gradient_at_step_0():
    class Gradients(sos.extend.PruningWrapper):
        uses_gradient = True

        def scores(self, weight):
            return weight.state["gradient"].value

    model = pruned(GROWTH, 0.75, Gradients)
    with pytest.warns(SparsityWarning, match="anew"):
        assert sparsities(model, 3) == [0.75] * 4


class Whole(sos.extend.Ranking):
    """Ranks over all weights of a model."""

    def masks(self, scores, sparsities):
        values = np.concatenate([np.ravel(score) for score in scores])
        kept = round(values.size * (1 - sparsities[0]))
        least = np.sort(values)[::-1][kept - 1] if kept else np.inf
        return [
            tf.cast(tf.greater_equal(score, least), tf.uint8)
            for score in scores
        ]


def two_layers(schedule):
    keras.utils.set_random_seed(0)
    layers = [
        sos.MagnitudePruning(
            keras.layers.Dense(
                6,
                kernel_initializer=keras.initializers.RandomNormal(
                    0.0, scale, seed=scale
                ),
            ),
            schedule=schedule,
            ranking=Whole(),
        )
        for scale in (1, 3)
    ]
    return keras.Sequential([keras.Input((6,)), *layers])


def test_a_ranking_over_all_weights_is_held_as_a_whole():
    schedule = sos.schedules.PolynomialDecay(
        0.0, 0.75, 0, 8, power=1, frequency=2
    )
    model = two_layers(schedule)
    assert sparsities(model, 8)[-1] == 0.75
    layers = [techniques.state(w, "mask").numpy().mean() for w in model.layers]
    assert abs(layers[0] - layers[1]) > 0.1
    with pytest.warns(SparsityWarning, match="75.00%"):
        assert sparsities(model, 7) == [0.75] * 8


def test_a_ranking_over_all_weights_resumes_silently(no_warnings):
    schedule = sos.schedules.PolynomialDecay(
        0.0, 0.75, 0, 8, power=1, frequency=2
    )
    model = two_layers(schedule)
    assert sparsities(model, 5)[-1] == 0.375
    assert sparsities(model, 4, start=5)[-1] == 0.75


def test_a_schedule_that_is_replaced_ends_the_hold():
    model = pruned(GROWTH, 0.75)
    optimizer = keras.optimizers.SGD()
    with pytest.warns(SparsityWarning, match="anew"):
        with sos.SparsityUpdater(model, optimizer) as updater:
            schedule = sos.schedules.ConstantSparsity(0.25, 0, frequency=1)
            sos.set_hyperparameters(model, schedule=schedule)
            optimizer.iterations.assign_add(1)
            updater.step()
    assert sparsity_of(model) == 0.25


# A lower sparsity, on purpose.


def test_a_schedule_that_ends_lower_is_followed_with_a_warning():
    model = pruned(sos.schedules.ConstantSparsity(0.25, 0, frequency=1), 0.75)
    with pytest.warns(SparsityWarning, match=r"75.00%.*25.0"):
        assert sparsities(model, 1) == [0.25, 0.25]


# Nothing to warn of.


@pytest.mark.parametrize("step", [0, 1, 2, 5, 6, 7, 8, 20])
def test_masks_of_the_optimizers_step_are_resumed_silently(no_warnings, step):
    model = pruned(GROWTH, 0.0)
    uninterrupted = sparsities(model, step + 3)
    model = pruned(GROWTH, 0.0)
    sparsities(model, step)
    assert sparsities(model, 3, start=step) == uninterrupted[-4:]


def test_masks_from_before_the_update_of_their_step_are_resumed_silently(
    no_warnings,
):
    falling = sos.schedules.PolynomialDecay(
        0.75, 0.25, 0, 8, power=1, frequency=4
    )
    model = pruned(falling, 0.75)
    assert sparsities(model, 0, start=4) == [0.5]


def test_masks_that_stay_pruned_are_not_held(no_warnings):
    model = pruned(GROWTH, 0.5, sos.RandomPruning)
    assert sparsities(model, 8)[-1] == 0.75


def test_masks_that_no_update_will_change_are_left_alone(no_warnings):
    model = pruned(GROWTH, 0.875)
    assert sparsities(model, 1, start=20) == [0.875, 0.875]


class Cycle(sos.schedules.PruningSchedule):
    """Up at even multiples of 3, down at odd ones."""

    def __init__(self):
        self.calls = 0

    def __call__(self, step):
        self.calls += 1
        step = int(step)
        return step % 3 == 0, 0.5 if step % 6 == 0 else 0.25

    def get_config(self):
        return {}


@pytest.mark.parametrize("step", [1_000_003, 1_000_005, 1_000_007])
def test_a_schedule_of_ones_own_is_resumed_silently(no_warnings, step):
    schedule = Cycle()
    last = step // 3 * 3
    model = pruned(schedule, 0.5 if last % 6 == 0 else 0.25)
    before = sparsity_of(model)
    found = sparsities(model, 0, start=step)
    assert found == [before]
    # It is not asked for every step since the start.
    assert schedule.calls < 50


# Masks of an earlier moment.


def test_masks_with_fewer_zeros_after_the_end_are_left_alone_with_a_warning():
    model = pruned(GROWTH, 0.25)
    with pytest.warns(SparsityWarning, match=r"25.00%.*75.00%"):
        assert sparsities(model, 1, start=20) == [0.25, 0.25]


# Files.


@pytest.mark.oldest
def test_backup_and_restore_resumes_silently(no_warnings, tmp_path):
    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                raise KeyboardInterrupt

    def run(*callbacks):
        model = pruned(GROWTH, 0.0)
        model.compile(keras.optimizers.SGD(0.1), "mse")
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
        fit(model, 2, callbacks=[backup, *callbacks], shuffle=False)
        return model

    with pytest.raises(KeyboardInterrupt):
        run(Interrupt())
    resumed = run()
    assert int(resumed.optimizer.iterations) == 8
    uninterrupted = run()
    for a, b in zip(resumed.weights, uninterrupted.weights, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_saved_model_continues_silently(no_warnings, tmp_path):
    model = pruned(GROWTH, 0.0)
    model.compile("sgd", "mse")
    fit(model, 1)
    assert sparsity_of(model) == 0.375
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert fit(loaded, 1).history["sparsity"] == [0.75]


def test_a_saved_model_that_is_compiled_anew_keeps_its_masks(tmp_path):
    model = pruned(GROWTH, 0.75)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    loaded.compile("sgd", "mse")
    with pytest.warns(SparsityWarning, match="anew"):
        assert fit(loaded, 1).history["sparsity"] == [0.75]


def test_a_warning_points_to_the_users_line():
    model = pruned(GROWTH, 0.75)
    model.compile("sgd", "mse")
    with pytest.warns(SparsityWarning) as caught:
        fit(model, 1)
    files = [w.filename for w in caught if w.category is SparsityWarning]
    assert files == [__file__]
