import numpy as np

from models import convnet


def test_build_of_the_convnet_has_its_shapes_and_size():
    model = convnet.build((28, 28, 1), 10, seed=0)
    assert model.output_shape == (None, 10)
    assert model.count_params() == 155_786


def test_build_of_one_seed_gives_the_same_weights():
    one, same, other = (
        convnet.build((28, 28, 1), 10, seed=seed) for seed in (3, 3, 4)
    )
    for a, b, c in zip(one.weights, same.weights, other.weights, strict=True):
        assert a.path == b.path == c.path
        np.testing.assert_array_equal(a, b)
        if len(a.shape) > 1:
            assert (np.asarray(a) != np.asarray(c)).mean() > 0.99
