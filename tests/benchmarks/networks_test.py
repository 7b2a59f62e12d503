import inspect

import pytest

from benchmarks import networks
from models.transformer import Transformer
from sos.wrappers.base import find_wrappers


@pytest.mark.parametrize("name", ["attention", "convnet", "transformer_tiny"])
def test_data_has_a_label_for_each_of_the_logits(name):
    network = networks.NETWORKS[name]
    *inputs, labels = (
        recipe.make(seed)
        for seed, recipe in enumerate(network.data(2, network.size))
    )
    logits = networks.build(name)(*inputs)
    assert labels.shape == logits.shape[:-1]
    assert labels.max() < logits.shape[-1]


def test_transformer_base_is_that_of_the_study():
    network = networks.NETWORKS["transformer_base"]
    default = inspect.signature(Transformer).parameters
    assert network.vocabulary == 33_288
    for name in ("width", "hidden_width", "heads", "layers"):
        assert getattr(network, name) == default[name].default
    # 8 packed rows of 256 tokens in a step.
    assert network.batch_size * network.size == 2048


def test_transformer_made_sparse_has_one_wrapper_of_its_shared_table():
    model = networks.build(
        "transformer", "MagnitudePruning", {"sparsity": 0.5}, size=4
    )
    paths = [
        weight.path
        for wrapper in find_wrappers(model)
        for weight in wrapper.sparse_weights
    ]
    # 4 blocks of 4 dense layers of attention, 2 of them twice, and 2 others.
    assert len(paths) == len(set(paths)) == 1 + 4 * 6 + 2 * 4
    assert sum("embedding" in path for path in paths) == 1
