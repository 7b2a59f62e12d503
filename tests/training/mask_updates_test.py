import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf

import sos
from sos.training.mask_updates import CompiledMaskUpdate
from sos.wrappers.base import find_wrappers
from sos.wrappers.masked import update_masks
from tests import toys

PRUNING = [
    name
    for name in toys.technique_names()
    if issubclass(sos.techniques()[name], sos.PruningWrapper)
]


def strategies():
    return {"default": contextlib.nullcontext, "two": toys.two_replicas}


@pytest.fixture(params=strategies())
def scope(request):
    made = strategies()[request.param]()
    return made.scope if request.param == "two" else contextlib.nullcontext


def masks(model):
    return [
        keras.ops.convert_to_numpy(weight.state["mask"])
        for wrapper in find_wrappers(model)
        for weight in wrapper.sparse_weights
    ]


@pytest.mark.parametrize("name", PRUNING)
def test_masks_are_those_of_the_host(name, scope):
    expected = toys.mlp(name)
    with scope():
        model = toys.mlp(name)
        compiled = CompiledMaskUpdate()
        for sparsity in (0.0, 0.3, 0.5, 0.9):
            compiled(dict.fromkeys(find_wrappers(model), sparsity))
            update_masks(dict.fromkeys(find_wrappers(expected), sparsity))
            for found, mask in zip(masks(model), masks(expected), strict=True):
                np.testing.assert_array_equal(found, mask)
    assert 0 < np.mean(masks(model)[0]) < 0.2
    # One compilation serves all sparsities.
    (function,) = compiled._functions.values()
    assert function.experimental_get_tracing_count() == 1


def test_other_rankings_see_the_sparsity(scope):
    ranking = toys.Recorder()
    with scope():
        model = toys.mlp("MagnitudePruning", ranking=ranking)
        compiled = CompiledMaskUpdate()
        for sparsity in (0.25, 0.5, 0.25):
            compiled(dict.fromkeys(find_wrappers(model), sparsity))
            assert np.mean(masks(model)[0]) == 1 - sparsity
    # Traced for every replica, and once for every sparsity.
    traces = len(ranking.log) // 2
    expected = [[0.25, 0.25]] * traces + [[0.5, 0.5]] * traces
    assert ranking.log == expected


def test_nan_scores_are_refused_and_change_nothing(scope):
    with scope():
        model = toys.mlp("MagnitudePruning")
        compiled = CompiledMaskUpdate()
        compiled(dict.fromkeys(find_wrappers(model), 0.5))
        before = masks(model)
        weight = find_wrappers(model)[1].sparse_weights[0]
        value = keras.ops.convert_to_numpy(weight.variable).copy()
        value[0, 0] = np.nan
        weight.variable.assign(value)
        with pytest.raises(ValueError, match=f"NaN.*{weight.path}"):
            compiled(dict.fromkeys(find_wrappers(model), 0.9))
    for found, mask in zip(masks(model), before, strict=True):
        np.testing.assert_array_equal(found, mask)


def test_nothing_due_does_nothing():
    assert CompiledMaskUpdate()({}) is None


def test_gradients_are_those_of_all_replicas():
    class Saliency(sos.PruningWrapper):
        uses_gradient = True

        def scores(self, weight):
            return weight.state["gradient"].value

    strategy = toys.two_replicas()
    with strategy.scope():
        layer = Saliency(keras.layers.Dense(2), schedule=toys.SCHEDULE)
        layer.build((None, 2))
        (weight,) = layer.sparse_weights
        gradient = weight.state["gradient"]

        @tf.function
        def gather():
            def step():
                # The first replica alone would keep the first element.
                context = tf.distribute.get_replica_context()
                first = context.replica_id_in_sync_group == 0
                gradient.assign(
                    tf.where(
                        first, [[3.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 9]]
                    )
                )

            strategy.run(step)

        gather()
        CompiledMaskUpdate()({layer: 0.75})
    np.testing.assert_array_equal(masks(layer)[0], [[0, 0], [0, 1]])
    np.testing.assert_array_equal(gradient.value.values[0], np.zeros((2, 2)))
