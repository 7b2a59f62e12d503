import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

import sos
from sos.wrappers import masked
from sos.wrappers.base import find_wrappers
from sos.wrappers.compiled_masks import rank_by_count
from sos.wrappers.masked import update_masks
from tests.support import techniques

# Every model has a layer that cannot be ranked.
pytestmark = pytest.mark.filterwarnings("ignore:The scores of equal")


@pytest.fixture
def accelerator(monkeypatch):
    """Ranks as on an accelerator, with XLA on the CPU."""
    monkeypatch.setattr(masked, "_on_one_accelerator", lambda scores: True)


def mlp(technique, **arguments):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(200, name="first"),
            keras.layers.Dense(9, name="equal", kernel_initializer="ones"),
            keras.layers.Dense(3, name="last"),
        ]
    )
    return sos.sparsify(
        model, technique, schedule=techniques.SCHEDULE, **arguments
    )


def masks(model):
    return [
        keras.ops.convert_to_numpy(weight.state["mask"])
        for wrapper in find_wrappers(model)
        for weight in wrapper.sparse_weights
    ]


@pytest.mark.parametrize("technique", ["MagnitudePruning", "RandomPruning"])
def test_update_masks_on_an_accelerator_equals_the_host(technique, monkeypatch):
    results = []
    for on_accelerator in (False, True):
        monkeypatch.setattr(
            masked,
            "_on_one_accelerator",
            lambda scores, result=on_accelerator: result,
        )
        model = mlp(technique)
        with pytest.warns(UserWarning) as warned:
            changes = [
                update_masks(dict.fromkeys(find_wrappers(model), sparsity))
                for sparsity in (0.0, 0.5, 0.3, 0.999)
            ]
        messages = sorted(str(warning.message) for warning in warned)
        results.append((masks(model), changes, messages))
    (expected, host_changes, host_messages), (found, *others) = results
    for mask, other in zip(found, expected, strict=True):
        assert mask.dtype == np.uint8
        np.testing.assert_array_equal(mask, other)
    assert others == [host_changes, host_messages]
    assert all(changes.pruned for changes in host_changes[1::2])


def test_update_masks_on_an_accelerator_reads_one_array(
    accelerator, monkeypatch
):
    model = techniques.mlp("MagnitudePruning")
    updates = dict.fromkeys(find_wrappers(model), 0.5)
    update_masks(updates)
    read = []
    numpy = type(tf.zeros([])).numpy
    monkeypatch.setattr(
        type(tf.zeros([])),
        "numpy",
        lambda tensor: read.append(tensor.shape.as_list()) or numpy(tensor),
    )
    update_masks(updates)
    assert read == [[2, 5]]


@sos.extend.register
class KeepsAnElement(sos.MagnitudePruning):
    """Keeps one element whatever its score is."""

    def assign_mask(self, weight, mask):
        mask = mask.numpy()
        mask[0, 0] = 1
        super().assign_mask(weight, mask)


def test_update_masks_on_an_accelerator_counts_what_a_technique_assigns(
    accelerator,
):
    model = techniques.mlp(KeepsAnElement)
    for wrapper in find_wrappers(model):
        value = keras.ops.convert_to_numpy(wrapper.sparse_weights[0].variable)
        value = value.copy()
        value[0, 0] = 0
        wrapper.sparse_weights[0].variable.assign(value)
    changes = update_masks(dict.fromkeys(find_wrappers(model), 0.5))
    assert (
        changes.kept == sum(mask.sum() for mask in masks(model)) == 24 + 8 + 2
    )
    assert changes.pruned == changes.elements - changes.kept


def test_update_masks_on_an_accelerator_of_nan_raises_and_changes_nothing(
    accelerator,
):
    model = mlp("MagnitudePruning")
    updates = dict.fromkeys(find_wrappers(model), 0.5)
    update_masks(updates)
    before = masks(model)
    weight = find_wrappers(model)[2].sparse_weights[0]
    value = keras.ops.convert_to_numpy(weight.variable).copy()
    value[0, 0] = np.nan
    weight.variable.assign(value)
    with pytest.raises(ValueError, match=f"NaN score.* of {weight.path}"):
        update_masks(dict.fromkeys(updates, 0.9))
    for mask, old in zip(masks(model), before, strict=True):
        np.testing.assert_array_equal(mask, old)


def test_update_masks_on_an_accelerator_leaves_other_rankings_to_the_host(
    accelerator,
):
    ranking = techniques.Recorder()
    model = techniques.mlp("MagnitudePruning", ranking=ranking)
    changes = update_masks(dict.fromkeys(find_wrappers(model), 0.5))
    assert len(ranking.log) == 1
    assert dataclasses.astuple(changes)[1] == sum(m.sum() for m in masks(model))


def test_rank_by_count_for_other_sparsities_is_not_traced_again(accelerator):
    model = mlp("MagnitudePruning")
    updates = dict.fromkeys(find_wrappers(model), 0.5)
    update_masks(updates)
    traces = rank_by_count.experimental_get_tracing_count()
    for sparsity in (0.1, 0.6, 0.9):
        update_masks(dict.fromkeys(updates, sparsity))
    assert rank_by_count.experimental_get_tracing_count() == traces
