import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import sos
from sos.training.steps import Steps
from tests.support import techniques
from tests.support.toy_task import GivenTask

BATCH = 8
SGD = keras.optimizers.SGD
WEIGHTED = np.tile([1, 0.5, 2, 0, 3, 1, 0, 0.25], 6).astype(np.float32)
# The second replica's examples, or the second half of the micro-batches, count
# for nothing.
ONE_SIDED = np.tile([1, 2, 0.5, 1, 0, 0, 0, 0], 6).astype(np.float32)


def examples(steps=6, inputs=6, outputs=2):
    return {
        "x": techniques.normal(steps * BATCH, inputs, seed=1),
        "y": techniques.normal(steps * BATCH, outputs, seed=2),
    }


def dense():
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, activation="tanh", name="a"),
            layers.Dense(2, name="b"),
        ],
        name="toy",
    )


def pruned():
    return techniques.mlp(
        "MagnitudePruning",
        schedule=sos.ConstantSparsity(0.5, begin_step=2, frequency=2),
    )


def shifted(penalty_weight=0.25):
    """Dense layers, and a penalty that moves states of its own."""
    return keras.Sequential(
        [
            keras.Input((6,)),
            techniques.Shift(
                layers.Dense(8, activation="tanh", name="a"),
                penalty_weight=penalty_weight,
            ),
            techniques.Shift(
                layers.Dense(2, name="b"), penalty_weight=penalty_weight
            ),
        ],
        name="toy",
    )


def embedded():
    return keras.Sequential(
        [
            keras.Input((3,), dtype="int32"),
            layers.Embedding(10, 4, name="table"),
            layers.GlobalAveragePooling1D(name="mean"),
            layers.Dense(2, name="b"),
        ],
        name="toy",
    )


def task(make_model=dense, make_optimizer=None, **arrays):
    return GivenTask(
        make_model,
        make_optimizer or (lambda: keras.optimizers.Adam(0.05)),
        {**examples(), **arrays},
        batch_size=BATCH,
    )


class Run:
    """Trains a task step by step with the compiled functions alone."""

    def __init__(
        self, task, *, replicas=1, gradient_accumulation_steps=1, start=0
    ):
        self.task = task
        self.strategy = (
            techniques.two_replicas()
            if replicas == 2
            else tf.distribute.OneDeviceStrategy("CPU:0")
        )
        with self.strategy.scope():
            self.model = task.build_model()
            self.optimizer = task.build_optimizer(self.model)
            self.optimizer.build(self.model.trainable_variables)
            if start:
                self.optimizer.iterations.assign(start)
            self.steps = Steps(
                task,
                self.model,
                self.optimizer,
                gradient_accumulation_steps=gradient_accumulation_steps,
            )

    def train(self, steps, per_call=1):
        with driving(self.model, self.optimizer) as driver:
            iterator = self.iterator(self.task.train_dataset)
            for _ in range(0, steps, per_call):
                self.steps.train(iterator, tf.constant(per_call))
                if driver is not None:
                    driver.step()
        return self

    def iterator(self, dataset):
        start = self.step
        arguments = [start] if dataset == self.task.train_dataset else []
        return iter(
            self.strategy.distribute_datasets_from_function(
                lambda context: dataset(context, *arguments)
            )
        )

    @property
    def step(self):
        return int(keras.ops.convert_to_numpy(self.optimizer.iterations))

    def values(self):
        variables = [*self.model.variables, *self.optimizer.variables]
        return [keras.ops.convert_to_numpy(v) for v in variables]


@contextlib.contextmanager
def driving(model, optimizer):
    if not sos.wrappers.base.find_wrappers(model):
        yield None
        return
    with sos.Driver(model, optimizer) as driver:
        yield driver


class Plain:
    """What it should compute: one tape over the whole batch, and Keras."""

    def __init__(self, task, steps):
        self.model = task.build_model()
        self.optimizer = task.build_optimizer(self.model)
        self.optimizer.build(self.model.trainable_variables)
        variables = self.model.trainable_variables
        with driving(self.model, self.optimizer) as driver:
            for step in range(steps):
                batch = task.rows(step)
                with tf.GradientTape() as tape:
                    outputs = self.model(batch["x"], training=True)
                    losses = task.losses(outputs, batch)
                    weight = batch["weight"]
                    loss = tf.reduce_sum(losses * weight) / weight.sum()
                    loss += sum(self.model.losses)
                gradients = tape.gradient(loss, variables)
                # Dense: Keras squares each row of an embedding that occurs
                # several times by itself.
                gradients = [
                    None if g is None else tf.convert_to_tensor(g)
                    for g in gradients
                ]
                self.optimizer.apply(gradients, variables)
                if driver is not None:
                    driver.step()

    values = Run.values


def check_equal(found, expected, **tolerance):
    tolerance = {"rtol": 2e-5, "atol": 2e-6, **tolerance}
    for a, b in zip(found.values(), expected.values(), strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


# One step.


def test_a_step_is_that_of_the_formulas():
    """A linear model with momentum, by hand."""

    def linear():
        return keras.Sequential(
            [keras.Input((6,)), layers.Dense(2, use_bias=False)]
        )

    given = task(linear, lambda: SGD(0.1, momentum=0.9), weight=WEIGHTED)
    run = Run(given)
    kernel = run.model.weights[0].numpy().astype(np.float64)
    run.train(3)
    velocity = 0
    for step in range(3):
        rows = given.rows(step)
        weight = rows["weight"][:, None] / rows["weight"].sum()
        error = rows["x"] @ kernel - rows["y"]
        # Squares are averaged over the two outputs.
        gradient = rows["x"].T @ (weight * 2 * error / 2)
        velocity = 0.9 * velocity - 0.1 * gradient
        kernel += velocity
    np.testing.assert_allclose(
        run.model.weights[0], kernel, rtol=1e-5, atol=1e-6
    )
    assert run.step == 3


class Gathering(sos.PruningWrapper):
    """A technique that ranks by gradients."""

    uses_gradient = True

    def scores(self, weight):
        return tf.abs(weight.state["gradient"].value)


@pytest.mark.parametrize("weight", [WEIGHTED, ONE_SIDED])
@pytest.mark.parametrize(
    ("replicas", "gradient_accumulation_steps"),
    [(1, 1), (2, 1), (1, 2), (2, 2)],
)
def test_gradients_are_gathered_of_sums_over_all_examples(
    replicas, gradient_accumulation_steps, weight
):
    """However the batch is cut: a linear model that stands still, by hand."""

    def linear():
        layer = layers.Dense(2, use_bias=False)
        schedule = sos.ConstantSparsity(0.5, begin_step=5, frequency=5)
        return keras.Sequential(
            [keras.Input((6,)), Gathering(layer, schedule=schedule)]
        )

    given = task(linear, lambda: SGD(0.0), weight=weight)
    run = Run(
        given,
        replicas=replicas,
        gradient_accumulation_steps=gradient_accumulation_steps,
    ).train(3)
    (sparse,) = run.model.layers[0].sparse_weights
    x, y, weight = (
        given.arrays[name][: 3 * BATCH] for name in ("x", "y", "weight")
    )
    error = x @ sparse.variable.numpy() - y
    expected = x.T @ (weight[:, None] * 2 * error / 2)
    # Every replica holds that of all.
    held = run.strategy.experimental_local_results(
        sparse.state["gradient"].value
    )
    assert len(held) == replicas
    for value in held:
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-4)
        assert value.numpy().tobytes() == held[0].numpy().tobytes()


OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(
        keras.optimizers.schedules.CosineDecay(0.05, 10),
        # Larger than rounding errors of gradients near zero.
        epsilon=1e-3,
    ),
    "decay_and_ema": lambda: SGD(
        0.1,
        0.9,
        nesterov=True,
        weight_decay=0.01,
        use_ema=True,
        ema_overwrite_frequency=2,
    ),
}


@pytest.mark.parametrize("make_model", [dense, pruned, shifted])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_are_those_of_a_plain_loop(make_model, optimizer):
    given = task(make_model, OPTIMIZERS[optimizer], weight=WEIGHTED)
    check_equal(Run(given).train(5), Plain(given, 5))


@pytest.mark.parametrize("make_model", [dense, pruned, shifted])
@pytest.mark.parametrize(
    ("replicas", "gradient_accumulation_steps"), [(2, 1), (1, 4), (2, 2)]
)
@pytest.mark.parametrize(
    "weight", [WEIGHTED, ONE_SIDED], ids=["weighted", "one_sided"]
)
def test_how_the_batch_is_cut_changes_nothing(
    make_model, replicas, gradient_accumulation_steps, weight
):
    given = task(make_model, lambda: SGD(0.1, momentum=0.9), weight=weight)
    run = Run(
        given,
        replicas=replicas,
        gradient_accumulation_steps=gradient_accumulation_steps,
    )
    check_equal(run.train(5), Plain(given, 5))


@pytest.mark.parametrize(
    ("replicas", "gradient_accumulation_steps"),
    [(1, 1), (2, 1), (1, 2), (2, 2)],
)
def test_a_batch_without_weight_does_no_harm(
    replicas, gradient_accumulation_steps
):
    weight = np.ones(6 * BATCH, np.float32)
    weight[BATCH : 2 * BATCH] = 0
    given = task(dense, lambda: SGD(0.1), weight=weight)
    run = Run(
        given,
        replicas=replicas,
        gradient_accumulation_steps=gradient_accumulation_steps,
    )
    after = [run.train(1).values() for _ in range(3)]
    for first, second in zip(after[0], after[1], strict=True):
        if first.ndim:
            np.testing.assert_array_equal(first, second)
    assert all(np.isfinite(value).all() for value in after[2])
    assert run.steps.take_bad_step() is None
    assert np.isfinite(run.steps.take_train_metrics()["loss"])


@pytest.mark.parametrize(
    ("replicas", "gradient_accumulation_steps"), [(1, 1), (2, 1), (1, 2)]
)
def test_embeddings_have_gradients_of_rows(
    replicas, gradient_accumulation_steps
):
    ids = np.random.default_rng(3).integers(10, size=(6 * BATCH, 3))
    given = task(
        embedded,
        lambda: keras.optimizers.Adam(0.1, epsilon=1e-3),
        x=ids.astype(np.int32),
        weight=WEIGHTED,
    )
    run = Run(
        given,
        replicas=replicas,
        gradient_accumulation_steps=gradient_accumulation_steps,
    )
    check_equal(run.train(4), Plain(given, 4))


def test_a_batch_may_be_any_structure():
    class Nested(GivenTask):
        def train_dataset(self, context, step):
            return (
                super()
                .train_dataset(context, step)
                .map(lambda b: ((b["x"], (b["y"],)), b["weight"]))
            )

        def compute_metrics(self, model, batch, training):
            (x, (y,)), weight = batch
            return super().compute_metrics(
                model, {"x": x, "y": y, "weight": weight}, training
            )

    given = Nested(dense, lambda: SGD(0.1), examples(), batch_size=BATCH)
    check_equal(
        Run(given, replicas=2, gradient_accumulation_steps=2).train(2),
        Plain(given, 2),
    )


def test_another_number_of_steps_is_no_new_trace():
    run = Run(task()).train(1)
    for count in (2, 3):
        run.steps.train(
            run.iterator(run.task.train_dataset), tf.constant(count)
        )
    assert run.steps.train.experimental_get_tracing_count() == 1
    assert run.step == 6


# Penalties.


@pytest.mark.parametrize(
    ("replicas", "gradient_accumulation_steps"),
    [(1, 1), (2, 1), (1, 2), (1, 4), (2, 2)],
)
def test_penalties_are_counted_once(replicas, gradient_accumulation_steps):
    # Powers of two, so that the shares are exact.
    run = Run(
        task(shifted, lambda: SGD(0.5)),
        replicas=replicas,
        gradient_accumulation_steps=gradient_accumulation_steps,
    )
    for step in range(1, 4):
        run.train(1)
        for wrapper in run.model.layers:
            assert techniques.shift_of(wrapper) == -0.5 * 0.25 * step


@pytest.mark.parametrize(
    ("replicas", "gradient_accumulation_steps"),
    [(1, 1), (2, 1), (1, 2), (2, 2)],
)
def test_activity_losses_are_counted_once(
    replicas, gradient_accumulation_steps
):
    """Keras divides them by the examples, so that parts have their mean."""

    def active():
        return keras.Sequential(
            [
                keras.Input((6,)),
                layers.Dense(8, activity_regularizer="l2", name="a"),
                layers.Dense(
                    2,
                    kernel_regularizer="l2",
                    activity_regularizer=keras.regularizers.L1(0.1),
                    name="b",
                ),
            ]
        )

    given = task(active, lambda: SGD(0.5))
    run = Run(
        given,
        replicas=replicas,
        gradient_accumulation_steps=gradient_accumulation_steps,
    )
    check_equal(run.train(3), Plain(given, 3))


# Noise.


def noted(name, **settings):
    """A task with equal examples, so that outputs differ by noise alone."""

    def one_layer():
        technique = sos.techniques()[name]
        layer = technique(
            layers.Dense(5, name="a"), penalty_weight=1e-3, **settings
        )
        return keras.Sequential([keras.Input((6,)), layer], name="toy")

    x = np.tile(techniques.normal(1, 6, seed=4), (6 * BATCH, 1))
    given = GivenTask(
        one_layer,
        # Weights stand still.
        lambda: SGD(0.0),
        {
            "x": x,
            "y": np.zeros((6 * BATCH, 5), np.float32),
            "number": np.arange(6 * BATCH),
        },
        batch_size=BATCH,
    )
    given.seen = []
    return given


ACTIVATION_NOISE = ("VariationalDropout", {"initial_log_sigma2": -2.0})
WEIGHT_NOISE = ("L0Regularization", {"initial_log_alpha": 0.0})


def seen(noise, *, steps=2, start=0, **cut):
    """Outputs by step, replica and first example of the batch."""
    name, settings = noise
    given = noted(name, **settings)
    Run(given, start=start, **cut).train(steps)
    return {
        (note["step"], note["replica"], int(note["number"][0]) % BATCH): note[
            "outputs"
        ]
        for note in given.seen
    }


def differ(outputs):
    """Whether all are different; of the same shape, they would be equal."""
    values = [np.asarray(value).tobytes() for value in outputs]
    return len(set(values)) == len(values)


@pytest.mark.parametrize("noise", [ACTIVATION_NOISE, WEIGHT_NOISE], ids=str)
def test_noise_differs_between_replicas_and_steps(noise):
    found = seen(noise, replicas=2, steps=3)
    assert sorted(found) == [(s, r, 4 * r) for s in range(3) for r in range(2)]
    assert differ(found.values())
    # The same in another trainer, and in one that begins later.
    again = seen(noise, replicas=2, steps=3)
    late = seen(noise, replicas=2, steps=2, start=1)
    assert sorted(late) == [key for key in sorted(found) if key[0] > 0]
    for other in (again, late):
        for key, value in other.items():
            np.testing.assert_array_equal(value, found[key])


def test_activation_noise_differs_between_micro_batches():
    found = seen(ACTIVATION_NOISE, gradient_accumulation_steps=4)
    assert sorted(found) == [(s, 0, 2 * i) for s in range(2) for i in range(4)]
    assert differ(found.values())
    both = seen(ACTIVATION_NOISE, replicas=2, gradient_accumulation_steps=2)
    assert len(both) == 8
    assert differ(both.values())
    again = seen(ACTIVATION_NOISE, replicas=2, gradient_accumulation_steps=2)
    for key, value in both.items():
        np.testing.assert_array_equal(value, again[key])


def test_weight_noise_is_one_sample_for_a_step():
    found = seen(WEIGHT_NOISE, gradient_accumulation_steps=4)
    whole = seen(WEIGHT_NOISE)
    assert len(found) == 8
    for (step, replica, _), outputs in found.items():
        expected = whole[step, replica, 0][:2]
        np.testing.assert_allclose(outputs, expected, rtol=1e-6)
    assert differ(whole.values())


def test_dropout_differs_between_micro_batches():
    def dropping():
        return keras.Sequential(
            [keras.Input((6,)), layers.Dropout(0.5, seed=1), layers.Dense(2)]
        )

    x = np.ones((6 * BATCH, 6), np.float32)
    given = task(dropping, lambda: SGD(0.0), x=x)
    given.seen = []
    Run(given, gradient_accumulation_steps=4).train(2)
    assert len(given.seen) == 8
    assert differ(note["outputs"] for note in given.seen)


# Clipping.


CLIPPING = {
    "value": {"clipvalue": 0.01},
    "norm": {"clipnorm": 0.05},
    "global_norm": {"global_clipnorm": 0.05},
    "none_is_reached": {"global_clipnorm": 1e3},
}


@pytest.mark.parametrize("name", CLIPPING)
@pytest.mark.parametrize(
    ("replicas", "gradient_accumulation_steps"), [(1, 2), (2, 1)]
)
def test_what_is_clipped_is_the_gradient_of_the_whole_batch(
    name, replicas, gradient_accumulation_steps
):
    given = task(shifted, lambda: SGD(1.0, **CLIPPING[name]), weight=WEIGHTED)
    run = Run(
        given,
        replicas=replicas,
        gradient_accumulation_steps=gradient_accumulation_steps,
    )
    check_equal(run.train(3), Plain(given, 3))
    # The limits are felt, or not.
    free = task(shifted, lambda: SGD(1.0), weight=WEIGHTED)
    difference = run.values()[0] - Plain(free, 3).values()[0]
    assert (np.abs(difference).max() > 1e-3) == (name != "none_is_reached")


def test_clipping_leaves_out_what_has_no_gradient():
    class Unused(layers.Layer):
        def build(self, shape):
            self.unused = self.add_weight(shape=(2,), initializer="ones")

        def call(self, inputs):
            return inputs

    def partly():
        return keras.Sequential([keras.Input((6,)), Unused(), layers.Dense(2)])

    given = task(partly, lambda: SGD(1.0, clipnorm=0.05))
    run = Run(given, replicas=2, gradient_accumulation_steps=2).train(2)
    check_equal(run, Plain(given, 2))
    np.testing.assert_array_equal(run.model.weights[0], [1, 1])


# What is refused.


@pytest.mark.parametrize(
    ("make_optimizer", "message"),
    [
        (
            lambda: SGD(use_ema=True),
            "`ema_overwrite_frequency`.*Received: use_ema=True",
        ),
        (
            lambda: SGD(gradient_accumulation_steps=2),
            "`gradient_accumulation_steps`.*Received: gradient_accumulation_steps=2",
        ),
        (
            lambda: keras.optimizers.LossScaleOptimizer(SGD()),
            "bfloat16.*Received: a LossScaleOptimizer",
        ),
        (
            lambda: SGD(loss_scale_factor=8.0),
            "Received: loss_scale_factor=8.0",
        ),
    ],
    ids=["averages", "accumulation", "loss_scaling", "gradient_scaling"],
)
def test_optimizers_that_do_the_engines_work_are_refused(
    make_optimizer, message
):
    with pytest.raises(ValueError, match=message):
        Run(task(make_optimizer=make_optimizer))


@pytest.mark.parametrize(
    ("replicas", "gradient_accumulation_steps"),
    [(1, 0), (1, 3), (1, 16), (2, 3), (2, 8)],
)
def test_batches_that_cannot_be_cut_are_refused(
    replicas, gradient_accumulation_steps
):
    with pytest.raises(ValueError) as error:
        Run(
            task(),
            replicas=replicas,
            gradient_accumulation_steps=gradient_accumulation_steps,
        )
    assert (
        f"Received: batch_size=8, {replicas} replicas, "
        f"gradient_accumulation_steps={gradient_accumulation_steps}"
        in str(error.value)
    )


def test_measures_must_be_those_that_were_named():
    given = task()
    given.metric_names = ("loss", "error", "accuracy")
    with pytest.raises(ValueError, match=r"GivenTask.measure.*'accuracy'\].*R"):
        Run(given).train(1)


def test_a_loss_must_be_among_them():
    given = task()
    given.metric_names = ("error",)
    with pytest.raises(ValueError, match=r"must hold 'loss'.*\('error',\)"):
        Run(given)


# Mixed precision.


def test_float16_is_refused():
    def half():
        return keras.Sequential(
            [
                keras.Input((6,)),
                layers.Dense(3),
                layers.Dense(2, dtype="mixed_float16"),
            ]
        )

    with pytest.raises(ValueError, match="bfloat16.*computes in float16"):
        Run(task(half))


@pytest.fixture
def bfloat16():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    yield
    keras.config.set_dtype_policy(before)


@pytest.mark.parametrize(
    ("replicas", "gradient_accumulation_steps"), [(1, 1), (2, 1), (2, 2)]
)
@pytest.mark.parametrize("make_model", [pruned, shifted])
def test_bfloat16_is_near_float32(
    bfloat16, make_model, replicas, gradient_accumulation_steps
):
    given = task(make_model, lambda: SGD(0.1, clipnorm=1.0), weight=WEIGHTED)
    run = Run(
        given,
        replicas=replicas,
        gradient_accumulation_steps=gradient_accumulation_steps,
    ).train(4)
    assert run.model(given.rows(0)["x"]).dtype == "bfloat16"
    for variable in run.model.trainable_variables:
        assert variable.dtype == "float32"
    keras.config.set_dtype_policy("float32")
    check_equal(run, Plain(given, 4), rtol=0, atol=0.02)
    # Not that nothing had happened.
    first = Run(given).values()[0]
    assert np.abs(first - run.values()[0]).max() > 0.02


def test_bfloat16_with_losses_of_several_dtypes(bfloat16):
    """Keras has those of activities in bfloat16 and of weights in float32."""

    def active():
        return keras.Sequential(
            [
                keras.Input((6,)),
                layers.Dense(
                    2, activity_regularizer="l2", kernel_regularizer="l2"
                ),
            ]
        )

    run = Run(task(active, lambda: SGD(0.1)), replicas=2).train(2)
    assert run.steps.take_bad_step() is None
    assert np.isfinite(run.values()[0]).all()


# Metrics.


@pytest.mark.parametrize(
    ("replicas", "gradient_accumulation_steps"), [(1, 1), (2, 2)]
)
def test_metrics_are_means_over_all_examples_since_they_were_taken(
    replicas, gradient_accumulation_steps
):
    given = task(
        dense,
        lambda: SGD(0.0),
        weight=WEIGHTED * np.arange(48, dtype=np.float32),
    )
    run = Run(
        given,
        replicas=replicas,
        gradient_accumulation_steps=gradient_accumulation_steps,
    )

    def expected(first, last):
        rows = slice(first * BATCH, last * BATCH)
        x, y, weight = (given.arrays[n][rows] for n in ("x", "y", "weight"))
        losses = np.square(run.model(x).numpy() - y).mean(axis=1)
        return {
            "error": pytest.approx(np.sqrt(losses).mean(), rel=1e-5),
            "loss": pytest.approx(np.average(losses, weights=weight), rel=1e-5),
        }

    run.train(4, per_call=2)
    assert run.steps.take_train_metrics() == expected(0, 4)
    run.train(2)
    assert run.steps.take_train_metrics() == expected(4, 6)
    assert all(map(np.isnan, run.steps.take_train_metrics().values()))
    run.steps.evaluate(run.iterator(given.eval_dataset), tf.constant(5))
    assert run.steps.take_eval_metrics() == expected(0, 5)
    assert all(map(np.isnan, run.steps.take_eval_metrics().values()))


def test_metrics_hold_no_penalty():
    run = Run(task(lambda: shifted(1e6), lambda: SGD(0.0)))
    run.model.layers[0].sparse_weights[0].state["shift"].assign_add(
        tf.ones((6, 8))
    )
    run.train(1)
    assert run.steps.take_train_metrics()["loss"] < 100


# Steps that went wrong.


@pytest.mark.parametrize(
    ("replicas", "gradient_accumulation_steps", "value"),
    [(1, 1, np.nan), (2, 1, np.inf), (1, 2, np.inf), (2, 2, np.nan)],
)
def test_the_step_whose_loss_is_not_finite_is_named(
    replicas, gradient_accumulation_steps, value
):
    arrays = examples()
    # Of the last replica's last micro-batch.
    arrays["y"][3 * BATCH - 1, 0] = value
    run = Run(
        task(**arrays),
        replicas=replicas,
        gradient_accumulation_steps=gradient_accumulation_steps,
    )
    run.train(2)
    assert run.steps.take_bad_step() is None
    assert run.steps.weights_are_finite()
    run.train(3, per_call=3)
    assert run.steps.take_bad_step() == 2
    assert not run.steps.weights_are_finite()
    # It is told once; now every step is bad.
    assert run.steps.take_bad_step() is None
    run.train(1)
    assert run.steps.take_bad_step() == 5


def test_a_sum_that_is_not_finite_is_named_whatever_it_weighs():
    arrays = examples()
    arrays["y"][2 * BATCH, 0] = np.inf
    weight = np.ones(6 * BATCH, np.float32)
    weight[2 * BATCH : 3 * BATCH] = 0
    run = Run(task(weight=weight, **arrays)).train(2)
    assert run.steps.take_bad_step() is None
    run.train(1)
    assert run.steps.take_bad_step() == 2


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_penalty_that_is_not_finite_is_named(replicas):
    class Growing(sos.Ramp):
        def __call__(self, step):
            return tf.where(step < 2, 1.0, np.inf)

        def get_config(self):
            return {}

    def model():
        return keras.Sequential(
            [
                keras.Input((6,)),
                techniques.Shift(
                    layers.Dense(2), penalty_weight=1, ramp=Growing()
                ),
            ]
        )

    run = Run(task(model, lambda: SGD(0.1)), replicas=replicas)
    run.model.layers[0].sparse_weights[0].state["shift"].assign_add(
        tf.ones((6, 2))
    )
    run.train(4, per_call=4)
    assert run.steps.take_bad_step() == 2


@pytest.mark.parametrize("replicas", [1, 2])
def test_an_activity_loss_that_is_not_finite_is_named(replicas):
    """It differs between the replicas, as examples do."""

    class Root(keras.regularizers.Regularizer):
        def __call__(self, x):
            return tf.reduce_sum(tf.where(x > 50, np.inf, 0.0) + 0.0 * x)

    def model():
        return keras.Sequential(
            [keras.Input((6,)), layers.Dense(2, activity_regularizer=Root())]
        )

    arrays = examples()
    arrays["x"][3 * BATCH - 1] = 1e4
    arrays["weight"] = np.ones(6 * BATCH, np.float32)
    run = Run(task(model, lambda: SGD(0.1), **arrays), replicas=replicas)
    run.model.weights[0].assign(tf.ones((6, 2)))
    run.train(4, per_call=4)
    assert run.steps.take_bad_step() == 2


def test_weights_that_are_not_finite_are_seen():
    run = Run(task(), replicas=2)
    assert run.steps.weights_are_finite()
    bias = run.model.weights[-1]
    for value in (np.nan, np.inf, -np.inf):
        bias.assign([0, value])
        assert not run.steps.weights_are_finite()
    bias.assign([0, 1])
    assert run.steps.weights_are_finite()


# What is told of sparse weights.


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("name", techniques.NAMES)
def test_the_summary_is_the_reports(name, replicas):
    run = Run(task(lambda: techniques.mlp(name)), replicas=replicas).train(2)
    for variable in run.model.variables:
        if "log_" in variable.path:
            variable.assign_add(techniques.normal(*variable.shape, scale=20.0))
    zeros, penalties = run.steps.summary()
    expected = {
        row["weight"]: row["size"] - row["nonzeros"]
        for row in sos.sparsity_report(run.model).rows
        if row["technique"]
    }
    assert {p.removeprefix("toy/"): n for p, n in zeros.items()} == expected
    assert sum(expected.values()) > 0
    # No driver is bound, so that they are not known.
    assert penalties == {}


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("name", ["L0Regularization", "VariationalDropout"])
def test_penalties_are_told_while_a_driver_is_bound(name, replicas):
    run = Run(task(lambda: techniques.mlp(name)), replicas=replicas)

    def total():
        return sum(run.steps.summary()[1].values())

    # In any order, as an evaluation may come before, between and after.
    for _ in range(2):
        assert total() == 0
        with sos.Driver(run.model, run.optimizer):
            expected = float(sum(run.model.losses))
            assert expected > 0
            assert total() == pytest.approx(expected, rel=1e-5)
            assert not any(
                path.removeprefix("toy/") not in ("a/kernel", "b/kernel")
                for path in run.steps.summary()[1]
            )
    assert total() == 0


def test_a_dense_model_has_no_summary():
    assert Run(task()).steps.summary() == ({}, {})


def test_techniques_may_be_mixed():
    def mixed():
        return keras.Sequential(
            [
                keras.Input((6,)),
                techniques.wrap("FixedMask", layers.Dense(8, name="a")),
                techniques.wrap("L0Regularization", layers.Dense(4, name="b")),
                techniques.wrap("MagnitudePruning", layers.Dense(2, name="c")),
            ],
            name="toy",
        )

    run = Run(task(mixed)).train(1)
    with sos.Driver(run.model, run.optimizer):
        zeros, penalties = run.steps.summary()
    assert list(zeros.values()) == [24, 0, 4]
    (path,) = penalties
    assert path.endswith("b/kernel")


# Batch normalization.


@pytest.mark.parametrize("synchronized", [False, True])
def test_moving_statistics_of_two_replicas(synchronized):
    """Those of the first replica, as in Keras, or those of the whole batch."""

    def normalized():
        return keras.Sequential(
            [
                keras.Input((6,)),
                layers.BatchNormalization(
                    momentum=0.5, synchronized=synchronized
                ),
                layers.Dense(2),
            ]
        )

    given = task(normalized, lambda: SGD(0.1))
    run = Run(given, replicas=2).train(2)
    norm = run.model.layers[0]
    mean, variance = np.zeros(6), np.ones(6)
    for step in range(2):
        x = given.rows(step)["x"]
        x = x if synchronized else x[: BATCH // 2]
        mean = 0.5 * mean + 0.5 * x.mean(0)
        variance = 0.5 * variance + 0.5 * x.var(0)
    np.testing.assert_allclose(norm.moving_mean, mean, atol=1e-6)
    np.testing.assert_allclose(norm.moving_variance, variance, rtol=1e-5)
    # Evaluation uses those of the first replica everywhere.
    run.steps.share_statistics()
    for variable in norm.weights:
        first, second = variable.value.values
        np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(norm.moving_mean, mean, atol=1e-6)
    # With all statistics, replicas compute what one would.
    one = Run(given).train(2)
    difference = np.abs(one.model.weights[-2] - run.model.weights[-2]).max()
    assert (difference < 1e-5) == synchronized
