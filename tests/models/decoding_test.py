"""Batches of sentences. `tests.models.wmt_test` decodes them."""

import numpy as np
import pytest
import tensorflow as tf

from models import decoding
from models.decoding import MAX_LENGTH
from sos.datasets.subwords import EOS, PAD


def test_batches_have_every_sentence_once_and_few_tokens():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 1500, 500)
    lengths[:200] = rng.integers(1, 40, 200)
    batches = list(decoding.batches(lengths, 16))
    assert sorted(np.concatenate(batches)) == list(range(500))
    kept = np.minimum(lengths, MAX_LENGTH)
    assert (np.diff(kept[np.concatenate(batches)]) <= 0).all()
    for rows in batches:
        longest = kept[rows].max()
        assert len(rows) == 1 or len(rows) * longest <= 16 * 64
        assert len(rows) <= 16
    # As few as possible.
    for rows in batches[:-1]:
        assert (len(rows) + 1) * max(kept[rows].max(), 64) > 16 * 64


def test_batches_of_nothing_are_none():
    assert not list(decoding.batches([], 16))


@pytest.mark.parametrize("count", [MAX_LENGTH, MAX_LENGTH + 1, 3000])
def test_to_matrix_ends_every_sentence(count):
    tokens = tf.ragged.constant(
        [[5] * (count - 1) + [EOS], [6, EOS]], dtype=tf.int32
    )
    matrix = decoding.to_matrix(tokens).numpy()
    assert matrix.dtype == np.int32
    assert matrix.shape == (2, MAX_LENGTH)
    assert matrix[0].tolist() == [5] * (MAX_LENGTH - 1) + [EOS]
    assert matrix[1].tolist() == [6, EOS] + [PAD] * (MAX_LENGTH - 2)
