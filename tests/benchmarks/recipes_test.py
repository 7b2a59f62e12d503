import numpy as np
import pytest
import tensorflow as tf

from benchmarks.recipes import Recipe, describe


def test_make_gives_the_same_array_again_and_another_for_another_seed():
    recipe = Recipe("x", (1000, 3), "float32", "normal", (2.0, 0.5))
    array = recipe.make(7)
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, recipe.make(7))
    assert (array != recipe.make(8)).any()
    assert array.mean() == pytest.approx(2, abs=0.05)
    assert array.std() == pytest.approx(0.5, abs=0.05)


def test_make_integers_excludes_the_upper_bound():
    array = Recipe("x", (1000,), "int32", "integers", (1, 4)).make(0)
    assert set(array.tolist()) == {1, 2, 3}


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((0, 3), np.float32),
        np.float32(3.5),
        np.arange(6, dtype=np.int64).reshape(2, 3),
        np.full((40, 40), -5, np.int32),
        np.full((40, 40), 0.5, tf.bfloat16.as_numpy_dtype),
        np.full((40, 40), np.inf),
    ],
)
def test_describe_of_few_or_equal_values_makes_them_again(array):
    made = describe("x", np.asarray(array)).make(0)
    assert made.dtype == np.asarray(array).dtype
    np.testing.assert_array_equal(made, array)


def test_describe_of_a_mask_makes_one_of_the_same_density():
    mask = np.random.default_rng(0).random(10_000) < 0.2
    made = describe("x", mask.astype(np.uint8)).make(1)
    assert made.dtype == np.uint8
    assert set(made.tolist()) == {0, 1}
    assert made.mean() == pytest.approx(0.2, abs=0.02)


def test_describe_of_many_different_integers_raises():
    with pytest.raises(ValueError, match="'steps' of dtype int32"):
        describe("steps", np.arange(100, dtype=np.int32))
