import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf

import sos
from sos.training.steps import CompiledMaskUpdate
from sos.wrappers.base import find_wrappers
from sos.wrappers.masked import update_masks
from tests.support import techniques


class Saliency(sos.PruningWrapper):
    """What a user may write: ranks by gradients, which replicas gather."""

    uses_gradient = True

    def scores(self, weight):
        return tf.abs(weight.value * weight.state["gradient"].value)


class OneOfTwo(sos.Ranking):
    """Keeps the higher of each two neighbours along the first axis."""

    def masks(self, scores, sparsities):
        masks = []
        for score in scores:
            pairs = tf.reshape(score, [-1, 2, score.shape[-1]])
            first = pairs[:, :1] >= pairs[:, 1:]
            both = tf.concat([first, ~first], axis=1)
            masks.append(tf.cast(tf.reshape(both, score.shape), tf.uint8))
        return masks


class Together(sos.Ranking):
    """Ranks all weights in one order."""

    def masks(self, scores, sparsities):
        flat = tf.concat([tf.reshape(score, [-1]) for score in scores], 0)
        place = round(flat.shape[0] * (1 - sparsities[0])) - 1
        threshold = tf.sort(flat, direction="DESCENDING")[place]
        return [tf.cast(score >= threshold, tf.uint8) for score in scores]


PRUNING = [
    name
    for name in techniques.NAMES
    if issubclass(sos.techniques()[name], sos.PruningWrapper)
]


def strategies():
    return {"default": contextlib.nullcontext, "two": techniques.two_replicas}


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
    expected = techniques.mlp(name)
    with scope():
        model = techniques.mlp(name)
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
    ranking = techniques.Recorder()
    with scope():
        model = techniques.mlp("MagnitudePruning", ranking=ranking)
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
        model = techniques.mlp("MagnitudePruning")
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


MODELS = {
    **{name: [(name, {})] * 3 for name in PRUNING},
    "gradients": [(Saliency, {})] * 3,
    "pattern": [("MagnitudePruning", {"ranking": OneOfTwo()})] * 3,
    "together": [("MagnitudePruning", {"ranking": Together()})] * 3,
    "mixed": [
        ("RandomPruning", {}),
        ("MagnitudePruning", {"ranking": OneOfTwo()}),
        (Saliency, {}),
        ("MagnitudePruning", {"ranking": Together()}),
        ("MagnitudePruning", {}),
        ("MagnitudePruning", {"ranking": Together()}),
    ],
}


def pruned(name):
    keras.utils.set_random_seed(0)
    layers = []
    for i, (technique, arguments) in enumerate(MODELS[name]):
        if isinstance(technique, str):
            technique = sos.techniques()[technique]
        layers.append(
            technique(
                keras.layers.Dense(6, name=f"layer_{i}"),
                schedule=sos.PolynomialDecay(0.2, 0.8, 2, 9, frequency=2),
                **arguments,
            )
        )
    return keras.Sequential([keras.Input((6,)), *layers], name="toy")


@pytest.mark.parametrize("name", MODELS)
def test_in_training_the_bits_are_those_of_the_host(name, scope):
    """With weights that move, and gradients of each replica's own examples."""

    def trained(make_update):
        with scope():
            strategy = tf.distribute.get_strategy()
            model = pruned(name)
            optimizer = keras.optimizers.SGD(0.3)
            optimizer.build(model.trainable_variables)
            variables = model.trainable_variables

            @tf.function
            def step(seed):
                def on_replica():
                    context = tf.distribute.get_replica_context()
                    x = tf.random.stateless_normal(
                        (4, 6), [seed, context.replica_id_in_sync_group]
                    )
                    with tf.GradientTape() as tape:
                        loss = tf.reduce_mean(
                            (model(x, training=True) - x) ** 2
                        )
                    optimizer.apply(tape.gradient(loss, variables), variables)

                strategy.run(on_replica)

            found = []
            with sos.Driver(
                model, optimizer, update_masks=make_update()
            ) as driver:
                for i in range(10):
                    step(tf.constant(i))
                    driver.step()
                    found.append(masks(model))
        return found, [keras.ops.convert_to_numpy(v) for v in model.variables]

    on_device, variables = trained(CompiledMaskUpdate)
    on_host, expected = trained(lambda: update_masks)
    for found, wanted in zip(on_device, on_host, strict=True):
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(one, other)
    for one, other in zip(variables, expected, strict=True):
        assert one.tobytes() == other.tobytes()
    # Updates were made at 2, 4, 6, 8 and 9, of which the first is 20 %.
    zeros = [np.mean([m == 0 for m in found]) for found in on_device]
    assert zeros[0] == 0 < zeros[1] == zeros[2] < 1
    if name != "pattern":
        assert zeros[-1] > zeros[1]


@pytest.mark.parametrize("name", ["RandomPruning", "MagnitudePruning"])
def test_what_is_not_due_stays(name, scope):
    with scope():
        model = techniques.mlp(name)
        first, second = find_wrappers(model)
        compiled = CompiledMaskUpdate()
        compiled({first: 0.5})
        compiled({second: 0.25})
        # Another sparsity for each.
        assert [np.mean(mask) for mask in masks(model)] == [0.5, 0.75]
        before = masks(model)
        compiled({first: 0.75, second: 0.5})
        after = masks(model)
    assert [np.mean(mask) for mask in after] == [0.25, 0.5]
    for old, new in zip(before, after, strict=True):
        assert (new <= old).all()
