import math

import hypothesis
import hypothesis.strategies as st
import keras
import numpy as np
import pytest
import tensorflow as tf

from sos import rankings
from sos.masks import keep_count, top_k_mask_device
from tests.support import techniques


def test_per_tensor_ranking_of_arrays_and_tensors():
    scores = [
        np.array([1, 3, 2, 4], np.float32),
        tf.constant([[1.0, 2.0], [4.0, 3.0]], tf.bfloat16),
        np.zeros((0,), np.float64),
    ]
    ranking = rankings.PerTensorRanking()
    found = ranking.masks(scores, [0.5, 0.75, 0.5])
    assert [np.asarray(m).tolist() for m in found] == [
        [0, 1, 0, 1],
        [[0, 0], [1, 0]],
        [],
    ]


def test_per_tensor_ranking_inside_a_function():
    @tf.function
    def rank(scores):
        return rankings.PerTensorRanking().masks([scores], [0.5])[0]

    assert rank(tf.constant([1.0, 3.0, 2.0, 4.0])).numpy().tolist() == [
        0,
        1,
        0,
        1,
    ]


def test_tensors_elsewhere_are_ranked_there():
    scores = [tf.constant([1.0, 3.0, 2.0]), tf.constant([[5.0], [4.0]])]
    found = rankings._device_masks(scores, [1, 1])
    assert [m.numpy().tolist() for m in found] == [[0, 1, 0], [[1], [0]]]
    # Of the same shapes, which are compiled once.
    scores[1] = tf.constant([[1], [np.nan]])
    with pytest.raises(ValueError, match=r"1 NaN score.*shape \(2, 1\)"):
        rankings._device_masks(scores, [0, 0])


def test_per_tensor_ranking_refuses_bad_input():
    ranking = rankings.PerTensorRanking()
    with pytest.raises(ValueError, match="1 .*2 sparsities"):
        ranking.masks([np.ones(3, np.float32)], [0.5, 0.5])
    with pytest.raises(ValueError, match="NaN"):
        ranking.masks([tf.constant([1.0, np.nan])], [0.5])
    with pytest.raises(ValueError, match="Received: sparsity=2"):
        ranking.masks([np.ones(3, np.float32)], [2.0])


@keras.saving.register_keras_serializable(package="masks_test")
class TopBlocks(rankings.Ranking):
    def __init__(self, block=2):
        self.block = block

    def get_config(self):
        return {"block": self.block}


def test_rankings_are_equal_by_class_and_config():
    assert rankings.PerTensorRanking() == rankings.PerTensorRanking()
    assert len({rankings.PerTensorRanking(), rankings.PerTensorRanking()}) == 1
    assert TopBlocks(2) == TopBlocks(2)
    assert hash(TopBlocks(2)) == hash(TopBlocks(2))
    assert TopBlocks(2) != TopBlocks(3)
    assert TopBlocks() != rankings.PerTensorRanking()
    assert repr(TopBlocks(3)) == "TopBlocks(block=3)"


@pytest.mark.parametrize(
    "ranking",
    [
        rankings.PerTensorRanking(),
        rankings.PerTensorRanking(min_kept=0),
        TopBlocks(4),
    ],
)
def test_rankings_survive_serialisation(ranking):
    assert type(ranking).from_config(ranking.get_config()) == ranking
    config = keras.saving.serialize_keras_object(ranking)
    assert keras.saving.deserialize_keras_object(config) == ranking


# What is kept at least.


@hypothesis.given(st.integers(0, 300), st.floats(0, 1), st.integers(0, 5))
def test_keep_count_differs_from_the_exact_one_below_min_kept_only(
    size, sparsity, min_kept
):
    ranking = rankings.PerTensorRanking(min_kept=min_kept)
    exact = keep_count(size, sparsity)
    kept = ranking.keep_count(size, sparsity)
    if sparsity == 1 or exact >= min_kept:
        assert kept == exact
    else:
        assert kept == min(min_kept, size)


@pytest.mark.parametrize("traced", [False, True])
def test_per_tensor_ranking_keeps_the_largest_where_nothing_would_be_left(
    traced,
):
    scores = [tf.constant([1.0, 3.0, 2.0]), tf.constant([5.0]), tf.zeros([0])]

    def rank(ranking, sparsity=0.9):
        def function(scores):
            return ranking.masks(scores, [sparsity] * 3)

        if traced:
            function = tf.function(function)
        return [np.asarray(mask).tolist() for mask in function(scores)]

    assert rank(rankings.PerTensorRanking()) == [[0, 1, 0], [1], []]
    two = rankings.PerTensorRanking(min_kept=2)
    assert rank(two) == [[0, 1, 1], [1], []]
    nothing = [[0, 0, 0], [0], []]
    assert rank(rankings.PerTensorRanking(min_kept=0)) == nothing
    assert rank(rankings.PerTensorRanking(), sparsity=1.0) == nothing


def test_ranking_without_the_constructor_keeps_one():
    assert techniques.Recorder().keep_count(36, 0.99) == 1


@pytest.mark.parametrize("min_kept", [-1, 0.5, None, True])
def test_min_kept_must_be_a_count(min_kept):
    with pytest.raises(ValueError, match="`min_kept`.*Received"):
        rankings.PerTensorRanking(min_kept=min_kept)


def test_rankings_that_keep_other_counts_are_not_equal():
    ranking = rankings.PerTensorRanking
    assert ranking(min_kept=0) != ranking()
    # As models were saved before there was the argument.
    assert ranking.from_config({}) == ranking(min_kept=1)


# Equal scores.


class Together(rankings.Ranking):
    """Ranks all tensors in one order, ties by position."""

    def masks(self, scores, sparsities):
        flat = tf.concat([tf.reshape(score, [-1]) for score in scores], 0)
        k = keep_count(flat.shape[0], sparsities[0])
        parts = tf.split(
            top_k_mask_device(flat, k),
            [math.prod(score.shape) for score in scores],
        )
        return [
            tf.reshape(part, score.shape)
            for part, score in zip(parts, scores, strict=True)
        ]


class FixedPattern(rankings.Ranking):
    """Keeps every second weight."""

    uses_scores = False

    def masks(self, scores, sparsities):
        return [
            tf.reshape(
                tf.cast(tf.range(math.prod(score.shape)) % 2, tf.uint8),
                score.shape,
            )
            for score in scores
        ]


def undecided_everywhere(ranking, scores, sparsity, jit_compile=True):
    """Results of host, eager and traced code, which must be equal."""
    sparsities = [sparsity] * len(scores)

    def on_device(scores):
        masks = [
            tf.cast(mask, tf.uint8)
            for mask in ranking.masks(scores, sparsities)
        ]
        return rankings.undecided_device(ranking, scores, masks)

    tensors = [tf.constant(score) for score in scores]
    compiled = tf.function(on_device, jit_compile=jit_compile)
    found = [bool(one) for one in compiled(tensors)]
    for inputs in (scores, tensors):
        masks = ranking.masks(inputs, sparsities)
        assert rankings.undecided(ranking, inputs, masks) == found
    return found


ONES, TWOS = np.ones((2, 2), np.float32), np.full(4, 2, np.float32)
MIXED = np.array([1, 2, 3, 4], np.float32)
ONE, EMPTY = np.ones(1, np.float32), np.ones(0, np.float32)
PER_TENSOR, ACROSS = rankings.PerTensorRanking(), Together()
UNDECIDED = {
    "all equal": (PER_TENSOR, [ONES, MIXED], 0.5, [True, False]),
    "values differ": (PER_TENSOR, [ONES, TWOS], 0.5, [True, True]),
    "nothing to prune": (PER_TENSOR, [ONES, MIXED], 0.0, [False, False]),
    "nothing to keep": (PER_TENSOR, [ONES, MIXED], 1.0, [False, False]),
    "one element": (PER_TENSOR, [ONE, ONES], 0.5, [False, True]),
    "empty": (PER_TENSOR, [EMPTY, ONES], 0.5, [False, True]),
    "only empty": (ACROSS, [EMPTY], 0.5, [False]),
    "partly equal": (PER_TENSOR, [np.minimum(MIXED, 2)], 0.5, [False]),
    "both zeros": (PER_TENSOR, [np.float32([0, -0.0])], 0.5, [True]),
    "equal across": (ACROSS, [ONES, ONES[0]], 0.5, [True, True]),
    "equal across, by tensor": (ACROSS, [ONES, ONES], 0.5, [True, True]),
    "equal across, all kept": (ACROSS, [ONES, ONES], 0.0, [False, False]),
    "equal across, one element": (ACROSS, [ONE, ONE], 0.5, [True, True]),
    "with an empty one": (ACROSS, [EMPTY, ONE, ONE], 0.5, [True] * 3),
    "ordered across": (ACROSS, [ONES, TWOS], 0.5, [False, False]),
    "cut within": (ACROSS, [ONES, TWOS], 0.75, [False, True]),
    "some differ": (ACROSS, [ONES, MIXED], 0.25, [True, False]),
    "fixed pattern": (FixedPattern(), [ONES, ONES], 0.5, [False, False]),
}


@pytest.mark.parametrize("case", UNDECIDED)
def test_undecided_finds_masks_that_follow_positions_alone(case):
    ranking, scores, sparsity, expected = UNDECIDED[case]
    # XLA takes most of the time.
    jit_compile = case in ("empty", "cut within")
    found = undecided_everywhere(ranking, scores, sparsity, jit_compile)
    assert found == expected


@pytest.mark.parametrize(
    "dtype", [np.float16, tf.bfloat16.as_numpy_dtype, np.float64]
)
def test_undecided_knows_all_floats(dtype):
    scores = [np.full((3, 2), 0.5, dtype), np.arange(6).astype(dtype)]
    found = undecided_everywhere(PER_TENSOR, scores, 0.5, jit_compile=False)
    assert found == [True, False]


def test_undecided_compares_values_of_one_dtype_alone():
    scores = [np.zeros(4, np.float16), np.zeros(2, np.float32)]

    class First(rankings.Ranking):
        def masks(self, scores, sparsities):
            return [tf.ones([4], tf.uint8), tf.zeros([2], tf.uint8)]

    assert undecided_everywhere(First(), scores, 0.5) == [False, False]


def test_base_ranking_says_what_to_override():
    with pytest.raises(NotImplementedError, match="TopBlocks"):
        TopBlocks().masks([], [])
