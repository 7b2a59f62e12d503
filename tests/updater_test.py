import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import sos
from sos.advice import SparsityWarning
from sos.errors import UsageError
from sos.wrappers.base import find_wrappers
from tests.support import techniques

TECHNIQUES = techniques.NAMES


def model_with_record(schedule, names=("a", "b")):
    """A model of pruned layers that share a recording ranking."""
    recorder = techniques.Recorder()
    layers = [
        sos.MagnitudePruning(
            keras.layers.Dense(6, name=name),
            schedule=schedule,
            ranking=recorder,
        )
        for name in names
    ]
    model = keras.Sequential([keras.Input((6,)), *layers])
    return model, recorder


def move(optimizer, steps=1):
    """As if the optimizer had made steps."""
    optimizer.iterations.assign_add(steps)


def drive(schedule, steps, start=0):
    """The steps at which the masks are updated."""
    model, recorder = model_with_record(schedule)
    optimizer = keras.optimizers.SGD()
    optimizer.iterations.assign(start)
    with sos.SparsityUpdater(model, optimizer) as updater:
        for _ in range(steps):
            move(optimizer)
            updater.step()
    return techniques.recorded(recorder.log)


# When masks are updated.


@pytest.mark.parametrize(
    ("schedule", "steps", "expected"),
    [
        (techniques.Staircase(2, 8, 3), 12, [2, 5, 8]),
        # An end that is no multiple of the frequency away.
        (techniques.Staircase(2, 10, 3), 12, [2, 5, 8, 10]),
        # Training that ends with the schedule.
        (techniques.Staircase(0, 6, 2), 6, [0, 2, 4, 6]),
        (techniques.Staircase(0, 7, 2), 7, [0, 2, 4, 6, 7]),
        (techniques.Staircase(0, 9, 100), 9, [0, 9]),
        (techniques.Staircase(3, 9, 2), 2, []),
    ],
)
def test_updates_run_at_the_steps_of_the_schedule(schedule, steps, expected):
    assert drive(schedule, steps) == expected


@pytest.mark.parametrize(
    ("start", "first"), [(0, 1), (1, 1), (4, 3), (5, 5), (6, 5), (9, 9)]
)
def test_restart_goes_on_with_the_schedule_and_repeats_the_step(start, first):
    updates = drive(techniques.Staircase(1, 9, 2), 10, start=start)
    assert updates == [t for t in (1, 3, 5, 7, 9) if t >= first]


def test_masks_of_ones_are_brought_to_the_last_update_before_the_start():
    schedule = sos.schedules.PolynomialDecay(0.0, 0.9, 0, 20)
    model = techniques.mlp("MagnitudePruning", schedule=schedule)
    optimizer = keras.optimizers.SGD()
    optimizer.iterations.assign(100)
    with sos.SparsityUpdater(model, optimizer):
        for wrapper in model.layers:
            mask = techniques.state(wrapper, "mask").numpy()
            assert mask.sum() == round(0.1 * mask.size)


def test_masks_that_are_not_dense_are_left_alone_on_start():
    schedule = sos.schedules.PolynomialDecay(0.0, 0.9, 0, 20)
    model = techniques.mlp("MagnitudePruning", schedule=schedule)
    masks = []
    for wrapper in model.layers:
        masks.append(np.ones(wrapper.layer.kernel.shape))
        masks[-1][0, 0] = 0
        wrapper.set_masks(masks[-1:])
    optimizer = keras.optimizers.SGD()
    optimizer.iterations.assign(100)
    with pytest.warns(SparsityWarning, match="3.12%"):
        with sos.SparsityUpdater(model, optimizer):
            pass
    for wrapper, mask in zip(model.layers, masks, strict=True):
        np.testing.assert_array_equal(techniques.state(wrapper, "mask"), mask)


def test_updates_of_a_schedule_are_those_of_tfmot():
    """Updated at t if `should_prune` at t, from the weights after t steps."""
    inner = sos.schedules.PolynomialDecay(0.1, 0.8, 1, 9, frequency=2)
    model, _ = model_with_record(inner, names=("only",))
    (wrapper,) = model.layers
    wrapper.ranking = sos.extend.PerTensorRanking()
    optimizer = keras.optimizers.SGD(0.5, momentum=0.5)
    optimizer.build(model.trainable_variables)
    train = techniques.train_step(model, optimizer)
    x = techniques.normal(8, 6)
    expected = np.ones(36)

    def expect(step):
        due, sparsity = inner(tf.constant(step, tf.int64))
        if due:
            raw = np.abs(wrapper.layer.kernel.numpy()).ravel()
            kept = np.argsort(-raw, kind="stable")[
                : round(36 * (1 - float(sparsity)))
            ]
            expected[:] = 0
            expected[kept] = 1
        found = techniques.state(wrapper, "mask").numpy().ravel()
        np.testing.assert_array_equal(found, expected)

    with sos.SparsityUpdater(model, optimizer) as updater:
        expect(0)
        for step in range(1, 12):
            train(x, techniques.normal(8, 6, seed=step))
            updater.step()
            expect(step)
    assert expected.sum() == 7


def test_layers_with_equal_rankings_are_ranked_in_one_call():
    schedule = sos.schedules.Schedule(
        sos.schedules.ConstantSparsity(0.5, 1, frequency=1)
    )
    model, recorder = model_with_record(schedule)
    optimizer = keras.optimizers.SGD()
    with sos.SparsityUpdater(model, optimizer) as updater:
        move(optimizer)
        updater.step()
    assert recorder.log == [[0.5, 0.5]]


def test_layers_follow_schedules_of_their_own():
    model, _ = model_with_record(techniques.Staircase())
    for i, wrapper in enumerate(model.layers):
        wrapper.ranking = sos.extend.PerTensorRanking()
        wrapper.schedule = sos.schedules.ConstantSparsity(
            0.25 + 0.5 * i, begin_step=1 + i, frequency=1
        )
    optimizer = keras.optimizers.SGD()
    counts = []
    with sos.SparsityUpdater(model, optimizer) as updater:
        for _ in range(2):
            move(optimizer)
            updater.step()
            counts.append(
                [
                    int(techniques.state(w, "mask").numpy().sum())
                    for w in model.layers
                ]
            )
    assert counts == [[27, 36], [27, 9]]


def test_step_does_nothing_while_the_optimizer_stands_still():
    model, recorder = model_with_record(techniques.Staircase())
    optimizer = keras.optimizers.SGD()
    with sos.SparsityUpdater(model, optimizer) as updater:
        updater.step()
        move(optimizer)
        for _ in range(3):
            updater.step()
    assert techniques.recorded(recorder.log) == [0, 1]


# What an engine needs.


@pytest.mark.parametrize(
    ("start", "until", "expected"),
    [
        (0, 10, 2),
        (1, 10, 2),
        (2, 10, 4),
        (3, 4, 4),
        (4, 6, None),
        (4, 7, 7),
        (7, 10, 10),
        (10, 99, None),
        (5, 5, None),
    ],
)
def test_next_update_of_several_layers_is_the_first(start, until, expected):
    model, _ = model_with_record(techniques.Staircase(2, 4, 2))
    model.layers[1].schedule = techniques.Staircase(4, 10, 3)
    optimizer = keras.optimizers.SGD()
    optimizer.iterations.assign(start)
    with sos.SparsityUpdater(model, optimizer) as updater:
        assert updater.next_update(until) == expected


def test_next_update_without_schedules_is_none():
    model = techniques.mlp("L0Regularization")
    with sos.SparsityUpdater(model, keras.optimizers.SGD()) as updater:
        assert updater.next_update(1_000_000) is None


def test_next_update_of_a_replaced_schedule_follows_it():
    model, _ = model_with_record(techniques.Staircase(2, 9, 2))
    with sos.SparsityUpdater(model, keras.optimizers.SGD()) as updater:
        sos.set_hyperparameters(model, schedule=techniques.Staircase(5, 9, 2))
        assert updater.next_update(9) == 5


@pytest.mark.parametrize("config", [None, {}])
def test_schedules_without_a_configuration_are_told_apart(config):
    class Once(sos.schedules.PruningSchedule):
        def __init__(self, at):
            self.at = at

        def __call__(self, step):
            return step == self.at, 0.5

        def get_config(self):
            if config is None:
                raise NotImplementedError
            return config

    model, _ = model_with_record(techniques.Staircase())
    for i, wrapper in enumerate(model.layers):
        wrapper.schedule = Once(4 - i)
    with sos.SparsityUpdater(model, keras.optimizers.SGD()) as updater:
        assert updater.next_update(9) == 3


@pytest.mark.parametrize("step", [0, 4, 5])
def test_start_up_to_date_updates_nothing(step):
    model, recorder = model_with_record(techniques.Staircase(0, 8, 2))
    optimizer = keras.optimizers.SGD()
    optimizer.iterations.assign(step)
    updater = sos.SparsityUpdater(model, optimizer)
    updater.start(up_to_date=True)
    assert recorder.log == []
    assert all(w.step_counter.bound for w in model.layers)
    # From there on it goes as ever.
    for _ in range(3):
        move(optimizer)
        updater.step()
    due = [t for t in range(step + 1, step + 4) if t % 2 == 0 and t <= 8]
    assert techniques.recorded(recorder.log) == due
    updater.stop()


def test_gathered_gradients_survive_a_start_that_is_up_to_date():
    layer = Gradients(keras.layers.Dense(2), schedule=techniques.SCHEDULE)
    model = keras.Sequential([keras.Input((3,)), layer])
    gradient = techniques.state(layer, "gradient")
    optimizer = keras.optimizers.SGD()
    optimizer.iterations.assign(7)
    values = techniques.normal(3, 2)
    for up_to_date in (True, False):
        gradient.assign(values)
        updater = sos.SparsityUpdater(model, optimizer)
        updater.start(up_to_date=up_to_date)
        assert (gradient.numpy() == values).all() == up_to_date
        updater.stop()


def test_update_masks_of_the_user_is_called_at_each_update():
    model, recorder = model_with_record(techniques.Staircase(2, 6, 2))
    first, second = model.layers
    second.schedule = techniques.Staircase(3, 6, 3)
    optimizer = keras.optimizers.SGD()
    calls = []
    with sos.SparsityUpdater(
        model, optimizer, update_masks=calls.append
    ) as updater:
        for _ in range(6):
            move(optimizer)
            updater.step()
    assert [call for call in calls if call] == [
        {first: 0.002},
        {second: 0.003},
        {first: 0.004},
        {first: 0.006, second: 0.006},
    ]
    # Nothing else touched the masks.
    assert recorder.log == []
    for wrapper in model.layers:
        assert techniques.state(wrapper, "mask").numpy().all()


def test_update_masks_of_the_user_brings_dense_masks_up_to_date():
    model = techniques.mlp(
        "MagnitudePruning",
        schedule=sos.schedules.PolynomialDecay(0.0, 0.9, 0, 20),
    )
    optimizer = keras.optimizers.SGD()
    optimizer.iterations.assign(100)
    calls = []
    with sos.SparsityUpdater(model, optimizer, update_masks=calls.append):
        pass
    assert dict.fromkeys(model.layers, 0.9) in calls


# What is forgotten.


def test_forgotten_last_step_raises_at_the_end():
    model, _ = model_with_record(techniques.Staircase(frequency=10))
    optimizer = keras.optimizers.SGD()
    with pytest.raises(RuntimeError, match=r"2 steps.*updater\.step\(\)"):
        with sos.SparsityUpdater(model, optimizer) as updater:
            move(optimizer)
            updater.step()
            move(optimizer, 2)
    assert not any(w.step_counter.bound for w in model.layers)


def test_passed_over_updates_raise():
    model, _ = model_with_record(techniques.Staircase(frequency=2))
    optimizer = keras.optimizers.SGD()
    updater = sos.SparsityUpdater(model, optimizer)
    updater.start()
    move(optimizer, 4)
    with pytest.raises(RuntimeError, match=r"from step 0 to 4.*at \[2, 4\]"):
        updater.step()
    updater.stop()


def test_update_within_an_execution_lands_at_its_end():
    model, recorder = model_with_record(techniques.Staircase(1, 9, 4))
    optimizer = keras.optimizers.SGD()
    with sos.SparsityUpdater(
        model, optimizer, steps_per_execution=4
    ) as updater:
        for _ in range(3):
            move(optimizer, 4)
            updater.step()
    assert techniques.recorded(recorder.log) == [1, 5, 9]


def test_update_at_the_end_may_share_an_execution_with_another():
    model, recorder = model_with_record(techniques.Staircase(0, 7, 4))
    optimizer = keras.optimizers.SGD()
    with sos.SparsityUpdater(
        model, optimizer, steps_per_execution=4
    ) as updater:
        for _ in range(2):
            move(optimizer, 4)
            updater.step()
    assert techniques.recorded(recorder.log) == [0, 4, 7]


def test_steps_per_execution_above_the_frequency_raises():
    model, _ = model_with_record(techniques.Staircase(frequency=3))
    optimizer = keras.optimizers.SGD()
    with pytest.raises(ValueError, match="3 steps.*steps_per_execution"):
        sos.SparsityUpdater(model, optimizer, steps_per_execution=4).start()
    assert not any(w.step_counter.bound for w in model.layers)


def test_updater_with_an_error_in_the_loop_raises_it():
    model, _ = model_with_record(techniques.Staircase())
    optimizer = keras.optimizers.SGD()
    with pytest.raises(KeyError), sos.SparsityUpdater(model, optimizer):
        move(optimizer)
        raise KeyError
    assert not any(w.step_counter.bound for w in model.layers)


def test_step_before_start_raises():
    model, _ = model_with_record(techniques.Staircase())
    with pytest.raises(RuntimeError, match="not started"):
        sos.SparsityUpdater(model, keras.optimizers.SGD()).step()


def test_updater_of_an_optimizer_that_goes_back_raises():
    model, _ = model_with_record(techniques.Staircase())
    optimizer = keras.optimizers.SGD()
    updater = sos.SparsityUpdater(model, optimizer)
    updater.start()
    move(optimizer, 1)
    updater.step()
    optimizer.iterations.assign(0)
    with pytest.raises(RuntimeError, match="1 to 0"):
        updater.step()
    updater.stop()


@pytest.mark.parametrize("name", TECHNIQUES)
def test_custom_loop_without_an_updater_raises_and_evaluation_does_not(name):
    model = techniques.mlp(name)
    optimizer = keras.optimizers.SGD(0.1)
    optimizer.build(model.trainable_variables)
    x, y = techniques.batch()
    model(x)
    needs = any(w.needs_step for w in model.layers)
    for _ in range(2):
        step = techniques.train_step(model, optimizer)
        if needs:
            with pytest.raises(
                RuntimeError, match=r"sos.SparsityUpdater\(model"
            ):
                step(x, y)
        with sos.SparsityUpdater(model, optimizer) as updater:
            step = techniques.train_step(model, optimizer)
            step(x, y)
            updater.step()
        model(x)
        model(x, training=False)


def test_updater_of_an_optimizer_that_never_moves_raises_at_the_end():
    model, _ = model_with_record(techniques.Staircase())
    trained, given = keras.optimizers.SGD(), keras.optimizers.SGD()
    with pytest.raises(RuntimeError, match="step 0.*3"):
        with sos.SparsityUpdater(model, given) as updater:
            for _ in range(3):
                move(trained)
                updater.step()
    assert not any(w.step_counter.bound for w in model.layers)


def test_updater_of_an_optimizer_that_accumulates_ends():
    model, _ = model_with_record(techniques.Staircase())
    optimizer = keras.optimizers.SGD(gradient_accumulation_steps=4)
    with sos.SparsityUpdater(model, optimizer) as updater:
        for _ in range(3):
            updater.step()


@pytest.mark.parametrize("used", [True, False])
def test_updater_of_an_optimizer_that_only_overflows_ends(used):
    model, _ = model_with_record(techniques.Staircase())
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
    optimizer.build(model.trainable_variables)

    def loop():
        with sos.SparsityUpdater(model, optimizer) as updater:
            for _ in range(3):
                if used:
                    optimizer.dynamic_scale.assign(optimizer.dynamic_scale / 2)
                updater.step()

    if used:
        loop()
        return
    with pytest.raises(RuntimeError, match="stood still"):
        loop()


def test_fixed_masks_need_no_optimizer_that_moves():
    model = techniques.mlp("FixedMask")
    with sos.SparsityUpdater(model, keras.optimizers.SGD()) as updater:
        updater.step()


def test_updater_of_an_optimizer_restored_to_a_smaller_step_ends():
    model, _ = model_with_record(techniques.Staircase())
    optimizer = keras.optimizers.SGD()
    with sos.SparsityUpdater(model, optimizer) as updater:
        move(optimizer)
        updater.step()
        optimizer.iterations.assign(0)
    assert not any(w.step_counter.bound for w in model.layers)


def test_stop_inside_the_scope_ends_it():
    model, _ = model_with_record(techniques.Staircase())
    optimizer = keras.optimizers.SGD()
    with sos.SparsityUpdater(model, optimizer) as updater:
        move(optimizer)
        updater.step()
        updater.stop()
        move(optimizer, 5)
        with pytest.raises(RuntimeError, match="not started"):
            updater.step()
    assert not any(w.step_counter.bound for w in model.layers)


def test_step_in_a_compiled_function_raises():
    model, recorder = model_with_record(techniques.Staircase())
    optimizer = keras.optimizers.SGD()
    with sos.SparsityUpdater(model, optimizer) as updater:
        with pytest.raises(RuntimeError, match=r"inside a `tf\.function`"):
            tf.function(updater.step)()
    assert techniques.recorded(recorder.log) == [0]


def test_evaluation_traced_within_the_scope_has_no_penalty_after_it():
    model = techniques.mlp("L0Regularization", penalty_weight=1e3)
    optimizer = keras.optimizers.SGD(0.1)
    model.compile(optimizer, "mse")
    x, y = techniques.batch()
    with sos.SparsityUpdater(model, optimizer):
        within = model.evaluate(x, y, verbose=0)
    assert within > 1e3
    plain = ((model.predict(x, verbose=0) - y) ** 2).mean()
    after = model.evaluate(x, y, verbose=0)
    assert after == pytest.approx(plain, rel=1e-5)


class Gradients(sos.extend.PruningWrapper):
    uses_gradient = True

    def scores(self, weight):
        return weight.state["gradient"].value


def test_gradients_are_not_there_before_the_first_step():
    for begin, refused in ((0, True), (1, False)):
        layer = Gradients(
            keras.layers.Dense(2),
            schedule=sos.schedules.ConstantSparsity(0.5, begin, frequency=1),
        )
        model = keras.Sequential([keras.Input((3,)), layer])
        updater = sos.SparsityUpdater(model, keras.optimizers.SGD())
        if refused:
            with pytest.raises(ValueError, match="Gradients.*`begin_step`"):
                updater.start()
            assert techniques.state(layer, "mask").numpy().all()
        else:
            updater.start()
        updater.stop()


# Two updaters of one layer.


def test_updater_of_the_same_layers_raises_until_the_first_stops():
    model, _ = model_with_record(techniques.Staircase())
    part = keras.Sequential([keras.Input((6,)), model.layers[0]])
    first = sos.SparsityUpdater(model, keras.optimizers.SGD())
    second = sos.SparsityUpdater(part, keras.optimizers.SGD())
    first.start()
    with pytest.raises(
        RuntimeError, match=r"another `sos.SparsityUpdater`.*: 'a'\."
    ):
        second.start()
    # It left the first alone.
    assert all(w.step_counter.bound for w in model.layers)
    second.stop()
    assert all(w.step_counter.bound for w in model.layers)
    first.stop()
    second.start()
    assert [w.step_counter.bound for w in model.layers] == [True, False]
    second.stop()


def test_updater_that_could_not_start_leaves_layers_to_others():
    model, _ = model_with_record(techniques.Staircase())

    def fail(updates):
        raise KeyError

    failed = sos.SparsityUpdater(
        model, keras.optimizers.SGD(), update_masks=fail
    )
    with pytest.raises(KeyError):
        failed.start()
    assert not any(w.step_counter.bound for w in model.layers)
    with sos.SparsityUpdater(model, keras.optimizers.SGD()):
        pass


# Penalties that no loss contains.


def loop_step(model, optimizer, penalties):
    """A training step whose loss may hold the penalties, or only read them."""

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
            total = sum(model.losses, 0.0)
            if penalties:
                loss += total
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(loss, variables), variables)
        return total

    return step


@pytest.mark.parametrize(
    ("name", "jit_compile"),
    [("L0Regularization", True), ("VariationalDropout", False)],
)
def test_updater_of_a_loop_without_the_penalties_warns(name, jit_compile):
    model = techniques.mlp(name)
    optimizer = keras.optimizers.SGD(0.1)
    optimizer.build(model.trainable_variables)
    without = loop_step(model, optimizer, penalties=False)
    updater = sos.SparsityUpdater(model, optimizer)
    with pytest.warns(SparsityWarning, match="'a', 'b'"):
        with updater:
            without(*techniques.batch())
            # An evaluation.
            assert float(sum(model.losses)) > 0
            updater.step()
    step = techniques.train_step(model, optimizer, jit_compile=jit_compile)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SparsityWarning)
        for _ in range(2):  # The second uses the compiled step again.
            with updater:
                step(*techniques.batch())
                updater.step()


def test_penalties_are_the_same_to_the_bit_for_being_watched():
    model = techniques.mlp("VariationalDropout", penalty_weight=0.1)
    layer = model.layers[0]
    (weight,) = layer.sparse_weights
    state = weight.state["log_sigma2"]
    with sos.SparsityUpdater(model, keras.optimizers.SGD()):
        with tf.GradientTape(persistent=True) as tape:
            found = layer.losses[0]
            expected = 0.1 * layer.penalty(weight)
        assert float(found) == float(expected)
        np.testing.assert_array_equal(
            tape.gradient(found, state.value),
            tape.gradient(expected, state.value),
        )


# What is refused.


@pytest.mark.parametrize("steps", [0, -1])
def test_updater_with_no_steps_per_execution_raises(steps):
    model, _ = model_with_record(techniques.Staircase())
    with pytest.raises(
        ValueError, match=f"Received: steps_per_execution={steps}"
    ):
        sos.SparsityUpdater(
            model, keras.optimizers.SGD(), steps_per_execution=steps
        )


def test_wrong_arguments_raise():
    model, _ = model_with_record(techniques.Staircase())
    with pytest.raises(TypeError, match="model='m'"):
        sos.SparsityUpdater("m", keras.optimizers.SGD())
    with pytest.raises(TypeError, match="Received: optimizer"):
        sos.SparsityUpdater(model, "sgd")
    dense = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    with pytest.raises(ValueError, match="has no sparse layer"):
        sos.SparsityUpdater(dense, keras.optimizers.SGD())
    unbuilt = keras.Sequential(
        [techniques.wrap("FixedMask", keras.layers.Dense(2))]
    )
    with pytest.raises(ValueError, match="unbuilt layers"):
        sos.SparsityUpdater(unbuilt, keras.optimizers.SGD())


def test_updater_of_a_users_schedule_follows_it():
    class Odd(sos.schedules.PruningSchedule):
        def __call__(self, step):
            return step % 2 == 1, tf.cast(step, tf.float32) / 1000

        def get_config(self):
            return {}

    assert drive(Odd(), 6) == [1, 3, 5]


# Several devices.


def on_each_replica(variable):
    return [value.numpy() for value in variable.value.values]


def mirrored(name):
    strategy = techniques.two_replicas()
    with strategy.scope():
        model = techniques.mlp(name)
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
        optimizer.build(model.trainable_variables)
    return strategy, model, optimizer


def check_replicas(model, before):
    for variable in model.variables:
        first, second = on_each_replica(variable)
        assert first.tobytes() == second.tobytes()
    for old, new in zip(before, model.trainable_variables, strict=True):
        assert np.isfinite(new.numpy()).all()
        assert (old != new.numpy()).any()
    for wrapper in find_wrappers(model):
        if isinstance(wrapper, sos.extend.MaskedWrapper):
            mask = techniques.state(wrapper, "mask").numpy()
            assert mask.sum() == mask.size // 2


@pytest.mark.oldest
@pytest.mark.parametrize("name", TECHNIQUES)
def test_updater_of_two_replicas_keeps_them_equal(name):
    strategy, model, optimizer = mirrored(name)
    before = [v.numpy() for v in model.trainable_variables]
    inner = techniques.train_step(model, optimizer).python_function

    @tf.function
    def step(x, y):
        return strategy.run(lambda: inner(x, y))

    with sos.SparsityUpdater(model, optimizer) as updater:
        for i in range(3):
            step(*techniques.batch(seed=i))
            updater.step()
    assert updater.iterations == 3
    check_replicas(model, before)


# One of each kind: the loop above has all of them on replicas.
@pytest.mark.oldest
@pytest.mark.parametrize("name", ["MagnitudePruning", "VariationalDropout"])
def test_fit_on_two_replicas_keeps_them_equal(name):
    strategy, model, optimizer = mirrored(name)
    before = [v.numpy() for v in model.trainable_variables]
    with strategy.scope():
        model.compile(optimizer, "mse")
    x, y = techniques.batch(16)
    model.fit(x, y, batch_size=8, verbose=0, callbacks=[sos.SparsityCallback()])
    assert keras.ops.convert_to_numpy(optimizer.iterations) == 2
    check_replicas(model, before)


# Schedules that are laid over a loop.


def loop(sparse, optimizer, steps, **arguments):
    with sos.SparsityUpdater(sparse, optimizer, **arguments) as updater:
        for _ in range(steps):
            move(optimizer)
            updater.step()
    return [w.schedule.steps() for w in find_wrappers(sparse)]


def test_updater_with_train_steps_lays_the_schedules_over_them():
    sparse = sos.sparsify(
        techniques.dense_mlp(),
        "MagnitudePruning",
        sparsity=0.5,
        rules={"b/": {"begin_step": 12}},
    )
    optimizer = keras.optimizers.SGD()
    optimizer.iterations.assign(10)
    found = loop(sparse, optimizer, 8, train_steps=8)
    assert found == [(10, 16, 1), (12, 16, 1)]
    for mask in techniques.sparse_state(sparse).values():
        assert mask.mean() == 0.5
    # It stays in a second loop.
    assert loop(sparse, optimizer, 8, train_steps=80) == found
    assert loop(sparse, optimizer, 8) == found


def test_updater_of_unknown_length_raises_and_binds_nothing():
    sparse = sos.sparsify(
        techniques.dense_mlp(), "MagnitudePruning", sparsity=0.5
    )
    optimizer = keras.optimizers.SGD()
    with pytest.raises(UsageError, match="train_steps=None"):
        loop(sparse, optimizer, 1)
    assert not any(w.step_counter.bound for w in find_wrappers(sparse))
    for wrong in (0, 1.5):
        with pytest.raises(UsageError, match=f"train_steps={wrong}"):
            sos.SparsityUpdater(sparse, optimizer, train_steps=wrong)
    assert loop(sparse, optimizer, 4, train_steps=4) == [(0, 3, 1)] * 2


def test_updater_lays_no_schedule_out_if_one_does_not_fit():
    sparse = sos.sparsify(
        techniques.dense_mlp(),
        "MagnitudePruning",
        sparsity=0.5,
        rules={"b/": {"begin_step": 7}},
    )
    with pytest.raises(UsageError, match="begin_step=7, train_steps=8"):
        loop(sparse, keras.optimizers.SGD(), 8, train_steps=8)
    assert not any(w.schedule.resolved for w in find_wrappers(sparse))
