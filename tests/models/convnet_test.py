import numpy as np

from models import convnet


def test_shapes_and_size():
    model = convnet.build((28, 28, 1), 10, seed=0)
    assert model.output_shape == (None, 10)
    assert model.count_params() == 155_786


def test_weights_are_a_function_of_the_seed_alone():
    one, same, other = (
        convnet.build((28, 28, 1), 10, seed=seed) for seed in (3, 3, 4)
    )
    for a, b, c in zip(one.weights, same.weights, other.weights, strict=True):
        assert a.path == b.path == c.path
        np.testing.assert_array_equal(a, b)
        if len(a.shape) > 1:
            assert (np.asarray(a) != np.asarray(c)).mean() > 0.99
