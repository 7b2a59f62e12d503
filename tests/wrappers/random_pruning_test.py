import hypothesis
import hypothesis.strategies as st
import keras
import numpy as np
import pytest
import scipy.stats
import tensorflow as tf

import sos
from sos.wrappers.masked import update_masks
from tests.support import techniques


def wrap(size=(20, 10), seed=0, name="dense"):
    layer = keras.layers.Dense(size[1], name=name)
    wrapper = sos.RandomPruning(layer, schedule=techniques.SCHEDULE, seed=seed)
    wrapper.build((None, size[0]))
    return wrapper


def mask_of(wrapper):
    return techniques.state(wrapper, "mask").numpy()


def prune(wrapper, sparsity):
    update_masks({wrapper: sparsity})
    return mask_of(wrapper)


SHARED = wrap((9, 7))


@pytest.mark.filterwarnings("ignore:A sparsity of .* leaves none")
@hypothesis.settings(max_examples=40)
@hypothesis.given(
    st.lists(st.floats(0, 1), min_size=1, max_size=6), st.integers(0, 1000)
)
def test_masks_are_cumulative_and_exact(sparsities, seed):
    SHARED.seed = seed
    SHARED.set_masks([np.ones((9, 7))])
    before = np.ones((9, 7))
    for sparsity in sorted(sparsities):
        mask = prune(SHARED, sparsity)
        least = 1 if sparsity < 1 else 0
        assert mask.sum() == max(round(63 * (1 - sparsity)), least)
        assert (mask <= before).all()
        before = mask


def test_random_masks_of_falling_sparsity_stay_as_they_are():
    wrapper = wrap()
    sparse = prune(wrapper, 0.8)
    np.testing.assert_array_equal(prune(wrapper, 0.3), sparse)


def test_random_masks_after_set_masks_keep_its_zeros():
    wrapper = wrap()
    first = np.ones((20, 10))
    first[:5] = 0
    wrapper.set_masks([first])
    mask = prune(wrapper, 0.5)
    assert mask.sum() == 100
    assert (mask[:5] == 0).all()


def test_masks_depend_on_seed_and_weight_but_not_on_values():
    masks = {
        (seed, name): prune(wrap(seed=seed, name=name), 0.5)
        for seed in (0, 1)
        for name in ("a", "b")
    }
    flat = [mask.ravel() for mask in masks.values()]
    correlation = np.corrcoef(flat) - np.eye(4)
    assert np.abs(correlation).max() < 5 / np.sqrt(200)
    again = wrap(name="a")
    again.layer.kernel.assign(tf.ones((20, 10)))
    np.testing.assert_array_equal(prune(again, 0.5), masks[0, "a"])


def test_seed_changed_in_a_trace_has_effect():
    wrapper = wrap()
    (weight,) = wrapper.sparse_weights
    traces = []

    @tf.function
    def scores():
        traces.append(None)
        return wrapper.scores(weight)

    found = {}
    for seed in (0, 3, -7, 2**31 - 1, 3):
        sos.set_hyperparameters(wrapper, seed=seed)
        assert wrapper.seed == seed
        value = scores().numpy()
        np.testing.assert_array_equal(value, wrapper.scores(weight))
        # The same as of a layer that was made with it.
        other = wrap(seed=seed)
        np.testing.assert_array_equal(
            value, other.scores(other.sparse_weights[0])
        )
        found[seed] = value
    assert len(traces) == 1
    flat = np.corrcoef([value.ravel() for value in found.values()])
    assert np.abs(flat - np.eye(4)).max() < 5 / np.sqrt(200)


def test_seed_in_a_file_is_kept(tmp_path):
    model = keras.Sequential([keras.Input((20,)), wrap(seed=5)])
    model.layers[0].seed = 9
    assert model.layers[0].get_config()["seed"] == 9
    model.save(tmp_path / "model.keras")
    (loaded,) = keras.models.load_model(tmp_path / "model.keras").layers
    assert loaded.seed == 9
    np.testing.assert_array_equal(
        prune(loaded, 0.5), prune(model.layers[0], 0.5)
    )


def test_replicas_have_the_same_scores():
    strategy = techniques.two_replicas()
    with strategy.scope():
        wrapper = wrap(seed=4)

    @tf.function
    def scores():
        return strategy.run(lambda: wrapper.scores(wrapper.sparse_weights[0]))

    first, second = strategy.experimental_local_results(scores())
    np.testing.assert_array_equal(first, second)
    alone = wrap(seed=4)
    np.testing.assert_array_equal(first, alone.scores(alone.sparse_weights[0]))


def test_masks_are_uniform():
    wrapper = wrap()
    ones = np.ones((20, 10))
    count = np.zeros((20, 10))
    runs = 400
    for seed in range(runs):
        wrapper.seed = seed
        wrapper.set_masks([ones])
        count += prune(wrapper, 0.7)
    # Each weight is kept with probability 0.3; the counts of one draw are
    # negatively correlated by 1 / 199, as their sum is fixed.
    variance = runs * 0.3 * 0.7 * 200 / 199
    statistic = ((count - runs * 0.3) ** 2 / variance).sum()
    assert 1e-3 < scipy.stats.chi2.sf(statistic, 199) < 1 - 1e-3


def test_random_masks_drop_uniformly_among_what_is_left():
    wrapper = wrap()
    ones = np.ones((20, 10))
    dropped = left = 0
    for seed in range(300):
        wrapper.seed = seed
        wrapper.set_masks([ones])
        before = prune(wrapper, 0.4)
        after = prune(wrapper, 0.7)
        left = left + before
        dropped = dropped + (before - after)
    # Half of what is left goes, wherever it is.
    variance = left * 0.25
    statistic = ((dropped - left / 2) ** 2 / variance).sum()
    assert 1e-3 < scipy.stats.chi2.sf(statistic, 199) < 1 - 1e-3


def test_pruned_weights_stay_out_of_the_outputs_and_get_no_gradient():
    wrapper = wrap()
    mask = prune(wrapper, 0.6)
    techniques.bind(wrapper)
    kernel = wrapper.layer.kernel
    with tf.GradientTape() as tape:
        outputs = wrapper(tf.eye(20), training=True)
        loss = tf.reduce_sum(outputs)
    np.testing.assert_allclose(outputs, kernel.numpy() * mask, atol=1e-6)
    np.testing.assert_array_equal(tape.gradient(loss, kernel.value), mask)


@pytest.mark.parametrize("seed", [0.5, "a", None, 2**40, -(2**31) - 1])
def test_seed_must_be_an_integer(seed):
    with pytest.raises(ValueError, match="`seed`.*Received"):
        wrap(seed=seed)
