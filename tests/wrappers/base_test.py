import functools
import json

import keras
import numpy as np
import pytest
import tensorflow as tf

import sos
from sos.wrappers.base import find_wrappers
from sos.wrappers.masked import update_masks
from tests.support import techniques

TECHNIQUES = techniques.NAMES
PENALIZED = [
    name
    for name in TECHNIQUES
    if issubclass(sos.extend.techniques()[name], sos.extend.PenalizedWrapper)
]
PRUNING = [
    name
    for name in TECHNIQUES
    if issubclass(sos.extend.techniques()[name], sos.extend.PruningWrapper)
]

all_techniques = pytest.mark.parametrize("name", TECHNIQUES)
penalized_techniques = pytest.mark.parametrize("name", PENALIZED)


def prune(model, sparsity=0.5):
    update_masks(
        {
            wrapper: sparsity
            for wrapper in find_wrappers(model)
            if isinstance(wrapper, sos.extend.PruningWrapper)
        }
    )


def disturb(model):
    """Gives every variable of a technique another value than it starts with."""
    prune(model)
    for wrapper in find_wrappers(model):
        for i, weight in enumerate(wrapper.sparse_weights):
            for variable in weight.state.values():
                if variable.trainable:
                    noise = techniques.normal(
                        *variable.shape, seed=i, scale=0.1
                    )
                    variable.assign_add(noise)


def convs(name, count):
    layers = [keras.Input((6, 6, 4))]
    for i in range(1, count + 1):
        conv = keras.layers.Conv2D(4 + 7 * i, 3, padding="same", use_bias=False)
        layers.append(techniques.wrap(name, conv))
    return keras.Sequential(layers)


# What a technique adds.


@all_techniques
@pytest.mark.parametrize("count", [1, 5])
def test_stacked_convolutions_add_one_variable_each(name, count):
    model = convs(name, count)
    shapes = [(3, 3, 4 + 7 * i, 11 + 7 * i) for i in range(count)]
    plain = [tuple(w.layer.kernel.shape) for w in model.layers]
    assert plain == shapes
    added = techniques.sparse_state(model)
    assert [a.shape for a in added.values()] == shapes
    # Each weight is counted once, and beside it there are scalars only.
    sizes = [v.shape.num_elements() for v in model.variables if v.shape.rank]
    assert sum(sizes) == 2 * sum(np.prod(s) for s in shapes)
    trainable = sum(v.shape.rank == 4 for v in model.trainable_variables)
    assert trainable == count * (2 if name in PENALIZED else 1)


@penalized_techniques
def test_penalty_grows_with_its_weight(name):
    model = convs(name, 5)
    for wrapper in model.layers:
        techniques.bind(wrapper)
    totals = []
    for value in (1.0, 5.0):
        sos.set_hyperparameters(model, penalty_weight=value)
        assert len(model.losses) == 5
        totals.append(float(sum(model.losses)))
    assert totals[1] == pytest.approx(5 * totals[0], rel=1e-5)
    assert totals[0] > 0


@penalized_techniques
def test_penalty_without_an_updater_is_zero(name):
    model = techniques.mlp(name)
    assert [float(loss) for loss in model.losses] == [0.0, 0.0]


@penalized_techniques
def test_weighted_penalties_are_those_in_the_loss(name):
    ramp = sos.ramps.LinearRamp(begin_step=2, end_step=6)
    layer = keras.layers.Bidirectional(keras.layers.SimpleRNN(2))
    model = keras.Sequential(
        [
            keras.Input((3, 4)),
            techniques.wrap(name, layer, ramp=ramp, penalty_weight=0.5),
            techniques.wrap(name, keras.layers.Dense(2), penalty_weight=0.25),
        ]
    )
    disturb(model)
    jobs = [(w, weight) for w in model.layers for weight in w.sparse_weights]
    assert len(jobs) == 5

    def weighted():
        found = [wrapper.weighted_penalty(weight) for wrapper, weight in jobs]
        assert {(x.dtype, x.shape.rank) for x in found} == {(tf.float32, 0)}
        return np.array(found)

    assert not weighted().any()
    optimizer = keras.optimizers.SGD()
    optimizer.iterations.assign(3)
    with sos.SparsityUpdater(model, optimizer):
        found = weighted()
        np.testing.assert_array_equal(np.sort(found), np.sort(model.losses))
        # A quarter of the ramp, which the second layer has none of.
        factors = [0.25 * 0.5] * 4 + [0.25]
        plain = [wrapper.penalty(weight) for wrapper, weight in jobs]
        np.testing.assert_allclose(
            found, np.multiply(factors, plain), rtol=1e-6
        )
        assert found.all()
    assert not weighted().any()


@penalized_techniques
def test_penalty_of_a_shared_layer_is_counted_once(name):
    inputs = keras.Input((4,))
    layer = techniques.wrap(name, keras.layers.Dense(4))
    model = keras.Model(inputs, layer(layer(layer(inputs))))
    techniques.bind(layer)
    model(techniques.normal(2, 4), training=True)
    assert len(model.losses) == 1


@all_techniques
def test_wrapper_called_with_a_wrong_rank_raises_as_the_layer(name):
    wrapper = techniques.wrap(name, keras.layers.Conv2D(8, 3))
    with pytest.raises(ValueError, match="ndim"):
        wrapper(np.ones((1, 2, 3), np.float32))


# Random in training, not in evaluation.


@all_techniques
def test_training_repeats_within_a_step_only_and_evaluation_always(name):
    layer = keras.layers.Dense(5)
    wrapper = techniques.wrap(name, layer)
    wrapper.build((None, 4))
    x = techniques.normal(3, 4)
    evaluated = wrapper(x).numpy()
    np.testing.assert_array_equal(evaluated, wrapper(x))
    optimizer = techniques.bind(wrapper)
    first = wrapper(x, training=True).numpy()
    np.testing.assert_array_equal(first, wrapper(x, training=True))
    optimizer.iterations.assign(1)
    same = (first == wrapper(x, training=True).numpy()).all()
    assert same == (name not in PENALIZED)


@all_techniques
def test_training_without_an_updater_raises_where_one_is_needed(name):
    wrapper = techniques.wrap(name, keras.layers.Dense(5, name="here"))
    wrapper.build((None, 4))
    x = techniques.normal(3, 4)
    wrapper(x)
    wrapper(x, training=False)
    if not wrapper.needs_step:
        wrapper(x, training=True)
        return
    with pytest.raises(RuntimeError, match="'here'.*SparsityCallback"):
        wrapper(x, training=True)


# Configuration and files.


def as_json(config):
    """A configuration as a file keeps it, with lists for tuples."""
    return json.loads(json.dumps(config))


@all_techniques
def test_configuration_survives_json(name):
    wrapper = techniques.wrap(name, keras.layers.Dense(5), include="kernel")
    wrapper.build((None, 4))
    config = as_json(wrapper.get_config())
    copy = type(wrapper).from_config(dict(config))
    copy.build((None, 4))
    assert as_json(copy.get_config()) == config
    loaded = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(wrapper)
    )
    assert type(loaded) is type(wrapper)
    assert as_json(loaded.get_config()) == config


CHANGED = {
    "seed": 5,
    "threshold": 1.25,
    "penalty_weight": 0.7,
}


@pytest.mark.oldest
@all_techniques
def test_file_keeps_every_bit_and_hyperparameter(name, tmp_path):
    model = techniques.mlp(name)
    disturb(model)
    for setting, value in CHANGED.items():
        if hasattr(type(model.layers[0]), setting):
            sos.set_hyperparameters(model, **{setting: value})
    x, _ = techniques.batch()
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert len(loaded.variables) == len(model.variables)
    for old, new in zip(model.variables, loaded.variables, strict=True):
        assert old.dtype == new.dtype
        assert old.numpy().tobytes() == new.numpy().tobytes()
    assert as_json(loaded.get_config()) == as_json(model.get_config())
    np.testing.assert_array_equal(model(x), loaded(x))
    for old, new in zip(model.layers, loaded.layers, strict=True):
        for setting in CHANGED:
            if isinstance(
                getattr(type(old), setting, None), sos.extend.Hyperparameter
            ):
                assert getattr(new, setting) == CHANGED[setting]


@pytest.mark.oldest
@all_techniques
def test_weights_file_restores_into_another_model(name, tmp_path):
    model, other = techniques.mlp(name), techniques.mlp(name, seed=1)
    disturb(model)
    x, _ = techniques.batch()
    assert (model(x).numpy() != other(x).numpy()).any()
    model.save_weights(tmp_path / "model.weights.h5")
    other.load_weights(tmp_path / "model.weights.h5")
    for old, new in zip(model.variables, other.variables, strict=True):
        assert old.numpy().tobytes() == new.numpy().tobytes()
    np.testing.assert_array_equal(model(x), other(x))


@pytest.mark.oldest
@all_techniques
def test_loaded_model_trains_on_as_the_saved_one(name, tmp_path):
    model = techniques.mlp(name)
    # Traces take most of the time, and one of each kind is enough.
    eager = name not in ("MagnitudePruning", "VariationalDropout")
    model.compile(keras.optimizers.Adam(0.01), "mse", run_eagerly=eager)
    x, y = techniques.batch()
    fit = {"batch_size": 4, "epochs": 2, "verbose": 0, "shuffle": False}
    model.fit(x, y, callbacks=[sos.SparsityCallback()], **fit)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    loaded.run_eagerly = eager
    for each in (model, loaded):
        each.fit(x, y, callbacks=[sos.SparsityCallback()], **fit)
    for old, new in zip(model.variables, loaded.variables, strict=True):
        np.testing.assert_array_equal(old.numpy(), new.numpy())


# Precision and compilation.


@all_techniques
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_leaves_the_techniques_variables_alone(name, policy):
    layer = keras.layers.Dense(5, dtype=policy)
    model = keras.Sequential([keras.Input((4,)), techniques.wrap(name, layer)])
    (wrapper,) = model.layers
    techniques.bind(wrapper)
    prune(model)
    mask = isinstance(wrapper, sos.extend.MaskedWrapper)
    for variable in wrapper.sparse_weights[0].state.values():
        assert variable.dtype == ("uint8" if mask else "float32")
    for training in (False, True):
        outputs = model(techniques.normal(3, 4), training=training)
        assert outputs.dtype == policy[6:]
        for weight, value in wrapper.evaluation_weights().items():
            assert value.dtype == weight.variable.dtype == "float32"
    assert all(loss.dtype == tf.float32 for loss in model.losses)


@all_techniques
def test_mixed_precision_trains(name):
    model = keras.Sequential(
        [
            keras.Input((6,)),
            techniques.wrap(name, keras.layers.Dense(8, dtype="mixed_float16")),
            techniques.wrap(
                name, keras.layers.Dense(2, dtype="mixed_bfloat16")
            ),
        ]
    )
    model.compile(
        keras.optimizers.Adam(0.01),
        "mse",
        run_eagerly=name != "VariationalDropout",
    )
    before = [v.numpy() for v in model.trainable_variables]
    x, y = techniques.batch()
    model.fit(x, y, verbose=0, callbacks=[sos.SparsityCallback()])
    for old, new in zip(before, model.trainable_variables, strict=True):
        assert np.isfinite(new.numpy()).all()
        assert (old != new.numpy()).any()


@pytest.mark.oldest
@pytest.mark.parametrize(
    "name", ["MagnitudePruning", "VariationalDropout", "L0Regularization"]
)
def test_train_step_compiled_by_xla_gives_the_same(name):
    results = []
    for jit_compile in (False, True):
        model = techniques.mlp(name)
        prune(model)
        optimizer = keras.optimizers.SGD(0.1)
        optimizer.build(model.trainable_variables)
        step = techniques.train_step(model, optimizer, jit_compile=jit_compile)
        with sos.SparsityUpdater(model, optimizer) as updater:
            losses = []
            for i in range(4):
                losses.append(step(*techniques.batch(seed=i)))
                updater.step()
        evaluate = tf.function(model, jit_compile=jit_compile)
        results.append(
            [*losses, evaluate(techniques.batch()[0])]
            + [v.numpy() for v in model.variables]
        )
    for plain, compiled in zip(*results, strict=True):
        np.testing.assert_allclose(plain, compiled, rtol=1e-4, atol=1e-5)


# Rematerialisation: what the backward pass computes again must be equal.


class Stack(keras.layers.Layer):
    """Three sparse layers, two of them perhaps computed again."""

    def __init__(self, technique, how):
        super().__init__(name="stack")
        self.how = how
        units = {"first": 8, "second": 6, "last": 2}
        for name, size in units.items():
            layer = keras.layers.Dense(size, activation="tanh", name=name)
            setattr(self, name, techniques.wrap(technique, layer))

    def build(self, shape):
        self.first.build(shape)
        self.second.build((None, 8))
        self.last.build((None, 6))

    def call(self, inputs, training=False):
        def two(x):
            x = self.first(x, training=training)
            return self.second(x, training=training)

        if self.how == "keras.remat":
            two = keras.remat(two)
        if self.how == "tf.recompute_grad":
            two = tf.recompute_grad(two)
        return self.last(two(inputs), training=training)


@functools.cache
def gradients(technique, how, compiled):
    """The loss and the gradients, as arrays."""
    keras.utils.set_random_seed(0)
    if how == "keras.RematScope":
        with keras.RematScope(mode="full"):
            model = Stack(technique, how)
    else:
        model = Stack(technique, how)
    model.build((None, 6))
    for i, variable in enumerate(model.trainable_variables):
        noise = techniques.normal(*variable.shape, seed=i, scale=0.3)
        variable.assign_add(noise)
    prune(model)
    x, y = techniques.batch()

    def compute():
        with tf.GradientTape() as tape:
            outputs = model(x, training=True)
            loss = tf.reduce_mean(tf.square(outputs - y))
            loss += 100 * sum(model.losses, 0.0)
        return [loss, *tape.gradient(loss, model.trainable_variables)]

    with sos.SparsityUpdater(model, keras.optimizers.SGD()):
        found = tf.function(compute)() if compiled else compute()
    return [np.asarray(value) for value in found]


@pytest.mark.parametrize(
    ("name", "how", "compiled"),
    [
        *(
            (name, how, False)
            for name in TECHNIQUES
            for how in ("keras.remat", "keras.RematScope", "tf.recompute_grad")
        ),
        # Keras cannot trace a plain Dense made in its scope.
        *(
            (name, how, True)
            for name in ("MagnitudePruning", "VariationalDropout")
            for how in ("keras.remat", "tf.recompute_grad")
        ),
    ],
)
def test_rematerialisation_changes_no_gradient(name, how, compiled):
    plain = gradients(name, None, compiled)
    assert all((g != 0).any() for g in plain)
    again = gradients(name, how, compiled)
    for want, got in zip(plain, again, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


# The wrapped layer.


def test_wrapper_of_something_else_raises():
    with pytest.raises(TypeError, match="wraps Keras 3 layers.*Received"):
        techniques.wrap("FixedMask", lambda x: x)


def test_include_chooses_weights():
    wrapper = techniques.wrap(
        "MagnitudePruning", keras.layers.LSTM(3), include="recurrent"
    )
    wrapper.build((None, 4, 2))
    (weight,) = wrapper.sparse_weights
    assert weight.variable is wrapper.layer.cell.recurrent_kernel
    for include, message in (
        ("nothing", "matches 'nothing'"),
        ("(", "regular"),
    ):
        with pytest.raises(ValueError, match=message):
            techniques.wrap(
                "MagnitudePruning", keras.layers.LSTM(3), include=include
            ).build((None, 4, 2))


def test_wrapper_of_a_layer_without_matrices_raises():
    wrapper = techniques.wrap("FixedMask", keras.layers.BatchNormalization())
    with pytest.raises(ValueError, match="nothing to make sparse.*rank 2"):
        wrapper.build((None, 3))


def test_scales_and_biases_of_rank_2_stay_dense():
    inputs = keras.Input((4, 6))
    x = keras.layers.LayerNormalization(axis=[1, 2], name="norm")(inputs)
    x = keras.layers.GRU(6, return_sequences=True, name="gru")(x)
    x = keras.layers.MultiHeadAttention(2, 3, name="attention")(x, inputs)
    model = keras.Model(inputs, x)
    sparse = sos.sparsify(
        model, "MagnitudePruning", schedule=techniques.SCHEDULE
    )
    dense = {"bias": "bias", "gamma": "norm", "beta": "norm"}
    vectors = 0
    for row in sos.sparsity_report(sparse).rows:
        kind = row["weight"].rpartition("/")[2]
        assert bool(row["technique"]) == (kind not in dense), row
        if row["rank"] > 1 and kind in dense:
            assert row["reason"] == dense[kind]
            vectors += 1
    # Two of the norm, one of the GRU, three of the attention's four.
    assert vectors == 6
    # The same where layers are wrapped by hand.
    gru = techniques.wrap("MagnitudePruning", keras.layers.GRU(3))
    gru.build((None, 4, 2))
    names = [weight.variable.name for weight in gru.sparse_weights]
    assert names == ["kernel", "recurrent_kernel"]
    norm = keras.layers.LayerNormalization(axis=[1, 2])
    with pytest.raises(ValueError, match="nothing to make sparse"):
        techniques.wrap("MagnitudePruning", norm).build((None, 3, 4))


@all_techniques
def test_quantize_of_a_wrapper_raises(name):
    wrapper = techniques.wrap(name, keras.layers.Dense(3))
    wrapper.build((None, 4))
    before = wrapper.layer.kernel.numpy()
    with pytest.raises(NotImplementedError, match="strip.*then quantize"):
        wrapper.quantize("int8")
    np.testing.assert_array_equal(wrapper.layer.kernel, before)


@all_techniques
def test_weight_decay_and_activity_losses_are_kept(name):
    layer = keras.layers.Dense(
        5,
        activation="relu",
        kernel_regularizer=keras.regularizers.L2(0.1),
        activity_regularizer=keras.regularizers.L1(0.01),
    )
    wrapper = techniques.wrap(name, layer)
    wrapper.build((None, 4))
    techniques.bind(wrapper)
    outputs = wrapper(techniques.normal(3, 4), training=True).numpy()
    losses = sorted(float(loss) for loss in wrapper.losses)
    raw = np.float64(layer.kernel)
    decay, activity = 0.1 * (raw**2).sum(), 0.01 * np.abs(outputs).sum() / 3
    for expected in (decay, activity):
        assert min(abs(loss - expected) for loss in losses) < 1e-5
    assert len(losses) == 2 + (name in PENALIZED)


@all_techniques
def test_batch_statistics_move_inside_a_wrapped_model(name):
    inner = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(3),
            keras.layers.BatchNormalization(momentum=0.5),
        ]
    )
    wrapper = techniques.wrap(name, inner)
    wrapper.build((None, 4))
    techniques.bind(wrapper)
    norm = inner.layers[1]
    wrapper(techniques.normal(8, 4) + 3, training=True)
    before = norm.moving_mean.numpy()
    assert (before != 0).any()  # a mask may leave a column empty
    wrapper(techniques.normal(8, 4))
    np.testing.assert_array_equal(norm.moving_mean, before)


@all_techniques
def test_dense_weights_are_never_changed_by_a_call(name):
    model = techniques.mlp(name)
    prune(model)
    before = [v.numpy() for v in model.variables]
    for wrapper in model.layers:
        techniques.bind(wrapper)
    model(techniques.batch()[0], training=True)
    model(techniques.batch()[0])
    for old, new in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(old, new.numpy())


class Recomputing(keras.layers.Layer):
    """A layer whose own code is computed again in the backward pass."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(3)

    def build(self, shape):
        self.dense.build(shape)

    def call(self, inputs):
        return keras.remat(lambda x: self.dense(x))(inputs)


@all_techniques
def test_rematerialisation_inside_a_wrapped_layer(name):
    wrapper = techniques.wrap(name, Recomputing())
    wrapper.build((None, 4))
    techniques.bind(wrapper)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(wrapper(techniques.normal(2, 4), training=True))
    kernel = wrapper.layer.dense.kernel.value
    assert tape.gradient(loss, kernel) is not None


# Scores, rankings and gradients.


class Returning(sos.extend.Ranking):
    """Returns what it is told to, in the place of masks."""

    def __init__(self, result):
        self.result = result

    def get_config(self):
        return {"result": self.result}

    def masks(self, scores, sparsities):
        return [self.result(tuple(score.shape)) for score in scores]


@pytest.mark.parametrize(
    "result",
    [
        lambda shape: np.full(shape, 0.7),
        lambda shape: np.full(shape, 2),
        lambda shape: np.zeros(shape[::-1]),
        lambda shape: np.zeros(()),
    ],
    ids=["fraction", "two", "transposed", "scalar"],
)
def test_wrong_masks_of_a_ranking_change_no_mask(result):
    rankings = {"first": None, "last": Returning(result)}
    wrappers = [
        techniques.wrap(
            "MagnitudePruning",
            keras.layers.Dense(3, name=name),
            ranking=ranking,
        )
        for name, ranking in rankings.items()
    ]
    for wrapper in wrappers:
        wrapper.build((None, 4))
    with pytest.raises(ValueError, match="last/kernel.*hold zeros and ones"):
        update_masks(dict.fromkeys(wrappers, 0.5))
    for wrapper in wrappers:
        assert techniques.state(wrapper, "mask").numpy().all()


class ByColumn(sos.extend.PruningWrapper):
    """Scores of a wrong shape."""

    def scores(self, weight):
        return tf.reduce_sum(weight.value, axis=0)


def test_scores_of_a_wrong_shape_are_refused():
    wrapper = ByColumn(keras.layers.Dense(3), schedule=techniques.SCHEDULE)
    wrapper.build((None, 4))
    with pytest.raises(ValueError, match=r"ByColumn.*\(4, 3\).*d: \(3,\)"):
        update_masks({wrapper: 0.5})
    assert techniques.state(wrapper, "mask").numpy().all()


class ByGradient(sos.extend.PruningWrapper):
    """Keeps the weights with the largest gradients."""

    uses_gradient = True

    def scores(self, weight):
        return tf.abs(weight.state["gradient"].value)


def test_gradient_sums_over_calls_and_steps_until_an_update():
    layer = keras.layers.Dense(3, use_bias=False)
    wrapper = ByGradient(layer, schedule=techniques.SCHEDULE)
    wrapper.build((None, 4))
    techniques.bind(wrapper)
    gradient = techniques.state(wrapper, "gradient")
    inputs = techniques.normal(2, 5, 4)
    upstream = techniques.normal(2, 5, 3, seed=1)

    def step():
        """The layer is shared by two uses."""
        with tf.GradientTape() as tape:
            loss = sum(
                tf.reduce_sum(wrapper(x, training=True) * u)
                for x, u in zip(inputs, upstream, strict=True)
            )
        tape.gradient(loss, layer.kernel.value)

    once = sum(x.T @ u for x, u in zip(inputs, upstream, strict=True))
    for count in (1, 2):
        step()
        wrapper(inputs[0])  # An evaluation leaves no trace.
        np.testing.assert_allclose(gradient, count * once, rtol=1e-4, atol=1e-5)
    update_masks({wrapper: 0.5})
    assert not gradient.numpy().any()
    kept = techniques.state(wrapper, "mask").numpy() == 1
    assert np.abs(once)[kept].min() > np.abs(once)[~kept].max()
    # That of a masked weight is seen too, so that it may come back.
    step()
    np.testing.assert_allclose(gradient, once, rtol=1e-4, atol=1e-5)


# Hyperparameter single masks.


class CumulativeByGradient(ByGradient):
    """What is pruned stays so."""

    cumulative = True


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("cumulative", [False, True])
def test_assign_mask_sets_it_and_gradients_begin_anew(
    cumulative, replicas, compiled
):
    technique = CumulativeByGradient if cumulative else ByGradient
    strategy = (
        techniques.two_replicas()
        if replicas == 2
        else tf.distribute.get_strategy()
    )
    with strategy.scope():
        wrapper = technique(keras.layers.Dense(2), schedule=techniques.SCHEDULE)
        wrapper.build((None, 2))
        (weight,) = wrapper.sparse_weights
        weight.state["gradient"].assign(tf.ones((2, 2)))

        def assign(mask):
            wrapper.assign_mask(weight, mask)

        if compiled:
            assign = tf.function(assign)
        # Of any dtype that a ranking may return.
        for mask in (
            np.array([[1, 0], [1, 1]], np.uint8),
            tf.constant([[0, 1], [1, 1]], tf.uint8),
        ):
            assign(mask)
    expected = [[0, 0], [1, 1]] if cumulative else [[0, 1], [1, 1]]
    for name, value in (("mask", expected), ("gradient", np.zeros((2, 2)))):
        held = strategy.experimental_local_results(weight.state[name].value)
        assert len(held) == replicas
        for variable in held:
            np.testing.assert_array_equal(variable, value)


def test_assign_mask_of_one_weight_leaves_others_alone():
    layer = keras.layers.Bidirectional(keras.layers.SimpleRNN(2))
    wrapper = techniques.wrap("MagnitudePruning", layer)
    wrapper.build((None, 3, 4))
    chosen = wrapper.sparse_weights[2]
    wrapper.assign_mask(chosen, np.zeros(chosen.variable.shape, np.uint8))
    for weight in wrapper.sparse_weights:
        assert weight.state["mask"].numpy().any() == (weight is not chosen)
