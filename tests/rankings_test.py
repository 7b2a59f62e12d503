import keras
import numpy as np
import pytest
import tensorflow as tf

from sos import rankings


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
    found = rankings._device_masks(scores, [0.67, 0.5])
    assert [m.numpy().tolist() for m in found] == [[0, 1, 0], [[1], [0]]]
    with pytest.raises(ValueError, match=r"1 NaN score.*shape \(2,\)"):
        rankings._device_masks([scores[0], tf.constant([1, np.nan])], [0, 0])


def test_per_tensor_ranking_refuses_bad_input():
    ranking = rankings.PerTensorRanking()
    with pytest.raises(ValueError, match="1 tensors and 2 sparsities"):
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


@pytest.mark.parametrize("ranking", [rankings.PerTensorRanking(), TopBlocks(4)])
def test_rankings_survive_serialisation(ranking):
    assert type(ranking).from_config(ranking.get_config()) == ranking
    config = keras.saving.serialize_keras_object(ranking)
    assert keras.saving.deserialize_keras_object(config) == ranking


def test_base_ranking_says_what_to_override():
    with pytest.raises(NotImplementedError, match="TopBlocks must override"):
        TopBlocks().masks([], [])
