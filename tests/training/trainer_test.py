import collections
import functools
import signal
import time

import hypothesis
import hypothesis.strategies as st
import keras
import numpy as np
import pytest
import tensorflow as tf

import sos
from sos.errors import (
    CheckpointError,
    NonFiniteLossError,
    Stopped,
    TaskError,
    UsageError,
)
from sos.training import strategies
from sos.training.checkpoints import Checkpoints
from sos.training.reporting import MaskUpdate
from sos.training.task import Task
from sos.training.trainer import Action, LoopLength, Trainer
from sos.wrappers.base import find_wrappers
from tests.support import techniques, toy_task
from tests.support.toy_task import OrderedTask, ToyTask


@sos.extend.register
class TrainerSaliency(sos.extend.PruningWrapper):
    """What a user may write: ranks by gradients since the last update."""

    uses_gradient = True

    def scores(self, weight):
        return tf.abs(weight.value * weight.state["gradient"].value)


TECHNIQUES = [*techniques.NAMES, "TrainerSaliency"]
# Techniques whose masks are trained with as those of magnitude pruning are.
SIMILAR = ("FixedMask", "RandomPruning")


def one_device():
    return tf.distribute.OneDeviceStrategy("CPU:0")


HOST_ARGUMENTS = ("steps_per_loop", "max_seconds_per_loop", "timer", "gather")
TRACED_ARGUMENTS = ("gradient_accumulation_steps", "jit_compile")
# A task that differs in these alone has the same traced functions.
VALUES = {"seed", "schedule", "ranking", "penalty_weight"}
# Trainers by what they were traced for, and the keys of those in use.
POOL = collections.defaultdict(list)
IN_USE = []


@pytest.fixture(autouse=True)
def pool():
    """Takes trainers back when a test ends, so that others reset them."""
    yield
    while IN_USE:
        key, trainer = IN_USE.pop()
        POOL[key].append(trainer)


def make_trainer(technique=None, *, replicas=1, task=None, **arguments):
    """A trainer of a toy task; what a `Trainer` does not take is the task's.

    Tracing takes most of a test's time: a trainer that an earlier test has left
    is reset, which `test_reset_gives_the_bits_of_a_new_trainer` shows to be as
    good as a new one.
    """
    host, traced = (
        {name: arguments.pop(name) for name in names if name in arguments}
        for names in (HOST_ARGUMENTS, TRACED_ARGUMENTS)
    )
    key = None
    if task is None and not arguments.keys() - VALUES - {
        "batch_norm",
        "dropout",
        "batch_size",
    }:
        same = {k: v for k, v in arguments.items() if k not in VALUES}
        key = repr((technique, replicas, sorted({**same, **traced}.items())))
    task = task or ToyTask(technique, **arguments)
    if POOL[key]:
        trainer = POOL[key].pop()
        renew(trainer, task, **host)
    else:
        trainer = Trainer(
            task,
            strategy=one_device()
            if replicas == 1
            else techniques.two_replicas(),
            **traced,
            **host,
        )
    if key:
        IN_USE.append((key, trainer))
    return trainer


def renew(trainer, task, *, timer=time.perf_counter, gather=None, **bounds):
    """Resets a trainer, with other arguments of a new one."""
    trainer.reset(task)
    trainer._make_loop_length = functools.partial(
        LoopLength,
        max_steps=bounds.get("steps_per_loop", 100),
        max_seconds=bounds.get("max_seconds_per_loop", 10.0),
    )
    trainer._train_loop_length = trainer._make_loop_length()
    trainer._eval_loop_length = trainer._make_loop_length()
    trainer._timer = timer
    trainer._gather = functools.partial(
        gather or strategies.gather, trainer.strategy
    )


def make_checkpoints(trainer, folder, **kwargs):
    return Checkpoints(folder, configuration=trainer.configuration(), **kwargs)


class StopAt:
    """Asks to stop once so many steps are done."""

    def __init__(self, trainer, step, signum=signal.SIGTERM):
        self._trainer, self._step, self._signum = trainer, step, signum

    @property
    def requested(self):
        return self._signum if self._trainer.step >= self._step else None


def same_bits(values, expected):
    """Compares the values of two trainers."""
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        assert values[name].tobytes() == value.tobytes(), name


# Actions, and the lengths of loops.


@hypothesis.given(
    st.none() | st.integers(1, 7),
    st.lists(st.integers(0, 20), max_size=3),
    st.booleans(),
    st.integers(1, 20),
)
def test_action_is_due_at_its_steps(every, at, at_end, last):
    action = Action(call=print, every=every, at=tuple(at), at_end=at_end)
    due = [
        step
        for step in range(1, last + 1)
        if (every and step % every == 0)
        or step in at
        or (at_end and step == last)
    ]
    assert [s for s in range(1, last + 1) if action.due(s, last)] == due
    for step in range(last):
        later = [s for s in due if s > step and (s != last or not at_end)]
        if later:
            assert action.next_after(step) == later[0]


@pytest.mark.parametrize("every", [0, -3])
def test_action_every_zero_steps_raises(every):
    with pytest.raises(UsageError, match=f"Received: every={every}"):
        Action(call=print, every=every)


def test_loop_length_ignores_the_first_loop_and_measures_the_second():
    loop_length = LoopLength(max_steps=100, max_seconds=10.0)
    assert not loop_length.traced
    assert loop_length.loop_end(0) == 1
    loop_length.update(500.0)
    assert loop_length.traced
    assert loop_length.loop_end(1) == 2
    loop_length.update(2.0)
    assert loop_length.loop_end(2) == 7
    # A step that takes longer than a loop may is a loop.
    loop_length.update(11.0)
    assert loop_length.loop_end(7) == 8


@hypothesis.given(
    st.integers(0, 10**9), st.integers(1, 10**4), st.floats(1e-6, 1e3)
)
def test_loop_length_stays_within_both_bounds(step, max_steps, seconds):
    loop_length = LoopLength(max_steps=max_steps, max_seconds=10.0)
    loop_length.update(0.0)
    loop_length.update(seconds)
    end = loop_length.loop_end(step)
    assert end > step
    assert (end - step) * seconds <= 10.0 or end == step + 1
    # Loops end where they did, wherever training began.
    assert end <= (step // max_steps + 1) * max_steps


@pytest.mark.parametrize(
    ("max_steps", "max_seconds"),
    [(0, 1.0), (-1, 1.0), (1, 0.0), (1, float("nan"))],
)
def test_loop_length_of_bounds_that_are_not_positive_raises(
    max_steps, max_seconds
):
    with pytest.raises(
        UsageError,
        match=f"Received: steps_per_loop={max_steps}, "
        f"max_seconds_per_loop={max_seconds}",
    ):
        LoopLength(max_steps=max_steps, max_seconds=max_seconds)


# When loops end, and what is done between them.


def pruned(schedule, **arguments):
    """A trainer whose ranking notes the steps of its updates."""
    trainer = make_trainer(
        "MagnitudePruning",
        schedule=schedule,
        ranking=techniques.Recorder(),
        **arguments,
    )
    return trainer, trainer.steps.sparse_weights[0][0].ranking.log


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (techniques.Staircase(2, 9, 3), [2, 5, 8, 9]),
        # Before the first step, and a schedule that ends with training.
        (techniques.Staircase(0, 12, 5), [0, 5, 10, 12]),
        (techniques.Staircase(1, 20, 1), list(range(1, 13))),
        (techniques.Staircase(13, 20, 1), []),
    ],
    ids=["odd_end", "ends_with_training", "every_step", "later"],
)
def test_train_updates_masks_at_the_steps_of_the_schedule(schedule, expected):
    trainer, log = pruned(schedule, steps_per_loop=7)
    trainer.train(12)
    assert techniques.recorded(log) == expected
    assert trainer.step == 12


def test_train_updates_masks_as_an_updater_does():
    schedule = sos.schedules.PolynomialDecay(0.1, 0.8, 1, 9, frequency=2)
    trainer = make_trainer(
        "MagnitudePruning", schedule=schedule, steps_per_loop=100
    )
    trainer.train(11)
    task = ToyTask("MagnitudePruning", schedule=schedule)
    model = task.build_model()
    optimizer = task.build_optimizer(model)
    variables = model.trainable_variables
    optimizer.build(variables)
    batches = iter(task.train_dataset(tf.distribute.InputContext(), 0))

    @tf.function
    def step(batch):
        with tf.GradientTape() as tape:
            total, weight = task.compute_metrics(model, batch, training=True)[
                "loss"
            ]
            loss = total / weight + sum(model.losses)
        optimizer.apply(tape.gradient(loss, variables), variables)

    with sos.SparsityUpdater(model, optimizer) as updater:
        for _ in range(11):
            step(next(batches))
            updater.step()
    expected = {
        name: mask
        for name, mask in techniques.sparse_state(model).items()
        if name.endswith(":mask")
    }
    assert len(expected) == 2
    for name, mask in techniques.sparse_state(trainer.model).items():
        np.testing.assert_array_equal(mask, expected[name])
    for variable, other in zip(
        trainer.model.trainable_variables, variables, strict=True
    ):
        np.testing.assert_allclose(variable, other, rtol=1e-4, atol=1e-5)


def test_train_ends_loops_where_something_is_due(tmp_path):
    trainer = make_trainer(steps_per_loop=10)
    checkpoints = make_checkpoints(trainer, tmp_path, keep=99)
    summaries, acted = [], []
    trainer.train(
        30,
        checkpoints=checkpoints,
        save_every=8,
        actions=[Action(call=lambda t: acted.append(t.step), at=(5, 26, 99))],
        on_summary=[summaries.append],
    )
    # One step is traced, one is measured.
    ends = [1, 2, 5, 8, 10, 16, 20, 24, 26, 30]
    assert [summary.step for summary in summaries] == ends
    assert checkpoints.steps() == [8, 16, 24, 30]
    assert acted == [5, 26]


def test_train_calls_actions_in_order_after_the_save(tmp_path):
    trainer = make_trainer(steps_per_loop=4)
    checkpoints = make_checkpoints(trainer, tmp_path)
    done = []

    def note(name):
        return lambda t: done.append((t.step, name, checkpoints.steps()[-1:]))

    trainer.train(
        6,
        checkpoints=checkpoints,
        save_every=4,
        actions=[
            Action(call=note("b"), every=2),
            Action(call=note("a"), every=4, at_end=True),
            Action(call=note("never")),
        ],
        on_summary=[
            lambda summary: done.append((summary.step, "summary", None))
        ],
    )
    assert [each for each in done if each[0] in (2, 4, 6)] == [
        (2, "summary", None),
        (2, "b", []),
        (4, "summary", None),
        (4, "b", [4]),
        (4, "a", [4]),
        (6, "summary", None),
        (6, "b", [6]),
        (6, "a", [6]),
    ]


def test_train_with_a_failing_action_ends_and_leaves_nothing_bound():
    trainer = make_trainer("L0Regularization")

    def fail(trainer):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        trainer.train(5, actions=[Action(call=fail, at=(3,))])
    assert trainer.step == 3
    assert not any(
        w.step_counter.bound for w, _ in trainer.steps.sparse_weights
    )
    # It can go on.
    trainer.train(5)
    assert trainer.step == 5


class Timer:
    """A timer that moves with the steps of its trainer and not by itself."""

    def __init__(self, seconds_of_step):
        self.trainer = None
        self._seconds_of_step = seconds_of_step

    def __call__(self):
        step = self.trainer.step if self.trainer else 0
        return sum(self._seconds_of_step(i) for i in range(step))


def timed_trainer(seconds_of_step, **arguments):
    """A trainer whose steps take a known time."""
    timer = Timer(seconds_of_step)
    timer.trainer = make_trainer(timer=timer, **arguments)
    return timer.trainer


def test_train_with_slow_steps_bounds_loops_in_seconds():
    def seconds(step):
        return 100.0 if step == 0 else 2.0 if step < 12 else 30.0

    trainer = timed_trainer(
        seconds, steps_per_loop=100, max_seconds_per_loop=10.0
    )
    summaries = []
    trainer.train(20, on_summary=[summaries.append])
    # The first step, which is traced, is ignored; then 5 steps of 2 seconds;
    # one loop is too long when steps take longer.
    ends = [1, 2, 7, 12, 17, 18, 19, 20]
    assert [summary.step for summary in summaries] == ends
    assert [r.seconds for r in summaries] == [100, 2, 10, 10, 150, 30, 30, 30]
    assert trainer.seconds == 100 + 11 * 2 + 8 * 30
    assert summaries[2].examples_per_second == pytest.approx(8 / 2)
    assert summaries[2].seconds_left == pytest.approx(2 * 13)
    assert summaries[-1].seconds_left == 0
    # Unknown while tracing.
    assert summaries[0].examples_per_second is None
    assert summaries[0].seconds_left is None


def test_train_with_fast_steps_bounds_loops_in_steps():
    trainer = timed_trainer(lambda step: 1e-3, steps_per_loop=6)
    summaries = []
    trainer.train(20, on_summary=[summaries.append])
    assert [summary.step for summary in summaries] == [1, 2, 6, 12, 18, 20]


# What is computed does not depend on how.


def toy(technique, replicas=1, **own):
    """A trainer of all that has a state: dropout, statistics, schedules."""
    arguments = {"batch_norm": True, "dropout": 0.3}
    if technique and issubclass(
        sos.extend.techniques()[technique], sos.extend.PruningWrapper
    ):
        arguments["schedule"] = sos.schedules.PolynomialDecay(
            0.1, 0.8, 1, 9, frequency=3
        )
    return make_trainer(technique, replicas=replicas, **arguments, **own)


STEPS = 11


@functools.cache
def uninterrupted(technique):
    trainer = toy(technique)
    trainer.train(STEPS)
    return toy_task.values(trainer)


@pytest.fixture
def pruned_toy():
    return toy("MagnitudePruning")


@hypothesis.settings(
    max_examples=4,
    # Every example resets it.
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    st.integers(1, 12),
    st.none() | st.integers(1, 5),
    st.none() | st.integers(1, 5),
)
def test_train_in_any_loops_gives_the_same_bits(
    pruned_toy, tmp_path_factory, steps_per_loop, save_every, eval_every
):
    trainer = pruned_toy
    renew(trainer, trainer.task, steps_per_loop=steps_per_loop)
    folder = tmp_path_factory.mktemp("cut")
    trainer.train(
        STEPS,
        checkpoints=make_checkpoints(trainer, folder),
        save_every=save_every,
        actions=[Action(call=Trainer.evaluate, every=eval_every)],
    )
    same_bits(toy_task.values(trainer), uninterrupted("MagnitudePruning"))


@pytest.mark.parametrize(
    ("technique", "placement"),
    [
        *(
            pytest.param(
                technique,
                {},
                marks=pytest.mark.slow
                if technique in (None, *SIMILAR, "L0Regularization")
                else pytest.mark.oldest,
            )
            for technique in [None, *techniques.NAMES]
        ),
        # Gathered gradients, and states that replicas learn.
        ("TrainerSaliency", {"jit_compile": True}),
        ("TrainerSaliency", {"replicas": 2}),
        pytest.param(
            "L0Regularization", {"replicas": 2}, marks=pytest.mark.oldest
        ),
    ],
    ids=str,
)
def test_train_stopped_and_restored_goes_on_to_the_same_bits(
    technique, placement, tmp_path
):
    # Between mask updates.
    trainer = toy(technique, steps_per_loop=3, **placement)
    checkpoints = make_checkpoints(trainer, tmp_path)
    with pytest.raises(Stopped, match="SIGTERM at step 6, saved") as stopped:
        trainer.train(STEPS, checkpoints=checkpoints, stop=StopAt(trainer, 5))
    assert stopped.value.step == trainer.step == 6
    assert stopped.value.signal == signal.SIGTERM
    saved = toy_task.values(trainer)
    # Continuing in the same process is like never stopping.
    trainer.train(STEPS)
    expected = toy_task.values(trainer)
    # In another process: nothing is left but the checkpoint.
    renew(trainer, trainer.task, steps_per_loop=4)
    assert trainer.step == 0
    assert trainer.restore_or_initialize(checkpoints) == 6
    assert trainer.saved_step == 6
    same_bits(toy_task.values(trainer), saved)
    trainer.train(STEPS, checkpoints=checkpoints)
    assert checkpoints.steps() == [6, 11]
    same_bits(toy_task.values(trainer), expected)
    masks = [
        value
        for name, value in techniques.sparse_state(trainer.model).items()
        if name.endswith(":mask")
    ]
    if technique and trainer.task.overrides.get("schedule"):
        # The end of the schedule, also under XLA.
        assert [int(mask.sum()) for mask in masks] == [19, 10]


# Another task for the same trainer.


def other(technique, **own):
    """A task that differs from `toy`'s in seeds, schedules and numbers."""
    overrides = {}
    cls = technique and sos.extend.techniques()[technique]
    if cls and issubclass(cls, sos.extend.PruningWrapper):
        overrides["schedule"] = sos.schedules.PolynomialDecay(
            0.2, 0.6, 2, 8, frequency=2
        )
    if cls and issubclass(cls, sos.extend.PenalizedWrapper):
        overrides["penalty_weight"] = 0.05
    task = ToyTask(
        technique, batch_norm=True, dropout=0.3, **{**overrides, **own}
    )
    if cls and "seed" in sos.extend.hyperparameters(cls):
        # Of the technique.
        task.overrides["seed"] = 7
    return task


def traces(trainer):
    steps = trainer.steps
    return [
        function.experimental_get_tracing_count()
        for function in (steps.train_function, steps.eval_function)
    ]


@pytest.mark.parametrize(
    ("technique", "replicas"),
    [
        # The fast tests have masks, noise and gathered gradients.
        *(
            pytest.param(
                technique,
                1,
                marks=[pytest.mark.slow]
                * (technique in (None, *SIMILAR, "L0Regularization")),
            )
            for technique in [None, *TECHNIQUES]
        ),
        ("L0Regularization", 2),
    ],
)
def test_reset_gives_the_bits_of_a_new_trainer(technique, replicas, tmp_path):
    trainer = toy(technique, replicas)
    # A trace that takes long, and that does not differ by technique.
    evaluated = technique in (None, "VariationalDropout")
    trainer.train(5, checkpoints=make_checkpoints(trainer, tmp_path))
    if evaluated:
        trainer.evaluate()
    steps = trainer.steps
    trainer.reset(other(technique, seed=5))
    new = make_trainer(task=other(technique, seed=5), replicas=replicas)
    same_bits(toy_task.values(trainer), toy_task.values(new))
    assert (trainer.step, trainer.seconds, trainer.saved_step) == (0, 0.0, None)
    for each in (trainer, new):
        each.train(STEPS)
    same_bits(toy_task.values(trainer), toy_task.values(new))
    if evaluated:
        assert trainer.evaluate().metrics == new.evaluate().metrics
    # The compiled functions served both tasks.
    assert trainer.steps is steps
    assert max(traces(trainer)) == 1


def test_reset_takes_another_learning_rate():
    def sgd(rate):
        return ToyTask(optimizer=lambda: keras.optimizers.SGD(rate))

    trainer = make_trainer(task=sgd(0.1))
    trainer.train(2)
    steps = trainer.steps
    trainer.reset(sgd(0.5))
    new = make_trainer(task=sgd(0.5))
    for each in (trainer, new):
        each.train(3)
    same_bits(toy_task.values(trainer), toy_task.values(new))
    assert trainer.steps is steps


# What else is another step is a matter of `compile_signature_test`.
@pytest.mark.parametrize(
    ("technique", "changes"),
    [
        ("L0Regularization", {"ramp": sos.ramps.LinearRamp(0, 20)}),
        (None, {"batch_size": 4}),
    ],
    ids=["ramp", "batch_size"],
)
def test_reset_traces_anew_for_another_step(technique, changes):
    trainer = toy(technique)
    trainer.train(2)
    steps = trainer.steps
    arguments = {"batch_norm": True, "dropout": 0.3, **changes}
    trainer.reset(ToyTask(technique, **arguments))
    assert trainer.steps is not steps
    new = make_trainer(task=ToyTask(technique, **arguments))
    same_bits(toy_task.values(trainer), toy_task.values(new))
    trainer.train(1)


def test_reset_restores_another_tasks_checkpoint(tmp_path):
    trainer = toy("MagnitudePruning")
    first, second = (ToyTask("MagnitudePruning", seed=seed) for seed in (1, 2))
    for task in (first, second):
        trainer.reset(task)
        checkpoints = make_checkpoints(trainer, tmp_path / str(task.seed))
        assert trainer.restore_or_initialize(checkpoints) is None
        trainer.train(3, checkpoints=checkpoints)
    trainer.reset(first)
    checkpoints = make_checkpoints(trainer, tmp_path / "1")
    assert trainer.restore_or_initialize(checkpoints) == 3
    trainer.train(6)
    new = make_trainer(task=first)
    new.train(6)
    same_bits(toy_task.values(trainer), toy_task.values(new))


# Resuming.


def test_restore_of_gathered_gradients_goes_on_to_the_same_bits(tmp_path):
    trainer = toy("TrainerSaliency", replicas=2)
    checkpoints = make_checkpoints(trainer, tmp_path)
    # Masks are updated at the steps 1 and 4.
    trainer.train(2, checkpoints=checkpoints)
    trainer.train(3)
    expected = toy_task.values(trainer)
    renew(trainer, trainer.task)
    trainer.restore(checkpoints)
    trainer.train(3)
    (_, weight), *_ = trainer.steps.sparse_weights
    assert weight.state["gradient"].numpy().any()
    same_bits(toy_task.values(trainer), expected)


@pytest.mark.parametrize(
    "technique", ["MagnitudePruning", "VariationalDropout"]
)
def test_train_in_several_calls_gives_the_same_bits(technique):
    trainer = toy(technique)
    for steps in (2, 3, 3, 8, STEPS):
        trainer.train(steps)
        assert trainer.step == steps
    same_bits(toy_task.values(trainer), uninterrupted(technique))


@pytest.mark.parametrize("at", [4, 9])
def test_train_interrupted_before_a_mask_update_makes_it(at):
    """Python handles Ctrl-C when the compiled loop returns."""
    trainer = toy("MagnitudePruning")
    train = trainer.steps.train

    def interrupted(*arguments):
        totals = train(*arguments)
        if trainer.step == at:
            trainer.steps.train = train
            raise KeyboardInterrupt
        return totals

    trainer.steps.train = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.train(STEPS)
    assert trainer.step == at
    trainer.train(STEPS)
    same_bits(toy_task.values(trainer), uninterrupted("MagnitudePruning"))


def test_restore_of_accumulated_gradients_goes_on_to_the_same_bits(tmp_path):
    trainer = toy("VariationalDropout", gradient_accumulation_steps=2)
    checkpoints = make_checkpoints(trainer, tmp_path)
    trainer.train(4, checkpoints=checkpoints)
    trainer.train(STEPS)
    expected = toy_task.values(trainer)
    renew(trainer, trainer.task)
    trainer.restore(checkpoints)
    trainer.train(STEPS)
    same_bits(toy_task.values(trainer), expected)
    # And they are part of what a checkpoint is of.
    other = toy("VariationalDropout")
    with pytest.raises(
        CheckpointError, match="gradient_accumulation_steps: 2 saved, 1 now"
    ):
        other.restore(make_checkpoints(other, tmp_path))


def test_train_of_completed_steps_does_nothing():
    trainer = make_trainer("MagnitudePruning")
    trainer.train(3)
    before = toy_task.values(trainer)
    done = []
    trainer.train(
        3,
        actions=[Action(call=done.append, every=1, at_end=True)],
        on_summary=[done.append],
    )
    assert done == []
    same_bits(toy_task.values(trainer), before)


# Stopping.


def test_train_asked_to_stop_saves_and_does_nothing_else(tmp_path):
    trainer = make_trainer(steps_per_loop=4)
    checkpoints = make_checkpoints(trainer, tmp_path)
    done = []
    with pytest.raises(Stopped) as stopped:
        trainer.train(
            9,
            checkpoints=checkpoints,
            save_every=4,
            actions=[
                Action(call=lambda t: done.append(t.step), every=4),
                Action(call=lambda t: done.append("at_end"), at_end=True),
            ],
            stop=StopAt(trainer, 3, signal.SIGINT),
        )
    assert stopped.value.signal == signal.SIGINT
    assert checkpoints.steps() == [4]
    assert trainer.saved_step == 4
    assert done == []


def test_train_asked_to_stop_without_checkpoints_saves_nothing():
    trainer = make_trainer()
    with pytest.raises(Stopped, match="at step 1, not saved"):
        trainer.train(9, stop=StopAt(trainer, 0))


def test_train_asked_to_stop_in_the_last_loop_finishes(tmp_path):
    trainer = make_trainer()
    checkpoints = make_checkpoints(trainer, tmp_path)
    trainer.train(2, checkpoints=checkpoints, stop=StopAt(trainer, 2))
    assert checkpoints.steps() == [2]


def second_worker(row):
    """A `gather` with a second worker, whose numbers are `row`."""
    return lambda strategy, values: np.array([values, row[: len(values)]])


def test_train_of_several_workers_stops_together():
    stopping = [0.5, float(signal.SIGTERM)]
    trainer = make_trainer(gather=second_worker(stopping))
    with pytest.raises(Stopped, match="SIGTERM at step 1"):
        trainer.train(9)


# Numbers that are not finite.


def spoiled(at, *, of="y", replicas=1, technique=None, **arguments):
    """A trainer whose loss is not finite at a step, for its last example."""
    batch_size, steps = 4, 12
    x = techniques.normal(batch_size * steps, 6, seed=1)
    y = techniques.normal(batch_size * steps, 2, seed=2)
    if at is not None:
        {"x": x, "y": y}[of][(at + 1) * batch_size - 1] = np.nan
    settings = {}
    if technique == "MagnitudePruning":
        settings["schedule"] = sos.schedules.ConstantSparsity(
            0.5, 1, frequency=1
        )

    def model():
        if technique:
            return techniques.mlp(technique, **settings)
        return keras.Sequential(
            [keras.Input((6,)), keras.layers.Dense(2, name="a")]
        )

    task = OrderedTask(
        model,
        lambda: keras.optimizers.SGD(0.1),
        {"x": x, "y": y},
        batch_size=batch_size,
    )
    return make_trainer(task=task, replicas=replicas, **arguments)


@pytest.mark.parametrize(
    ("technique", "replicas"), [(None, 2), ("MagnitudePruning", 1)]
)
def test_train_of_a_loss_not_finite_names_its_step_and_saves_nothing(
    tmp_path, technique, replicas
):
    trainer = spoiled(7, technique=technique, replicas=replicas)
    checkpoints = make_checkpoints(trainer, tmp_path)
    summaries = []
    with pytest.raises(NonFiniteLossError, match="step 8") as error:
        trainer.train(
            12,
            checkpoints=checkpoints,
            save_every=6,
            on_summary=[summaries.append],
        )
    assert error.value.step == 7
    assert isinstance(error.value, ArithmeticError)
    # The last good one is there, and the bad loop has no summary.
    assert checkpoints.steps() == [6]
    assert [summary.step for summary in summaries] == [1, 2, 6]
    assert trainer.restore(checkpoints) == 6
    assert trainer.steps.weights_are_finite()
    # Nothing of it is left in what comes next.
    trainer.train(7, on_summary=[summaries.append])
    assert np.isfinite(summaries[-1].metrics["loss"])


def test_train_of_a_loss_without_any_weight_logs_it(caplog):
    x, y = techniques.normal(24, 6, seed=1), techniques.normal(24, 2, seed=2)
    weight = np.r_[np.ones(8), np.zeros(8), np.ones(8)].astype(np.float32)
    task = OrderedTask(
        lambda: keras.Sequential([keras.Input((6,)), keras.layers.Dense(2)]),
        lambda: keras.optimizers.SGD(0.1),
        {"x": x, "y": y, "weight": weight},
        batch_size=4,
    )
    trainer = make_trainer(task=task, steps_per_loop=2)
    kernels, kernel = {}, trainer.model.weights[0]
    note = Action(
        call=lambda t: kernels.update({t.step: kernel.numpy()}), every=2
    )
    trainer.train(6, actions=[note])
    (text,) = [
        r.getMessage() for r in caplog.records if "sum to 0" in r.getMessage()
    ]
    assert "in the steps 3 to 4:" in text
    np.testing.assert_array_equal(kernels[2], kernels[4])
    assert (kernels[4] != kernels[6]).all()


def test_train_of_a_last_loss_not_finite_raises(tmp_path):
    trainer = spoiled(7)
    checkpoints = make_checkpoints(trainer, tmp_path)
    with pytest.raises(NonFiniteLossError) as error:
        trainer.train(8, checkpoints=checkpoints)
    assert error.value.step == 7
    assert checkpoints.steps() == []


def test_train_of_weights_not_finite_saves_nothing(tmp_path):
    trainer = make_trainer()
    checkpoints = make_checkpoints(trainer, tmp_path)

    def spoil(summary):
        if summary.step == 4:
            trainer.model.weights[0].assign_add(tf.fill((6, 16), np.inf))

    with pytest.raises(NonFiniteLossError, match="weight .*step 4"):
        trainer.train(
            9, checkpoints=checkpoints, save_every=2, on_summary=[spoil]
        )
    assert checkpoints.steps() == [2]


@pytest.mark.parametrize("technique", ["MagnitudePruning", None])
def test_train_of_a_gradient_not_finite_raises_at_the_next_look(
    tmp_path, technique
):
    """The root of an error of zero: a loss of zero, a gradient of NaN."""
    trainer = spoiled(None, technique=technique)
    task = trainer.task

    def losses(outputs, batch):
        weight = tf.constant([0.0, 0.0, 0.0, 1.0])
        bad = tf.cast(trainer.optimizer.iterations.value == 3, tf.float32)
        error = tf.square(outputs - batch["y"]) * (1 - bad)
        return weight * tf.reduce_sum(tf.sqrt(error), axis=1)

    task.losses = losses
    checkpoints = make_checkpoints(trainer, tmp_path)
    with pytest.raises(NonFiniteLossError) as error:
        trainer.train(9, checkpoints=checkpoints, save_every=2)
    # The update of the masks finds it, or the save.
    assert error.value.step == 4
    assert "weight" in str(error.value)
    assert checkpoints.steps() == [2]


# Evaluation.


def expected_metrics(trainer):
    """Over all examples at once, without padding."""
    task = trainer.task
    x, y = (a[toy_task.EXAMPLES :] for a in (task.points, task.labels))
    logits = trainer.model(x, training=False).numpy().astype(np.float64)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return {
        "loss": pytest.approx(-logits[np.arange(len(y)), y].mean(), rel=1e-5),
        "accuracy": pytest.approx((logits.argmax(1) == y).mean()),
    }


@pytest.mark.parametrize(("replicas", "batch_size"), [(1, 8), (2, 40)])
def test_evaluate_sees_every_example_once(replicas, batch_size):
    trainer = make_trainer(
        "L0Regularization",
        replicas=replicas,
        batch_size=batch_size,
        batch_norm=True,
        dropout=0.5,
        penalty_weight=1e3,
    )
    for done in (0, 2):
        trainer.train(done)
        summary = trainer.evaluate(9)
        assert summary.metrics == expected_metrics(trainer)
        assert (summary.kind, summary.step, summary.total_steps) == (
            "eval",
            done,
            9,
        )
        # Again, as all of it was taken.
        assert trainer.evaluate().metrics == summary.metrics
    assert trainer.evaluate().total_steps == 2


def test_evaluate_leaves_training_as_it_was():
    trainer = toy("VariationalDropout", steps_per_loop=2)
    trainer.evaluate()
    trainer.train(
        STEPS,
        actions=[Action(call=Trainer.evaluate, every=1, at_end=True)],
    )
    same_bits(toy_task.values(trainer), uninterrupted("VariationalDropout"))


class StopAfter:
    """Asks to stop when it was asked so many times."""

    def __init__(self, looks):
        self._looks = looks

    @property
    def requested(self):
        self._looks -= 1
        return signal.SIGTERM if self._looks < 0 else None


def test_evaluate_that_is_stopped_leaves_nothing_behind():
    trainer = make_trainer("MagnitudePruning", batch_size=2, steps_per_loop=3)
    trainer.train(2)
    whole = trainer.evaluate()
    # Ten batches: 3, then 6.
    with pytest.raises(
        Stopped, match="SIGTERM at step 2, .*6 of 10 batches"
    ) as stopped:
        trainer.evaluate(stop=StopAfter(1))
    assert (stopped.value.signal, stopped.value.step) == (signal.SIGTERM, 2)
    assert trainer.evaluate().metrics == whole.metrics
    # After the last batch there is nothing left to stop.
    assert trainer.evaluate(stop=StopAfter(3)).metrics == whole.metrics


def test_train_with_an_action_stopped_loses_no_step(tmp_path):
    trainer = make_trainer(batch_size=2, steps_per_loop=3)
    checkpoints = make_checkpoints(trainer, tmp_path)
    evaluation = Action(
        call=lambda trainer: trainer.evaluate(stop=StopAfter(0)), at=(5,)
    )
    with pytest.raises(Stopped, match="step 5, .*1 of 10 batches"):
        trainer.train(9, checkpoints=checkpoints, actions=[evaluation])
    assert checkpoints.steps() == [5]
    trainer.train(9, checkpoints=checkpoints)
    assert checkpoints.steps() == [5, 9]


def test_evaluate_of_workers_with_other_numbers_of_batches_raises():
    trainer = make_trainer(gather=second_worker([4.0]))
    with pytest.raises(TaskError, match=r"every host.*Received: \[3, 4\]"):
        trainer.evaluate()


class ScoredTask(ToyTask):
    """Has evaluators, which keep the models that they are called with."""

    def __init__(self, *arguments, names=("above", "zeros"), **options):
        super().__init__(*arguments, **options)
        self.names = names
        self.models = []

    def evaluators(self, checkpoints):
        return {"accuracies": self.accuracies, "zeros": self.zeros}

    def accuracies(self, model):
        self.models.append(model)
        x, y = (a[toy_task.EXAMPLES :] for a in (self.points, self.labels))
        logits = keras.ops.convert_to_numpy(model(x, training=False))
        return {self.names[0]: np.mean(logits.argmax(1) == y)}

    def zeros(self, model):
        self.models.append(model)
        return {self.names[1]: sos.sparsity_report(model).sparsity}


@pytest.mark.parametrize("replicas", [1, 2])
def test_evaluators_add_figures_to_the_metrics(replicas):
    task = ScoredTask("MagnitudePruning", batch_norm=True, dropout=0.3)
    trainer = make_trainer(task=task, replicas=replicas)
    for steps in (1, 3):
        trainer.train(steps)
        summary = trainer.evaluate()
        metrics = summary.metrics
        assert set(metrics) == {"accuracy", "loss", "above", "zeros"}
        assert metrics["above"] == pytest.approx(metrics["accuracy"])
        assert metrics["zeros"] == summary.sparsity == 0.5
    # One model, which on several replicas is a copy.
    assert len({id(model) for model in task.models}) == 1
    assert (task.models[0] is trainer.model) == (replicas == 1)


def test_evaluators_follow_the_task_after_a_reset():
    trainer = make_trainer(task=ScoredTask("MagnitudePruning"), replicas=2)
    trainer.evaluate()
    task = ScoredTask("MagnitudePruning", seed=3, names=("a", "b"))
    trainer.reset(task)
    metrics = trainer.evaluate().metrics
    assert metrics["a"] == pytest.approx(metrics["accuracy"])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("loss", "zeros"), r"\['accuracies'\].*Received: \['loss'\]"),
        (("same", "same"), r"\['zeros'\].*\['accuracy', 'loss', 'same'\]"),
    ],
)
def test_evaluators_with_names_that_are_taken_raise(names, message):
    trainer = make_trainer(task=ScoredTask("MagnitudePruning", names=names))
    with pytest.raises(TaskError, match=message):
        trainer.evaluate()


def test_evaluators_run_on_the_chief_only():
    class Worker(Trainer):
        is_chief = False

    task = ScoredTask("MagnitudePruning")
    trainer = Worker(task, strategy=techniques.two_replicas())
    assert set(trainer.evaluate().metrics) == {"accuracy", "loss"}
    assert task.models == []


def test_evaluators_can_be_stopped_between():
    task = ScoredTask("MagnitudePruning")
    trainer = make_trainer(task=task)
    # Three batches, in loops of one, one and one.
    with pytest.raises(Stopped, match="'accuracies'"):
        trainer.evaluate(stop=StopAfter(3))
    # After the last one there is nothing left to stop.
    assert "zeros" in trainer.evaluate(stop=StopAfter(4)).metrics


class AveragedTask(ToyTask):
    """Scores the mean of its checkpoints, and names them."""

    def evaluators(self, checkpoints):
        def evaluator(model):
            before = _kernel(model)
            with checkpoints.average(model, last=2) as steps:
                mean = _kernel(model).mean()
            np.testing.assert_array_equal(_kernel(model), before)
            return {"mean": mean, "averaged": f"steps {steps}"}

        return {"average": evaluator}


def _kernel(model):
    return keras.ops.convert_to_numpy(model.get_layer("b").kernel)


@pytest.mark.parametrize("replicas", [1, 2])
def test_evaluators_may_score_the_mean_of_checkpoints(replicas, tmp_path):
    task = AveragedTask("MagnitudePruning", batch_norm=True)
    trainer = make_trainer(task=task, replicas=replicas)
    checkpoints = Checkpoints(
        tmp_path, configuration=trainer.configuration(), keep=5
    )
    kernels = {}
    for step in (1, 2, 3):
        trainer.train(step, checkpoints=checkpoints)
        kernels[step] = _kernel(trainer.model)
    before = toy_task.values(trainer)
    summary = trainer.evaluate(checkpoints=checkpoints)
    assert summary.texts == {"averaged": "steps (2, 3)"}
    mean = (kernels[2] + kernels[3]) / 2
    assert summary.metrics["mean"] == pytest.approx(mean.mean(), rel=1e-6)
    for name, value in toy_task.values(trainer).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    # Of an earlier checkpoint, without the later ones.
    trainer.restore_step(checkpoints, 2)
    summary = trainer.evaluate(checkpoints=checkpoints)
    assert summary.texts == {"averaged": "steps (1, 2)"}


def test_evaluators_without_checkpoints_receive_none():
    class Task(ToyTask):
        def evaluators(self, checkpoints):
            assert checkpoints is None
            return {"name": lambda model: {"text": "none"}}

    summary = make_trainer(task=Task()).evaluate()
    assert summary.texts == {"text": "none"}
    assert set(summary.metrics) == {"accuracy", "loss"}


def test_evaluate_with_a_copy_of_another_model_raises():
    trainer = make_trainer(task=ScoredTask("MagnitudePruning"), replicas=2)
    trainer.task.batch_norm = True
    with pytest.raises(TaskError, match="norm/gamma"):
        trainer.evaluate()


# Export.


class ServedTask(ToyTask):
    """Serves probabilities, too."""

    def serving(self, model):
        module = super().serving(model)
        assert not sos.wrappers.base.find_wrappers(module.model)

        @tf.function(input_signature=[tf.TensorSpec([None, 6])])
        def probabilities(x):
            return {"p": tf.nn.softmax(module(x))}

        module.signatures["probabilities"] = probabilities
        return module


@pytest.mark.parametrize(
    ("technique", "replicas"),
    [("MagnitudePruning", 1), ("L0Regularization", 2)],
)
def test_export_writes_what_the_task_serves(technique, replicas, tmp_path):
    task = ServedTask(technique, batch_norm=True)
    trainer = make_trainer(task=task, replicas=replicas)
    trainer.train(2)
    trainer.export(tmp_path / "exported")
    loaded = tf.saved_model.load(str(tmp_path / "exported"))
    x = task.points[toy_task.EXAMPLES :]
    expected = trainer.model(x, training=False)
    np.testing.assert_allclose(loaded(x), expected, rtol=1e-5)
    np.testing.assert_allclose(
        loaded.signatures["probabilities"](tf.constant(x))["p"],
        tf.nn.softmax(expected),
        rtol=1e-5,
    )


class ExportedMeanTask(ToyTask):
    """Exports the mean of two checkpoints."""

    def averaged_weights(self, model, checkpoints):
        if checkpoints is None:
            return super().averaged_weights(model, checkpoints)
        return checkpoints.average(model, last=2)


@pytest.mark.parametrize("replicas", [1, 2])
def test_export_has_the_weights_that_the_task_averages(replicas, tmp_path):
    trainer = make_trainer(
        task=ExportedMeanTask("MagnitudePruning"), replicas=replicas
    )
    checkpoints = make_checkpoints(trainer, tmp_path / "checkpoints")
    kernels, masks = [None], [None]
    for step in (1, 2, 3):
        trainer.train(step)
        trainer.save(checkpoints)
        (kernel,) = (
            variable
            for variable in trainer.model.trainable_variables
            if variable.path.endswith("b/kernel")
        )
        kernels.append(keras.ops.convert_to_numpy(kernel))
        masks.append(techniques.sparse_state(trainer.model)["b/kernel:mask"])
    assert 0 < masks[-1].mean() < 1
    trainer.export(tmp_path / "mean", checkpoints)
    trainer.export(tmp_path / "last")
    trainer.restore_step(checkpoints, 2)
    trainer.export(tmp_path / "earlier", checkpoints)
    for name, expected in (
        ("mean", (kernels[2] + kernels[3]) / 2 * masks[3]),
        ("last", kernels[3] * masks[3]),
        ("earlier", (kernels[1] + kernels[2]) / 2 * masks[2]),
    ):
        loaded = tf.saved_model.load(str(tmp_path / name))
        (found,) = (w for w in loaded.weights if w.shape == expected.shape)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_export_without_a_scope_of_weights_raises(tmp_path):
    class Averaged(ToyTask):
        def averaged_weights(self, model, checkpoints):
            checkpoints.average(model)

    trainer = make_trainer(task=Averaged())
    checkpoints = make_checkpoints(trainer, tmp_path / "checkpoints")
    with pytest.raises(TaskError, match=r"averaged_weights`.*context manager"):
        trainer.export(tmp_path / "exported", checkpoints)


def test_export_of_an_invalid_module_raises():
    class Served(ToyTask):
        def serving(self, model):
            return model

    with pytest.raises(TaskError, match="serving`.*tf.Module"):
        make_trainer(task=Served()).export("somewhere")


# Loops of evaluation.


def test_evaluate_in_any_loops_gives_the_same_bits():
    trainer = make_trainer(
        "L0Regularization", replicas=2, batch_size=2, batch_norm=True
    )
    whole = [trainer.evaluate().metrics for _ in range(2)]
    renew(trainer, trainer.task, max_seconds_per_loop=1e-9)
    assert [trainer.evaluate().metrics for _ in range(2)] == whole


def test_evaluate_of_several_workers_stops_together():
    # The first number is the number of batches.
    stopping = [3.0, float(signal.SIGTERM)]
    trainer = make_trainer(gather=second_worker(stopping))
    with pytest.raises(Stopped, match="1 of 3 batches"):
        trainer.evaluate()


def test_evaluate_returns_a_summary_without_training_figures():
    trainer = make_trainer("MagnitudePruning")
    trainer.train(2)
    seconds = trainer.seconds
    summary = trainer.evaluate()
    assert (
        summary.sparsity == sos.sparsity_report(trainer.model).sparsity == 0.5
    )
    assert summary.learning_rate is None
    assert summary.penalty is None
    assert summary.examples_per_second is None
    assert summary.seconds_left is None
    assert summary.seconds > 0
    assert trainer.seconds == seconds


# Records of training.


def test_train_summaries_describe_their_loops():
    trainer = make_trainer("MagnitudePruning", steps_per_loop=4)
    summaries = []
    trainer.train(8, on_summary=[summaries.append])
    for summary, begin in zip(summaries, [0, 1, 2, 4], strict=True):
        assert summary.kind == "train"
        assert summary.total_steps == 8
        assert set(summary.metrics) == {"loss", "accuracy"}
        # Accuracies of so many examples.
        count = summary.metrics["accuracy"] * 8 * (summary.step - begin)
        assert abs(count - round(count)) < 1e-3
        assert summary.seconds > 0
        assert summary.penalty is None
        assert summary.weight_penalty == {}
        assert summary.sparsity == 0.5
        assert list(summary.weight_sparsity.values()) == [0.5, 0.5]
        assert [p[-8:] for p in summary.weight_sparsity] == [
            "a/kernel",
            "b/kernel",
        ]
        schedule = keras.optimizers.schedules.CosineDecay(0.02, 100)
        assert summary.learning_rate == pytest.approx(
            float(schedule(summary.step))
        )
    assert sum(r.seconds for r in summaries) == pytest.approx(trainer.seconds)


def test_train_summaries_hold_penalties_as_in_the_loss():
    ramp = sos.ramps.LinearRamp(begin_step=0, end_step=10)
    trainer = make_trainer("VariationalDropout", ramp=ramp, penalty_weight=0.01)
    # An evaluation has none, before and after.
    assert trainer.evaluate().penalty is None
    summaries, expected = [], []

    def note(summary):
        summaries.append(summary)
        expected.append(float(sum(trainer.model.losses)))

    trainer.train(6, on_summary=[note])
    for summary, penalty in zip(summaries, expected, strict=True):
        assert summary.penalty == pytest.approx(penalty, rel=1e-5)
        assert penalty > 0
        assert sum(summary.weight_penalty.values()) == summary.penalty
        assert list(summary.weight_penalty) == list(summary.weight_sparsity)
    assert trainer.evaluate().penalty is None


def test_train_summaries_of_a_dense_model_have_no_sparsity():
    trainer = make_trainer(
        optimizer=lambda: keras.optimizers.SGD(0.25, momentum=0.9)
    )
    summaries = []
    trainer.train(3, on_summary=[summaries.append])
    assert summaries[-1].sparsity is None
    assert summaries[-1].penalty is None
    assert summaries[-1].weight_sparsity == {}
    assert summaries[-1].learning_rate == 0.25


@pytest.mark.parametrize("replicas", [1, 2])
def test_train_summaries_hold_mask_updates_once(replicas, tmp_path):
    schedule = sos.schedules.PolynomialDecay(0.2, 0.8, 0, 9, frequency=3)
    arguments = {"schedule": schedule, "replicas": replicas}
    trainer = make_trainer("MagnitudePruning", steps_per_loop=1, **arguments)

    def read_masks(trainer):
        state = techniques.sparse_state(trainer.model)
        masks = [v.ravel() for n, v in state.items() if n.endswith(":mask")]
        history[trainer.step] = np.concatenate(masks)

    history, expected, summaries = {}, [], []
    read_masks(trainer)
    read = Action(call=read_masks, every=1)
    trainer.train(11, actions=[read], on_summary=[summaries.append])
    # The update before the first step is in the first summary.
    assert [u.step for u in summaries[0].mask_updates] == [0]
    single = [u for s in summaries for u in s.mask_updates]
    for step in (3, 6, 9):
        old, new = history[step - 1].astype(int), history[step].astype(int)
        expected.append(
            MaskUpdate(
                step=step,
                elements=old.size,
                kept=int(new.sum()),
                pruned=int((old > new).sum()),
                regrown=int((old < new).sum()),
            )
        )
    assert single[1:] == expected
    assert any(u.regrown for u in expected)
    # In longer loops, of two processes.
    trainer = make_trainer("MagnitudePruning", steps_per_loop=4, **arguments)
    checkpoints = make_checkpoints(trainer, tmp_path)
    summaries = []
    trainer.train(6, checkpoints=checkpoints, on_summary=[summaries.append])
    renew(trainer, trainer.task, steps_per_loop=5)
    trainer.restore_or_initialize(checkpoints)
    trainer.train(11, on_summary=[summaries.append])
    assert [u for s in summaries for u in s.mask_updates] == single


# Checkpoints of a trainer.


def test_restore_continues_the_duration(tmp_path):
    first, second = make_trainer(), make_trainer()
    first.train(3, checkpoints=make_checkpoints(first, tmp_path))
    checkpoints = make_checkpoints(second, tmp_path)
    assert second.restore(checkpoints) == 3
    assert second.seconds == first.seconds > 0
    second.train(5)
    assert second.seconds > first.seconds


def test_restore_without_a_checkpoint_returns_none(tmp_path):
    trainer = make_trainer()
    assert trainer.restore(make_checkpoints(trainer, tmp_path)) is None
    assert trainer.step == 0


@pytest.mark.parametrize("replicas", [1, 2])
def test_initialize_is_called_when_nothing_is_restored(replicas, tmp_path):
    class Initialized(ToyTask):
        calls = 0

        def initialize(self, model, optimizer):
            self.calls += 1
            assert tf.distribute.get_strategy() is trainer.strategy
            model.weights[0].assign(np.full((6, 16), 0.5, np.float32))

    task = Initialized()
    trainer = make_trainer(task=task, replicas=replicas)
    checkpoints = make_checkpoints(trainer, tmp_path)
    assert trainer.restore_or_initialize(checkpoints) is None
    kernel = trainer.model.weights[0]
    assert (keras.ops.convert_to_numpy(kernel) == 0.5).all()
    trainer.train(2, checkpoints=checkpoints)
    assert trainer.restore_or_initialize(checkpoints) == 2
    assert (keras.ops.convert_to_numpy(kernel) != 0.5).any()
    assert task.calls == 1


def test_restore_of_workers_with_other_checkpoints_raises(tmp_path):
    trainer = make_trainer(gather=second_worker([-1.0]))
    checkpoints = make_checkpoints(trainer, tmp_path)
    trainer.save(checkpoints)
    with pytest.raises(CheckpointError, match=r"\[0, -1\]"):
        trainer.restore(checkpoints)


def test_restore_of_another_task_raises(tmp_path):
    trainer = make_trainer("MagnitudePruning")
    trainer.save(make_checkpoints(trainer, tmp_path))
    other = make_trainer("MagnitudePruning", seed=1)
    with pytest.raises(CheckpointError, match="seed: 0 saved, 1 now"):
        other.restore(make_checkpoints(other, tmp_path))


def test_train_with_a_failing_save_ends(tmp_path):
    class Full(Checkpoints):
        def save(self, step, *arguments, **kwargs):
            if step > 2:
                raise CheckpointError("no space left")
            super().save(step, *arguments, **kwargs)

    trainer = make_trainer()
    checkpoints = Full(tmp_path, configuration=trainer.configuration())
    with pytest.raises(CheckpointError, match="no space left"):
        trainer.train(6, checkpoints=checkpoints, save_every=2)
    assert checkpoints.steps() == [2]
    assert (trainer.step, trainer.saved_step) == (4, 2)


def test_restore_after_changes_logs_them(tmp_path, caplog):
    def warnings():
        texts = [r.getMessage() for r in caplog.records]
        caplog.clear()
        return [text for text in texts if "was saved with" in text]

    two = make_trainer(replicas=2)
    two.train(3, checkpoints=make_checkpoints(two, tmp_path))
    assert two.restore(make_checkpoints(two, tmp_path)) == 3
    assert warnings() == []
    one = make_trainer(jit_compile=True)
    assert one.restore(make_checkpoints(one, tmp_path)) == 3
    replicas, jit_compile = warnings()
    assert "replicas=2, and training resumes with replicas=1" in replicas
    assert "jit_compile=False, and training resumes" in jit_compile
    one.train(4)


def test_restore_with_another_number_of_hosts_logs_it(tmp_path, caplog):
    class TwoHosts(Checkpoints):
        def save(self, *arguments, metadata, **kwargs):
            assert metadata["hosts"] == 1
            super().save(
                *arguments, metadata={**metadata, "hosts": 2}, **kwargs
            )

    trainer = make_trainer()
    checkpoints = TwoHosts(tmp_path, configuration=trainer.configuration())
    trainer.save(checkpoints)
    trainer.restore(checkpoints)
    (text,) = [r.getMessage() for r in caplog.records]
    assert "hosts=2, and training resumes with hosts=1" in text
    assert "the order of the examples may differ" in text


# Invalid arguments.


def test_evaluate_without_evaluation_data_raises():
    class TrainOnly(ToyTask):
        eval_dataset = Task.eval_dataset

    assert not TrainOnly().has_evaluation
    assert ToyTask().has_evaluation
    with pytest.raises(UsageError, match="TrainOnly"):
        make_trainer(task=TrainOnly()).evaluate()


def test_trainer_with_loops_of_nothing_raises():
    with pytest.raises(UsageError, match="steps_per_loop=0"):
        Trainer(ToyTask(), strategy=one_device(), steps_per_loop=0)


def test_trainer_with_batches_that_cannot_be_cut_raises():
    with pytest.raises(ValueError, match="gradient_accumulation_steps=3"):
        make_trainer(gradient_accumulation_steps=3)


def test_schedules_without_an_end_are_laid_over_the_whole_training(tmp_path):
    numbers = {"schedule": "polynomial", "frequency": None, "sparsity": 0.75}
    first, second = (
        make_trainer("MagnitudePruning", steps_per_loop=2, **numbers)
        for _ in range(2)
    )
    assert not any(w.schedule.resolved for w in find_wrappers(first.model))

    with pytest.raises(Stopped):
        first.train(
            STEPS,
            checkpoints=make_checkpoints(first, tmp_path),
            stop=StopAt(first, 5),
        )
    second.restore(make_checkpoints(second, tmp_path))
    for trainer in (first, second):
        trainer.train(STEPS)
        for wrapper in find_wrappers(trainer.model):
            assert wrapper.schedule.steps() == (0, round(0.75 * STEPS), 1)
    assert first.evaluate().sparsity == pytest.approx(0.75, abs=0.01)
    same_bits(toy_task.values(second), toy_task.values(first))
