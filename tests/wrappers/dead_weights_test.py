import copy
import warnings

import hypothesis
import hypothesis.strategies as st
import keras
import numpy as np
import pytest
import tensorflow as tf

import sos
from sos.masks import top_k_mask_device
from sos.training.steps import CompiledMaskUpdate
from sos.wrappers import dead_weights
from sos.wrappers.base import find_wrappers
from sos.wrappers.masked import update_masks
from tests.support import techniques


@pytest.fixture(params=["host", "compiled"])
def update(request):
    """The mask update of the host, and that of a TPU."""
    return update_masks if request.param == "host" else CompiledMaskUpdate()


def warned(function, *args, **kwargs):
    """The messages of the warnings that a call gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*args, **kwargs)
    return [str(w.message) for w in caught if w.category is UserWarning]


def wrap(kernel, technique=sos.MagnitudePruning, name="dense", **arguments):
    kernel = np.asarray(kernel, np.float32)
    layer = keras.layers.Dense(kernel.shape[1], use_bias=False, name=name)
    if technique is not sos.FixedMask:
        arguments.setdefault("schedule", techniques.SCHEDULE)
    wrapper = technique(layer, **arguments)
    wrapper.build((None, kernel.shape[0]))
    layer.kernel.assign(kernel)
    return wrapper


def mask_of(wrapper):
    return keras.ops.convert_to_numpy(techniques.state(wrapper, "mask"))


ORDERED = np.arange(1, 9).reshape(4, 2)


class ByGradient(sos.extend.PruningWrapper):
    uses_gradient = True

    def scores(self, weight):
        return tf.abs(weight.state["gradient"].value)


class CumulativeMagnitude(sos.MagnitudePruning):
    """Does not say which weights are pruned already."""

    cumulative = True


class Together(sos.extend.Ranking):
    """Ranks all tensors in one order, ties by position."""

    def masks(self, scores, sparsities):
        flat = tf.concat([tf.reshape(score, [-1]) for score in scores], 0)
        k = round(flat.shape[0] * (1 - sparsities[0]))
        parts = tf.split(
            top_k_mask_device(flat, k),
            [score.shape.num_elements() for score in scores],
        )
        return [
            tf.reshape(part, score.shape)
            for part, score in zip(parts, scores, strict=True)
        ]


class FirstRow(sos.extend.Ranking):
    """Keeps the first row, whatever the scores are."""

    uses_scores = False

    def masks(self, scores, sparsities):
        rows = [tf.ones([1, 2], tf.uint8), tf.zeros([3, 2], tf.uint8)]
        return [tf.concat(rows, 0) for _ in scores]


# Equal scores.


@pytest.mark.parametrize("value", [0.0, -0.0, 3.0, 1e-42])
def test_update_with_equal_scores_keeps_the_mask_and_catches_up(update, value):
    wrapper = wrap(np.full((4, 2), value))
    (message,) = warned(update, {wrapper: 0.5})
    assert message.startswith("The scores of dense/dense/kernel are all equal")
    assert "stays dense until an update has different scores" in message
    assert mask_of(wrapper).all()
    wrapper.layer.kernel.assign(ORDERED)
    assert not warned(update, {wrapper: 0.75})
    assert mask_of(wrapper).ravel().tolist() == [0] * 6 + [1, 1]


def test_update_with_equal_scores_leaves_a_sparse_mask_as_it_is(update):
    wrapper = wrap(ORDERED)
    update({wrapper: 0.25})
    before = mask_of(wrapper)
    wrapper.layer.kernel.assign(tf.ones((4, 2)))
    (message,) = warned(update, {wrapper: 0.5})
    assert "stays at 25.00% zeros" in message
    np.testing.assert_array_equal(mask_of(wrapper), before)


def test_update_with_partly_equal_scores_cuts_ties_by_position(update):
    wrapper = wrap([[1, 1], [1, 1], [1, 1], [1, 2]])
    assert not warned(update, {wrapper: 0.5})
    assert mask_of(wrapper).ravel().tolist() == [1, 1, 1, 0, 0, 0, 0, 1]


def test_update_to_sparsity_zero_has_nothing_to_rank(update):
    wrapper = wrap(np.zeros((4, 2)))
    wrapper.set_masks([np.eye(4, 2)])
    assert not warned(update, {wrapper: 0.0})
    assert mask_of(wrapper).all()


def test_update_concerns_the_weights_with_equal_scores_alone(update):
    equal, other = wrap(np.ones((4, 2)), name="equal"), wrap(ORDERED)
    (message,) = warned(update, {equal: 0.5, other: 0.5})
    assert "equal/kernel" in message
    assert mask_of(equal).all()
    assert mask_of(other).ravel().tolist() == [0] * 4 + [1] * 4


def test_random_scores_are_never_equal(update):
    wrapper = wrap(np.zeros((4, 2)), sos.RandomPruning)
    assert not warned(update, {wrapper: 0.5})
    assert mask_of(wrapper).sum() == 4


def test_update_by_gradients_waits_for_the_first_backward_pass(update):
    wrapper = wrap(ORDERED, ByGradient)
    (message,) = warned(update, {wrapper: 0.5})
    assert "are all equal" in message
    assert mask_of(wrapper).all()
    techniques.state(wrapper, "gradient").assign(ORDERED)
    assert not warned(update, {wrapper: 0.5})
    assert mask_of(wrapper).ravel().tolist() == [0] * 4 + [1] * 4


def test_nan_scores_raise_before_anything_is_warned_of(update):
    equal, wrong = wrap(np.ones((4, 2))), wrap(np.full((4, 2), np.nan))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(ValueError, match="NaN"):
            update({equal: 0.5, wrong: 0.5})
    assert mask_of(equal).all()
    assert mask_of(wrong).all()


def test_warnings_as_errors_leave_all_masks_set(update):
    equal, other = wrap(np.ones((4, 2))), wrap(ORDERED)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(UserWarning, match="are all equal"):
            update({equal: 0.5, other: 0.5})
    assert mask_of(other).sum() == 4


def test_ranking_across_tensors_needs_one_order_of_all(update):
    ranking = Together()
    low = wrap(np.ones((4, 2)), name="low", ranking=ranking)
    high = wrap(np.full((4, 2), 2.0), name="high", ranking=ranking)
    both = {low: 0.5, high: 0.5}
    # A constant tensor below another one: ranked, and nothing of it is left.
    (message,) = warned(update, both)
    assert "left no element of low/low/kernel (sparsity 0.5)" in message
    assert not mask_of(low).any()
    assert mask_of(high).all()
    for wrapper in both:
        wrapper.layer.kernel.assign(tf.zeros((4, 2)))
        wrapper.set_masks([np.ones((4, 2))])
    messages = warned(update, both)
    assert ["are all equal" in message for message in messages] == [True] * 2
    assert mask_of(low).all()
    assert mask_of(high).all()


def test_ranking_that_uses_no_scores_is_obeyed(update):
    wrapper = wrap(np.zeros((4, 2)), ranking=FirstRow())
    assert not warned(update, {wrapper: 0.5})
    assert mask_of(wrapper).ravel().tolist() == [1, 1] + [0] * 6


# The least that is kept.


def test_update_that_would_leave_nothing_keeps_the_largest_weight(update):
    wrapper = wrap(np.roll(np.arange(36), 7).reshape(9, 4))
    (message,) = warned(update, {wrapper: 0.99})
    assert "0.99 leaves none of the 36 elements of dense/dense/ke" in message
    assert "it keeps 1." in message
    assert "PerTensorRanking(min_kept=0)" in message
    assert np.flatnonzero(mask_of(wrapper)).tolist() == [6]
    assert not warned(update, {wrapper: 0.995})


def test_update_keeps_the_only_weight_of_a_tensor(update):
    wrapper = wrap([[2.0]])
    (message,) = warned(update, {wrapper: 0.5})
    assert "none of the 1 elements" in message
    assert mask_of(wrapper).tolist() == [[1]]


def test_update_with_equal_scores_comes_before_what_is_kept(update):
    wrapper = wrap(np.zeros((9, 4)))
    (message,) = warned(update, {wrapper: 0.99})
    assert "are all equal" in message
    assert mask_of(wrapper).all()


def test_update_leaves_nothing_if_the_ranking_may(update):
    wrapper = wrap(ORDERED, ranking=sos.extend.PerTensorRanking(min_kept=0))
    (message,) = warned(update, {wrapper: 0.99})
    assert "left no element of dense/dense/kernel" in message
    assert not mask_of(wrapper).any()


def test_update_to_sparsity_one_leaves_nothing_as_asked(update):
    wrapper = wrap(ORDERED)
    assert not warned(update, {wrapper: 1.0})
    assert not mask_of(wrapper).any()


def test_update_of_an_empty_weight_has_nothing_to_warn_of(update):
    wrapper = wrap(np.zeros((0, 2)))
    assert not warned(update, {wrapper: 0.9})


def test_cumulative_masks_without_common_elements_are_named(update):
    wrapper = wrap(ORDERED, CumulativeMagnitude)
    update({wrapper: 0.5})
    wrapper.layer.kernel.assign(ORDERED[::-1])
    (message,) = warned(update, {wrapper: 0.5})
    assert "left no element" in message
    assert not mask_of(wrapper).any()


def test_cumulative_random_masks_end_with_one_weight(update):
    wrapper = wrap(ORDERED, sos.RandomPruning)
    update({wrapper: 0.75})
    before = mask_of(wrapper)
    (message,) = warned(update, {wrapper: 0.99})
    assert "it keeps 1." in message
    mask = mask_of(wrapper)
    assert mask.sum() == 1
    assert (mask <= before).all()


# Host and device.

KERNELS = st.lists(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1e-42]),
    min_size=8,
    max_size=8,
)
PAIRS = [
    [
        wrap(ORDERED, technique, ranking=ranking, name=f"{name}_{i}")
        for name, technique, ranking in (
            ("a", sos.MagnitudePruning, None),
            ("b", sos.MagnitudePruning, Together()),
            ("c", CumulativeMagnitude, Together()),
            ("d", CumulativeMagnitude, None),
        )
    ]
    for i in range(2)
]
COMPILED = CompiledMaskUpdate()


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    st.lists(
        st.tuples(
            st.lists(
                st.one_of(KERNELS, st.just([0.0] * 8)), min_size=4, max_size=4
            ),
            # Few, as the ranking of a user is compiled for each.
            st.sampled_from([0.0, 0.5, 0.95]),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_host_and_compiled_updates_agree_in_masks_and_warnings(steps):
    dead_weights._warning_steps.clear()
    for wrappers in PAIRS:
        for wrapper in wrappers:
            wrapper.set_masks([np.ones((4, 2))])
    for kernels, sparsity in steps:
        messages = []
        for wrappers, function in zip(
            PAIRS, (update_masks, COMPILED), strict=True
        ):
            for wrapper, kernel in zip(wrappers, kernels, strict=True):
                wrapper.layer.kernel.assign(np.reshape(kernel, (4, 2)))
            before = mask_of(wrappers[0]).ravel()
            messages.append(warned(function, dict.fromkeys(wrappers, sparsity)))
            # What the first one is to be, by a stable sort.
            scores = np.abs(np.float64(np.float32(kernels[0])))
            expected = np.zeros(8)
            count = max(round(8 * (1 - sparsity)), 1)
            expected[np.argsort(-scores, kind="stable")[:count]] = 1
            if len(set(scores)) == 1 and count < 8:
                expected = before
            np.testing.assert_array_equal(
                mask_of(wrappers[0]).ravel(), expected
            )
        on_host, compiled = map(sorted, messages)
        assert [m.replace("_1", "_0") for m in compiled] == on_host
        for one, other in zip(*PAIRS, strict=True):
            np.testing.assert_array_equal(mask_of(one), mask_of(other))


@pytest.mark.parametrize("compiled", [False, True])
def test_replicas_keep_equal_masks_and_warn_once(compiled):
    strategy = techniques.two_replicas()
    with strategy.scope():
        equal, small = wrap(np.ones((4, 2))), wrap(ORDERED, name="small")
        update = CompiledMaskUpdate() if compiled else update_masks
        messages = warned(update, {equal: 0.5, small: 0.95})
    assert ["are all equal" in message for message in messages] == [True, False]
    for wrapper, expected in ((equal, np.ones(8)), (small, [0] * 7 + [1])):
        variable = techniques.state(wrapper, "mask")
        for local in strategy.experimental_local_results(variable.value):
            np.testing.assert_array_equal(np.ravel(local), expected)


# Once in a run.


def zero_model(schedule):
    head = keras.layers.Dense(2, kernel_initializer="zeros", name="head")
    model = keras.Sequential([keras.Input((6,)), head])
    return sos.sparsify(model, "MagnitudePruning", schedule=schedule)


def test_training_warns_once_and_names_the_step():
    model = zero_model(sos.schedules.ConstantSparsity(0.5, 0, frequency=1))
    (wrapper,) = find_wrappers(model)
    optimizer = keras.optimizers.SGD()

    def train(steps):
        with sos.SparsityUpdater(model, optimizer) as updater:
            for _ in range(steps):
                optimizer.iterations.assign_add(1)
                updater.step()

    (message,) = warned(train, 3)
    assert "head/kernel at step 0 are all equal" in message
    assert mask_of(wrapper).all()
    # The run goes on, and another one begins.
    assert not warned(train, 2)
    optimizer = keras.optimizers.SGD()
    assert len(warned(train, 2)) == 1
    model = copy.deepcopy(model)
    optimizer = keras.optimizers.SGD()
    assert len(warned(train, 2)) == 1


def test_end_of_the_schedule_with_equal_scores_is_named():
    model = zero_model(
        sos.schedules.ConstantSparsity(0.5, 0, end_step=4, frequency=2)
    )
    optimizer = keras.optimizers.SGD()

    def train():
        with sos.SparsityUpdater(model, optimizer) as updater:
            for _ in range(6):
                optimizer.iterations.assign_add(1)
                updater.step()

    first, last = warned(train)
    assert "the last update of its schedule is at step 4" in first
    assert "kernel at step 4 are all equal" in last
    assert "last update of its schedule: it stays dense" in last


def test_update_of_equal_scores_that_is_the_only_one_warns_of_it():
    model = zero_model(sos.schedules.ConstantSparsity(0.5, 0, end_step=0))

    def start():
        with sos.SparsityUpdater(model, keras.optimizers.SGD()):
            pass

    (message,) = warned(start)
    assert "it stays dense" in message
    assert sos.sparsity_report(model).rows[0]["target"] == 0.5


def test_fit_prunes_a_head_of_zeros_once_it_has_an_order():
    model = zero_model(sos.schedules.ConstantSparsity(0.5, 0, frequency=1))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    x = techniques.normal(64, 6)
    y = x[:, 4:] * 2

    def fit():
        model.fit(x, y, epochs=5, verbose=0, callbacks=[sos.SparsityCallback()])

    assert len(warned(fit)) == 1
    (wrapper,) = find_wrappers(model)
    mask = mask_of(wrapper)
    assert mask.sum() == 6
    # The inputs that matter come last.
    assert mask[4, 0] == mask[5, 1] == 1


# Fixed masks.


@pytest.mark.parametrize("sparsity", [0.95, 1.0])
def test_random_mask_keeps_one_weight_below_sparsity_one(sparsity):
    layer = keras.layers.Dense(2, use_bias=False)
    wrapper = sos.FixedMask(layer, sparsity=sparsity)
    messages = warned(wrapper.build, (None, 4))
    if sparsity == 1:
        assert not messages
        assert mask_of(wrapper).sum() == 0
    else:
        assert "it keeps 1." in messages[0]
        assert "pass `sparsity=1`" in messages[0]
        assert mask_of(wrapper).sum() == 1


def train_step(wrapper, jit_compile=False):
    @tf.function(jit_compile=jit_compile)
    def step():
        return wrapper(tf.ones((1, 4)), training=True)

    return step


@pytest.mark.parametrize("jit_compile", [False, True])
def test_training_a_fixed_mask_of_zeros_warns_once(jit_compile):
    layer = keras.layers.Dense(2, kernel_initializer="zeros", name="head")
    wrapper = sos.FixedMask(layer)
    assert not warned(wrapper.build, (None, 4))
    assert not warned(wrapper, tf.ones((1, 4)))
    (message,) = warned(train_step(wrapper, jit_compile))
    assert "head/kernel were zero when FixedMask computed its mask" in message
    assert not warned(train_step(wrapper, jit_compile))


def test_training_a_fixed_mask_of_zeros_on_replicas_warns_once():
    strategy = techniques.two_replicas()
    with strategy.scope():
        layer = keras.layers.Dense(2, kernel_initializer="zeros")
        wrapper = sos.FixedMask(layer)
        wrapper.build((None, 4))
    step = tf.function(lambda: strategy.run(train_step(wrapper)))
    assert len(warned(step)) == 1


def test_weights_that_are_loaded_after_zeros_are_no_reason_to_warn(tmp_path):
    layer = keras.layers.Dense(2, kernel_initializer="zeros")
    model = keras.Sequential([keras.Input((4,)), layer])
    layer.kernel.assign(ORDERED * np.eye(4, 2))
    sparse = sos.sparsify(model, "FixedMask")
    assert not warned(train_step(sparse))
    sparse.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert not warned(train_step(loaded))
    (wrapper,) = find_wrappers(loaded)
    np.testing.assert_array_equal(mask_of(wrapper), np.eye(4, 2))


# Every technique.


@pytest.mark.parametrize("technique", techniques.NAMES)
def test_find_dead_weights_finds_those_that_evaluate_to_zeros(technique):
    model = techniques.mlp(technique)
    assert dead_weights.find_dead_weights(model) == []
    first, second = find_wrappers(model)
    (weight,) = second.sparse_weights
    second.layer.kernel.assign(tf.zeros_like(second.layer.kernel.value))
    assert dead_weights.find_dead_weights(model) == [weight.path]
    second.layer.kernel.assign(tf.ones_like(second.layer.kernel.value))
    assert dead_weights.find_dead_weights(model) == []
    for variable in first.sparse_weights[0].state.values():
        dying = -1e3 if technique.startswith("L0") else 1e3
        if isinstance(first, sos.extend.MaskedWrapper):
            dying = 0
        variable.assign(tf.fill(variable.shape, tf.cast(dying, variable.dtype)))
    assert dead_weights.find_dead_weights(model) == [
        first.sparse_weights[0].path
    ]
