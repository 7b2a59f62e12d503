import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import sos
from sos.wrappers.base import find_wrappers


@sos.extend.register
class MovementPruning(sos.extend.PruningWrapper):
    """Keeps weights that move away from zero: -weight * gradient."""

    uses_gradient = True

    def scores(self, weight):
        return -weight.value * weight.state["gradient"].value


@keras.saving.register_keras_serializable(package="registry_test")
class GlobalRanking(sos.extend.Ranking):
    """Ranks all tensors together, to their mean sparsity."""

    def masks(self, scores, sparsities):
        scores = [np.asarray(score) for score in scores]
        together = np.concatenate([score.ravel() for score in scores])
        zeros = round(
            sum(
                score.size * sparsity
                for score, sparsity in zip(scores, sparsities, strict=True)
            )
        )
        mask = np.ones(together.size, np.uint8)
        mask[np.argsort(together, kind="stable")[:zeros]] = 0
        ends = np.cumsum([score.size for score in scores])[:-1]
        return [
            part.reshape(score.shape)
            for part, score in zip(np.split(mask, ends), scores, strict=True)
        ]


@keras.saving.register_keras_serializable(package="registry_test")
class TwoOfFour(sos.extend.Ranking):
    """Keeps n of each m neighbours along the first axis."""

    def __init__(self, n=2, m=4):
        self.n = n
        self.m = m

    def get_config(self):
        return {"n": self.n, "m": self.m}

    def masks(self, scores, sparsities):
        return [self._mask(np.asarray(score)) for score in scores]

    def _mask(self, score):
        groups = score.reshape(-1, self.m, *score.shape[1:])
        order = np.argsort(np.argsort(-groups, axis=1), axis=1)
        return (order < self.n).reshape(score.shape).astype(np.uint8)


def model_of(*sizes):
    return keras.Sequential(
        [keras.Input((8,)), *(layers.Dense(size) for size in sizes)]
    )


SCHEDULE = sos.schedules.ConstantSparsity(0.5, begin_step=1, frequency=1)
X = np.random.default_rng(0).normal(size=(16, 8)).astype("float32")
Y = X[:, :2] * 2


def fit(model, **kwargs):
    model.compile(keras.optimizers.SGD(0.05), "mse", **kwargs)
    model.fit(
        X,
        Y,
        batch_size=8,
        epochs=2,
        callbacks=[sos.SparsityCallback()],
        verbose=0,
    )


def test_register_lists_the_technique():
    assert sos.extend.techniques()["MovementPruning"] is MovementPruning
    for name in ("MovementPruning", MovementPruning):
        sos.sparsify(model_of(2), name, schedule=SCHEDULE)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_registered_technique_trains_saves_and_strips(jit_compile, tmp_path):
    model = sos.sparsify(model_of(8, 2), MovementPruning, schedule=SCHEDULE)
    fit(model, jit_compile=jit_compile)
    report = sos.sparsity_report(model)
    assert report.sparsity == 0.5
    assert {row["technique"] for row in report.rows} == {"", "MovementPruning"}
    assert len(report.rows) == 4
    outputs = model(X).numpy()
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(X), outputs)
    np.testing.assert_array_equal(sos.strip(model)(X), outputs)


def test_registered_technique_sees_the_dense_gradient_of_the_last_step():
    layer = MovementPruning(layers.Dense(2, use_bias=False), schedule=SCHEDULE)
    model = keras.Sequential([keras.Input((8,)), layer])
    (weight,) = layer.sparse_weights
    mask = np.arange(16).reshape(8, 2) % 2
    optimizer = keras.optimizers.SGD(0.0)
    optimizer.build(model.trainable_variables)
    with sos.SparsityUpdater(model, optimizer) as updater:
        layer.set_masks([mask])
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(X, training=True) - Y))
        (gradient,) = tape.gradient(loss, model.trainable_variables)
        optimizer.apply([gradient], model.trainable_variables)
        error = X @ (weight.value.numpy() * mask) - Y
        dense = 2 * X.T @ error / error.size
        kept = weight.state["gradient"].numpy()
        np.testing.assert_allclose(kept, dense, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(gradient, dense * mask, rtol=1e-4, atol=1e-6)
        updater.step()
    order = np.argsort((-weight.value.numpy() * kept).ravel())
    expected = np.ones(16, np.uint8)
    expected[order[:8]] = 0
    found = weight.state["mask"].numpy().ravel()
    np.testing.assert_array_equal(found, expected)


@pytest.mark.oldest
def test_registered_technique_on_replicas_sees_the_mean_gradient():
    cpus = tf.config.list_logical_devices("CPU")
    if len(cpus) < 2:
        pytest.skip("needs two logical devices")
    strategy = tf.distribute.MirroredStrategy([cpu.name for cpu in cpus[:2]])
    with strategy.scope():
        keras.utils.set_random_seed(0)
        model = sos.sparsify(model_of(8, 2), MovementPruning, schedule=SCHEDULE)
        fit(model)
    assert sos.sparsity_report(model).sparsity == 0.5
    keras.utils.set_random_seed(0)
    alone = sos.sparsify(model_of(8, 2), MovementPruning, schedule=SCHEDULE)
    fit(alone)
    for a, b in zip(model.weights, alone.weights, strict=True):
        if "mask" in a.path:
            np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_register_of_a_name_that_is_taken_raises():
    clash = type(
        "MovementPruning", (sos.extend.PruningWrapper,), {"__module__": "x"}
    )
    with pytest.raises(ValueError, match="'MovementPruning'"):
        sos.extend.register(clash)
    assert sos.extend.techniques()["MovementPruning"] is MovementPruning


def test_sparsify_with_a_class_that_is_not_registered_raises():
    class Other(sos.extend.PruningWrapper):
        pass

    with pytest.raises(ValueError, match=r"`@sos.extend.register`.*Other"):
        sos.sparsify(model_of(2), Other, schedule=SCHEDULE)


def test_technique_without_scores_raises():
    @sos.extend.register
    class Lacking(sos.extend.PruningWrapper):
        pass

    try:
        model = sos.sparsify(model_of(2), Lacking, schedule=SCHEDULE)
        with pytest.raises(NotImplementedError, match="Lacking"):
            fit(model)
    finally:
        from sos import registry

        del registry._techniques["Lacking"]


def masks_of(model):
    return [
        weight.state["mask"].numpy()
        for wrapper in find_wrappers(model)
        for weight in wrapper.sparse_weights
    ]


def test_ranking_across_layers_prunes_to_their_mean():
    model = model_of(16, 2)
    model.layers[0].kernel.assign(model.layers[0].kernel * 10)
    sparse = sos.sparsify(
        model,
        sos.MagnitudePruning,
        schedule=SCHEDULE,
        ranking=GlobalRanking(),
    )
    fit(sparse)
    first, second = masks_of(sparse)
    assert first.sum() + second.sum() == (first.size + second.size) / 2
    assert first.mean() > second.mean()


def test_ranking_of_two_in_four_is_kept_in_files(tmp_path):
    sparse = sos.sparsify(
        model_of(8, 2),
        sos.MagnitudePruning,
        schedule=SCHEDULE,
        ranking=TwoOfFour(),
    )
    fit(sparse)
    for mask in masks_of(sparse):
        assert np.all(mask.reshape(-1, 4, mask.shape[1]).sum(axis=1) == 2)
    sparse.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert find_wrappers(loaded)[0].ranking == TwoOfFour()


def test_techniques_in_files_have_names_of_the_package():
    for name, technique in sos.extend.techniques().items():
        assert technique.__name__ == name
        registered = keras.saving.get_registered_name(technique)
        assert registered == f"sos>{name}"
