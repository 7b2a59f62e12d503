import keras
import numpy as np
import pytest

from benchmarks import networks
from benchmarks.transformer import Transformer
from sos.wrappers.base import find_wrappers


@pytest.mark.parametrize("name", ["attention", "convnet", "transformer"])
def test_data_has_a_label_for_each_of_the_logits(name):
    network = networks.NETWORKS[name]
    *inputs, labels = (
        recipe.make(seed)
        for seed, recipe in enumerate(network.data(2, network.size))
    )
    logits = networks.build(name)(*inputs)
    assert labels.shape == logits.shape[:-1]
    assert labels.max() < logits.shape[-1]


def tiny_transformer():
    keras.utils.set_random_seed(0)
    return Transformer(
        vocabulary=20, width=8, hidden=16, heads=2, depth=2, length=6
    )


def test_transformer_predicts_each_token_from_the_tokens_before():
    model = tiny_transformer()
    source, target = np.random.default_rng(0).integers(1, 20, (2, 3, 6))
    logits = model(source, target).numpy()
    assert logits.shape == (3, 6, 20)
    changed = target.copy()
    changed[:, 4] = changed[:, 4] % 19 + 1
    again = model(source, changed).numpy()
    np.testing.assert_allclose(again[:, :4], logits[:, :4], atol=1e-6)
    assert (np.abs(again[:, 4:] - logits[:, 4:]).max(axis=-1) > 1e-4).all()


def test_transformer_ignores_the_padding_of_the_source():
    model = tiny_transformer()
    source, target = np.random.default_rng(0).integers(1, 20, (2, 3, 6))
    source[:, 4:] = 0
    np.testing.assert_allclose(
        model(source, target), model(source[:, :4], target), atol=1e-5
    )


def test_transformer_made_sparse_has_one_wrapper_of_its_shared_table():
    model = networks.build(
        "transformer", "MagnitudePruning", {"sparsity": 0.5}, size=4
    )
    names = [wrapper.name for wrapper in find_wrappers(model)]
    # 4 blocks of 4 dense layers of attention, 2 of them twice, and 2 others.
    assert len(names) == len(set(names)) == 1 + 4 * 6 + 2 * 4
    assert sum("table" in name for name in names) == 1
