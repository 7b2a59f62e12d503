import contextlib
import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import sos
from sos.errors import TaskError, UsageError
from sos.training.steps import CompiledMaskUpdate, Steps, Totals
from sos.wrappers.base import find_wrappers
from sos.wrappers.masked import update_masks
from tests.support import techniques
from tests.support.toy_task import OrderedTask

BATCH = 8
# Replicas and parts into which a batch is cut: not at all, and in both ways.
CUTS = pytest.mark.parametrize(
    ("replicas", "gradient_accumulation_steps"), [(1, 1), (2, 2)]
)
SGD = keras.optimizers.SGD
# In every second step the second replica's examples, or the second half of the
# parts, have no weight at all.
WEIGHTED = np.tile(
    [[1, 0.5, 2, 0, 3, 1, 0, 0.25], [1, 2, 0.5, 1, 0, 0, 0, 0]], (3, 1)
)
WEIGHTED = WEIGHTED.reshape(-1).astype(np.float32)


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
        schedule=sos.schedules.ConstantSparsity(0.5, begin_step=2, frequency=2),
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


def combined():
    """A layer with a mask, and one with a penalty."""
    schedule = sos.schedules.ConstantSparsity(0.5, begin_step=2, frequency=2)
    return keras.Sequential(
        [
            keras.Input((6,)),
            techniques.wrap(
                "MagnitudePruning",
                layers.Dense(8, activation="tanh", name="a"),
                schedule=schedule,
            ),
            techniques.Shift(layers.Dense(2, name="b"), penalty_weight=0.25),
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
    return OrderedTask(
        make_model,
        make_optimizer or (lambda: keras.optimizers.Adam(0.05)),
        {**examples(), **arrays},
        batch_size=BATCH,
    )


class Run:
    """Trains a task step by step with the compiled functions alone."""

    def __init__(
        self,
        task,
        *,
        replicas=1,
        gradient_accumulation_steps=1,
        start=0,
        jit_compile=None,
    ):
        self.task = task
        #: Of the last call of `train`.
        self.totals = None
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
                jit_compile=jit_compile,
            )

    def train(self, steps, per_call=1):
        parts = []
        with driving(self.model, self.optimizer) as updater:
            iterator = self.iterator(self.task.train_dataset)
            for _ in range(0, steps, per_call):
                parts.append(self.steps.train(iterator, per_call))
                if updater is not None:
                    updater.step()
        self.totals = Totals.concatenate(parts)
        return self

    def evaluate(self, batches):
        iterator = self.iterator(self.task.eval_dataset)
        return self.steps.evaluate(iterator, batches)

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
    with sos.SparsityUpdater(model, optimizer) as updater:
        yield updater


class Plain:
    """What it should compute: one tape over the whole batch, and Keras."""

    def __init__(self, task, steps):
        self.model = task.build_model()
        self.optimizer = task.build_optimizer(self.model)
        self.optimizer.build(self.model.trainable_variables)
        variables = self.model.trainable_variables
        with driving(self.model, self.optimizer) as updater:
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
                if updater is not None:
                    updater.step()

    values = Run.values


def check_equal(run, expected, **tolerance):
    tolerance = {"rtol": 2e-5, "atol": 2e-6, **tolerance}
    for a, b in zip(run.values(), expected.values(), strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


# One step.


def test_train_of_a_linear_model_equals_the_formulas():
    """A linear model with momentum, by hand."""

    def linear():
        return keras.Sequential(
            [keras.Input((6,)), layers.Dense(2, use_bias=False)]
        )

    ordered = task(linear, lambda: SGD(0.1, momentum=0.9), weight=WEIGHTED)
    run = Run(ordered)
    kernel = run.model.weights[0].numpy().astype(np.float64)
    run.train(3)
    velocity = 0
    for step in range(3):
        rows = ordered.rows(step)
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


class Gathering(sos.extend.PruningWrapper):
    """A technique that ranks by gradients."""

    uses_gradient = True

    def scores(self, weight):
        return tf.abs(weight.state["gradient"].value)


@CUTS
def test_train_gathers_gradients_of_sums_over_all_examples(
    replicas, gradient_accumulation_steps
):
    """However the batch is cut: a linear model that stands still, by hand."""

    def linear():
        layer = layers.Dense(2, use_bias=False)
        schedule = sos.schedules.ConstantSparsity(
            0.5, begin_step=5, frequency=5
        )
        return keras.Sequential(
            [keras.Input((6,)), Gathering(layer, schedule=schedule)]
        )

    ordered = task(linear, lambda: SGD(0.0), weight=WEIGHTED)
    run = Run(
        ordered,
        replicas=replicas,
        gradient_accumulation_steps=gradient_accumulation_steps,
    ).train(3)
    (sparse,) = run.model.layers[0].sparse_weights
    x, y, weight = (
        ordered.arrays[name][: 3 * BATCH] for name in ("x", "y", "weight")
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


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_train_with_any_optimizer_equals_a_plain_loop(optimizer):
    ordered = task(combined, OPTIMIZERS[optimizer], weight=WEIGHTED)
    check_equal(Run(ordered).train(5), Plain(ordered, 5))


@pytest.mark.parametrize(
    ("replicas", "gradient_accumulation_steps"), [(2, 1), (1, 4), (2, 2)]
)
def test_train_with_the_batch_cut_equals_a_plain_loop(
    replicas, gradient_accumulation_steps
):
    ordered = task(combined, lambda: SGD(0.1, momentum=0.9), weight=WEIGHTED)
    run = Run(
        ordered,
        replicas=replicas,
        gradient_accumulation_steps=gradient_accumulation_steps,
    )
    check_equal(run.train(5), Plain(ordered, 5))


@CUTS
def test_train_on_a_batch_without_weight_changes_nothing(
    replicas, gradient_accumulation_steps
):
    weight = np.ones(6 * BATCH, np.float32)
    weight[BATCH : 2 * BATCH] = 0
    ordered = task(dense, lambda: SGD(0.1), weight=weight)
    run = Run(
        ordered,
        replicas=replicas,
        gradient_accumulation_steps=gradient_accumulation_steps,
    )
    after = [run.train(1).values() for _ in range(2)]
    assert run.totals.first_non_finite() is None
    assert np.isnan(run.totals.means()["loss"])
    for first, second in zip(*after, strict=True):
        if first.ndim:
            np.testing.assert_array_equal(first, second)
    assert all(np.isfinite(value).all() for value in run.train(1).values())
    assert run.totals.first_non_finite() is None
    assert np.isfinite(run.totals.means()["loss"])


@CUTS
def test_train_of_embeddings_equals_a_plain_loop(
    replicas, gradient_accumulation_steps
):
    ids = np.random.default_rng(3).integers(10, size=(6 * BATCH, 3))
    ordered = task(
        embedded,
        lambda: keras.optimizers.Adam(0.1, epsilon=1e-3),
        x=ids.astype(np.int32),
        weight=WEIGHTED,
    )
    run = Run(
        ordered,
        replicas=replicas,
        gradient_accumulation_steps=gradient_accumulation_steps,
    )
    check_equal(run.train(4), Plain(ordered, 4))


def test_train_on_batches_of_any_structure_equals_a_plain_loop():
    class Nested(OrderedTask):
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

    ordered = Nested(dense, lambda: SGD(0.1), examples(), batch_size=BATCH)
    check_equal(
        Run(ordered, replicas=2, gradient_accumulation_steps=2).train(2),
        Plain(ordered, 2),
    )


def test_train_of_another_number_of_steps_traces_nothing_new():
    run = Run(task()).train(1)
    for count in (2, 3):
        run.train(count, per_call=count)
        assert run.totals.sums.shape == (count, 2, 2)
        assert run.totals.penalties.shape == (count,)
    assert run.steps.train_function.experimental_get_tracing_count() == 1
    assert run.step == 6


# Penalties.


@CUTS
def test_train_counts_penalties_once(replicas, gradient_accumulation_steps):
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


@CUTS
def test_train_counts_activity_losses_once(
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

    ordered = task(active, lambda: SGD(0.5))
    run = Run(
        ordered,
        replicas=replicas,
        gradient_accumulation_steps=gradient_accumulation_steps,
    )
    check_equal(run.train(3), Plain(ordered, 3))


# Noise.


def noisy(name, **settings):
    """A task with equal examples, so that outputs differ by noise alone."""

    def one_layer():
        technique = sos.extend.techniques()[name]
        layer = technique(
            layers.Dense(5, name="a"), penalty_weight=1e-3, **settings
        )
        return keras.Sequential([keras.Input((6,)), layer], name="toy")

    x = np.tile(techniques.normal(1, 6, seed=4), (6 * BATCH, 1))
    ordered = OrderedTask(
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
    ordered.calls = []
    return ordered


ACTIVATION_NOISE = ("VariationalDropout", {"initial_log_sigma2": -2.0})
WEIGHT_NOISE = ("L0Regularization", {"initial_log_alpha": 0.0})


def outputs_at(noise, *, steps=2, start=0, **cut):
    """Outputs by step, replica and first example of the batch."""
    name, settings = noise
    ordered = noisy(name, **settings)
    Run(ordered, start=start, **cut).train(steps)
    return {
        (call["step"], call["replica"], int(call["number"][0]) % BATCH): call[
            "outputs"
        ]
        for call in ordered.calls
    }


def differ(outputs):
    """Whether all are different; of the same shape, they would be equal."""
    values = [np.asarray(value).tobytes() for value in outputs]
    return len(set(values)) == len(values)


@pytest.mark.parametrize("noise", [ACTIVATION_NOISE, WEIGHT_NOISE], ids=str)
def test_noise_differs_between_replicas_and_steps(noise):
    by_part = outputs_at(noise, replicas=2, steps=3)
    assert sorted(by_part) == [
        (s, r, 4 * r) for s in range(3) for r in range(2)
    ]
    assert differ(by_part.values())
    # The same in a training that begins later.
    late = outputs_at(noise, replicas=2, steps=1, start=2)
    assert sorted(late) == [key for key in sorted(by_part) if key[0] > 1]
    for key, value in late.items():
        np.testing.assert_array_equal(value, by_part[key])


def test_activation_noise_differs_between_parts():
    by_part = outputs_at(
        ACTIVATION_NOISE, replicas=2, gradient_accumulation_steps=2
    )
    assert sorted(by_part) == [
        (s, r, 4 * r + 2 * i)
        for s in range(2)
        for r in range(2)
        for i in range(2)
    ]
    assert differ(by_part.values())


def test_weight_noise_is_one_sample_for_a_step():
    by_part = outputs_at(WEIGHT_NOISE, gradient_accumulation_steps=4)
    whole = outputs_at(WEIGHT_NOISE)
    assert len(by_part) == 8
    for (step, replica, _), outputs in by_part.items():
        expected = whole[step, replica, 0][:2]
        np.testing.assert_allclose(outputs, expected, rtol=1e-6)
    assert differ(whole.values())


def test_dropout_differs_between_parts():
    def dropping():
        return keras.Sequential(
            [keras.Input((6,)), layers.Dropout(0.5, seed=1), layers.Dense(2)]
        )

    x = np.ones((6 * BATCH, 6), np.float32)
    ordered = task(dropping, lambda: SGD(0.0), x=x)
    ordered.calls = []
    Run(ordered, gradient_accumulation_steps=4).train(2)
    assert len(ordered.calls) == 8
    assert differ(call["outputs"] for call in ordered.calls)


# Clipping.


CLIPPING = {
    "norm": {"clipnorm": 0.05},
    "global_norm": {"global_clipnorm": 0.05},
    "none_is_reached": {"global_clipnorm": 1e3},
}


@pytest.mark.parametrize("name", CLIPPING)
@pytest.mark.parametrize(("replicas", "gradient_accumulation_steps"), [(2, 2)])
def test_clipping_applies_to_the_gradient_of_the_whole_batch(
    name, replicas, gradient_accumulation_steps
):
    ordered = task(shifted, lambda: SGD(1.0, **CLIPPING[name]), weight=WEIGHTED)
    run = Run(
        ordered,
        replicas=replicas,
        gradient_accumulation_steps=gradient_accumulation_steps,
    )
    check_equal(run.train(3), Plain(ordered, 3))
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

    ordered = task(partly, lambda: SGD(1.0, clipnorm=0.05))
    run = Run(ordered, replicas=2, gradient_accumulation_steps=2).train(2)
    check_equal(run, Plain(ordered, 2))
    np.testing.assert_array_equal(run.model.weights[0], [1, 1])


# Invalid optimizers, batches and models.


@pytest.mark.parametrize(
    ("make_optimizer", "message"),
    [
        (
            lambda: SGD(use_ema=True),
            "`ema_overwrite_frequency`.*Received: use_ema=True",
        ),
        (
            lambda: SGD(gradient_accumulation_steps=2),
            "Received: gradient_accumulation_steps=2",
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
def test_steps_with_optimizers_that_do_the_engines_work_raise(
    make_optimizer, message
):
    with pytest.raises(UsageError, match=message):
        Run(task(make_optimizer=make_optimizer))


@pytest.mark.parametrize(
    ("replicas", "gradient_accumulation_steps"),
    [(1, 0), (1, 3), (1, 16), (2, 3), (2, 8)],
)
def test_steps_with_batches_that_cannot_be_cut_raise(
    replicas, gradient_accumulation_steps
):
    with pytest.raises(UsageError) as error:
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


# Mixed precision.


def test_steps_with_float16_raise():
    def half():
        return keras.Sequential(
            [
                keras.Input((6,)),
                layers.Dense(3),
                layers.Dense(2, dtype="mixed_float16"),
            ]
        )

    with pytest.raises(UsageError, match="bfloat16.*float16"):
        Run(task(half))


@pytest.fixture
def bfloat16():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    yield
    keras.config.set_dtype_policy(before)


def test_train_in_bfloat16_is_near_float32(bfloat16):
    ordered = task(combined, lambda: SGD(0.1, clipnorm=1.0), weight=WEIGHTED)
    run = Run(ordered, replicas=2, gradient_accumulation_steps=2).train(4)
    assert run.model(ordered.rows(0)["x"]).dtype == "bfloat16"
    for variable in run.model.trainable_variables:
        assert variable.dtype == "float32"
    keras.config.set_dtype_policy("float32")
    check_equal(run, Plain(ordered, 4), rtol=0, atol=0.02)
    # Not that nothing had happened.
    first = Run(ordered).values()[0]
    assert np.abs(first - run.values()[0]).max() > 0.02


def test_train_in_bfloat16_with_losses_of_several_dtypes_is_finite(bfloat16):
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
    assert run.totals.first_non_finite() is None
    assert np.isfinite(run.values()[0]).all()


# Metrics.


def test_totals_means_are_weighted_and_nan_without_weight():
    sums = np.float32([[[2, 4], [1, 0]], [[1, 2], [3, 0]]])
    totals = Totals(("loss", "other"), sums, np.zeros(2, np.float32))
    means = totals.means()
    assert means["loss"] == 0.5
    assert np.isnan(means["other"])
    both = Totals.concatenate([totals, totals])
    assert both.sums.shape == (4, 2, 2)
    assert both.means()["loss"] == 0.5


@pytest.mark.parametrize(
    ("row", "penalty"),
    [
        ((np.nan, 1), 0),
        ((np.inf, 1), 0),
        ((1, np.nan), 0),
        ((1, np.inf), 0),
        # Without any weight, too.
        ((-np.inf, 0), 0),
        ((1, 1), np.inf),
        # The mean is too large.
        ((1e30, 1e-20), 0),
    ],
)
def test_totals_first_non_finite_is_the_first_step(row, penalty):
    sums = np.ones((4, 2, 2), np.float32)
    sums[1] = 0
    sums[2:, 1] = row
    penalties = np.zeros(4, np.float32)
    penalties[2:] = penalty
    # Other metrics may be anything.
    sums[0, 0] = np.nan
    names = ("error", "loss")
    assert Totals(names, sums, penalties).first_non_finite() == 2
    assert Totals(names, sums[:2], penalties[:2]).first_non_finite() is None


class OtherMetrics(OrderedTask):
    """Has another metric in evaluation."""

    def compute_metrics(self, model, batch, training):
        metrics = super().compute_metrics(model, batch, training)
        return metrics if training else {**metrics, "count": metrics["error"]}


class VaryingMetrics(OrderedTask):
    """Has another metric in each call."""

    counter = 0

    def compute_metrics(self, model, batch, training):
        self.counter += 1
        metrics = super().compute_metrics(model, batch, training)
        return {**metrics, f"metric_{self.counter}": metrics["error"]}


def test_evaluate_with_other_metrics_returns_them():
    run = Run(OtherMetrics(dense, lambda: SGD(0.1), examples(), batch_size=8))
    assert set(run.train(1).totals.means()) == {"error", "loss"}
    assert run.evaluate(2).names == ("count", "error", "loss")
    means = run.evaluate(2).means()
    assert means["count"] == means["error"]


@CUTS
def test_metrics_of_any_cut_are_means_over_all_examples(
    replicas, gradient_accumulation_steps
):
    ordered = task(
        dense,
        lambda: SGD(0.0),
        weight=WEIGHTED * np.arange(48, dtype=np.float32),
    )
    run = Run(
        ordered,
        replicas=replicas,
        gradient_accumulation_steps=gradient_accumulation_steps,
    )

    def expected(first, last):
        rows = slice(first * BATCH, last * BATCH)
        x, y, weight = (ordered.arrays[n][rows] for n in ("x", "y", "weight"))
        losses = np.square(run.model(x).numpy() - y).mean(axis=1)
        return {
            "error": pytest.approx(np.sqrt(losses).mean(), rel=1e-5),
            "loss": pytest.approx(np.average(losses, weights=weight), rel=1e-5),
        }

    assert run.train(4, per_call=2).totals.means() == expected(0, 4)
    assert run.train(2).totals.means() == expected(4, 6)
    assert run.evaluate(5).means() == expected(0, 5)
    assert run.evaluate(5).names == ("error", "loss")


def test_metrics_that_vary_between_parts_raise():
    varying = VaryingMetrics(
        dense, lambda: SGD(0.1), examples(), batch_size=BATCH
    )
    with pytest.raises(TaskError, match=r"\['error', 'loss', 'metric_1'\]"):
        Run(varying, gradient_accumulation_steps=2).train(1)


def test_metrics_with_a_large_penalty_leave_it_out():
    run = Run(task(lambda: shifted(1e6), lambda: SGD(0.0)))
    run.model.layers[0].sparse_weights[0].state["shift"].assign_add(
        tf.ones((6, 8))
    )
    run.train(1)
    assert run.totals.means()["loss"] < 100


# Steps that went wrong.


@pytest.mark.parametrize(
    ("replicas", "gradient_accumulation_steps", "value"),
    [(1, 1, np.nan), (2, 2, np.inf)],
)
def test_first_non_finite_of_a_loss_is_its_step(
    replicas, gradient_accumulation_steps, value
):
    arrays = examples()
    # Of the last replica's last part.
    arrays["y"][3 * BATCH - 1, 0] = value
    run = Run(
        task(**arrays),
        replicas=replicas,
        gradient_accumulation_steps=gradient_accumulation_steps,
    )
    run.train(2)
    assert run.totals.first_non_finite() is None
    assert run.steps.weights_are_finite()
    run.train(3, per_call=3)
    assert run.totals.first_non_finite() == 0
    assert not run.steps.weights_are_finite()


def test_first_non_finite_of_a_sum_without_weight_is_its_step():
    arrays = examples()
    arrays["y"][2 * BATCH, 0] = np.inf
    weight = np.ones(6 * BATCH, np.float32)
    weight[2 * BATCH : 3 * BATCH] = 0
    run = Run(task(weight=weight, **arrays)).train(3)
    assert run.totals.first_non_finite() == 2


@pytest.mark.parametrize("replicas", [1, 2])
def test_first_non_finite_of_a_penalty_is_its_step(replicas):
    class Growing(sos.ramps.Ramp):
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
    assert run.totals.first_non_finite() == 2


@pytest.mark.parametrize("replicas", [1, 2])
def test_first_non_finite_of_an_activity_loss_is_its_step(replicas):
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
    assert run.totals.first_non_finite() == 2


def test_weights_are_finite_of_any_other_number_is_false():
    run = Run(task(), replicas=2)
    assert run.steps.weights_are_finite()
    bias = run.model.weights[-1]
    for value in (np.nan, np.inf, -np.inf):
        bias.assign([0, value])
        assert not run.steps.weights_are_finite()
    bias.assign([0, 1])
    assert run.steps.weights_are_finite()


# Summaries of sparse weights.


def every_technique():
    """A layer of each technique of the registry, named after it."""
    return keras.Sequential(
        [
            keras.Input((6,)),
            *(
                techniques.wrap(name, layers.Dense(6, name=name.lower()))
                for name in techniques.NAMES
            ),
            layers.Dense(2, name="last"),
        ],
        name="toy",
    )


@pytest.mark.parametrize("replicas", [1, 2])
def test_summary_of_every_technique_equals_the_report(replicas):
    run = Run(task(every_technique), replicas=replicas)
    for variable in run.model.variables:
        if "log_" in variable.path:
            variable.assign_add(techniques.normal(*variable.shape, scale=20.0))
    # In any order, as an evaluation may come before, between and after.
    for _ in range(2):
        # Penalties are not known outside of training.
        zeros, penalties = run.steps.summary()
        assert penalties == {}
        with sos.SparsityUpdater(run.model, run.optimizer):
            expected = float(sum(run.model.losses))
            zeros, penalties = run.steps.summary()
            assert expected > 0
            assert sum(penalties.values()) == pytest.approx(expected, rel=1e-5)
        assert [path.removeprefix("toy/") for path in penalties] == [
            f"{name.lower()}/kernel"
            for name in techniques.NAMES
            if issubclass(
                sos.extend.techniques()[name], sos.extend.PenalizedWrapper
            )
        ]
    expected = {
        row["weight"]: row["size"] - row["nonzeros"]
        for row in sos.sparsity_report(run.model).rows
        if row["technique"]
    }
    assert {p.removeprefix("toy/"): n for p, n in zeros.items()} == expected
    assert all(expected.values())


def test_summary_of_a_dense_model_is_empty():
    assert Run(task()).steps.summary() == ({}, {})


# Batch normalization.


@pytest.mark.parametrize("synchronized", [False, True])
def test_moving_statistics_of_two_replicas_are_the_first_ones_or_synchronized(
    synchronized,
):
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

    ordered = task(normalized, lambda: SGD(0.1))
    run = Run(ordered, replicas=2).train(2)
    norm = run.model.layers[0]
    mean, variance = np.zeros(6), np.ones(6)
    for step in range(2):
        x = ordered.rows(step)["x"]
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
    one = Run(ordered).train(2)
    difference = np.abs(one.model.weights[-2] - run.model.weights[-2]).max()
    assert (difference < 1e-5) == synchronized


# XLA.


def gathering():
    """Layers whose masks, rankings and gradients change in training."""
    schedule = sos.schedules.ConstantSparsity(0.5, begin_step=2, frequency=2)
    return keras.Sequential(
        [
            keras.Input((6,)),
            Gathering(
                layers.Dense(8, activation="tanh", name="a"), schedule=schedule
            ),
            layers.BatchNormalization(name="norm"),
            techniques.Shift(layers.Dense(2, name="b"), penalty_weight=0.25),
        ],
        name="toy",
    )


def test_jit_compile_changes_rounding_only():
    ordered = task(gathering, lambda: SGD(0.1, momentum=0.9), weight=WEIGHTED)
    plain, compiled = (
        Run(
            ordered,
            jit_compile=jit_compile,
            gradient_accumulation_steps=2,
        ).train(5)
        for jit_compile in (False, True)
    )
    check_equal(compiled, plain)
    (wrapper, weight), *_ = compiled.steps.sparse_weights
    mask = weight.state["mask"].numpy()
    assert mask.mean() == 0.5
    np.testing.assert_allclose(
        compiled.totals.sums, plain.totals.sums, rtol=1e-4
    )
    np.testing.assert_allclose(
        compiled.evaluate(3).sums, plain.evaluate(3).sums, rtol=1e-4
    )


@pytest.mark.parametrize("noise", [ACTIVATION_NOISE, WEIGHT_NOISE], ids=str)
def test_jit_compile_draws_the_same_noise(noise):
    name, settings = noise
    ordered = noisy(name, **settings)
    ordered.calls = None
    plain, compiled = (
        Run(ordered, jit_compile=jit_compile).train(2).totals.means()
        for jit_compile in (False, True)
    )
    assert compiled == pytest.approx(plain, rel=1e-5)


def test_jit_compile_by_default_is_off_on_a_cpu():
    assert not Run(task()).steps.jit_compile
    assert Run(task(), jit_compile=True).steps.jit_compile


def test_jit_compile_with_several_replicas_raises():
    with pytest.raises(
        UsageError, match="--nojit_compile.*Received: .*2 replicas"
    ):
        Run(task(), replicas=2, jit_compile=True)
    assert not Run(task(), replicas=2).steps.jit_compile


class PrintingTask(OrderedTask):
    """Does on a device what XLA cannot compile."""

    def compute_metrics(self, model, batch, training):
        if training == self.prints_in_training:
            tf.print("step")
        return super().compute_metrics(model, batch, training)


@pytest.mark.parametrize("training", [True, False])
def test_jit_compile_of_an_unsupported_operation_raises(training):
    printing = PrintingTask(
        dense, lambda: SGD(0.1), examples(), batch_size=BATCH
    )
    printing.prints_in_training = training
    run = Run(printing, jit_compile=True)
    step = "training" if training else "evaluation"
    with pytest.raises(UsageError, match="--nojit_compile") as error:
        run.train(1)
        run.evaluate(1)
    assert f"{step} step: PrintV2" in str(error.value)
    assert "\n" not in str(error.value)


def test_jit_compile_leaves_errors_of_the_data_alone():
    class Failing(OrderedTask):
        def train_dataset(self, context, step):
            dataset = super().train_dataset(context, step)
            return dataset.map(
                lambda batch: {
                    **batch,
                    "x": tf.debugging.check_numerics(batch["x"], "mine"),
                }
            )

    arrays = examples()
    arrays["x"][0] = np.nan
    failing = Failing(dense, lambda: SGD(0.1), arrays, batch_size=BATCH)
    with pytest.raises(tf.errors.InvalidArgumentError, match="mine"):
        Run(failing, jit_compile=True).train(1)


# Mask updates on a TPU.


class Saliency(sos.extend.PruningWrapper):
    """What a user may write: ranks by gradients, which replicas gather."""

    uses_gradient = True

    def scores(self, weight):
        return tf.abs(weight.value * weight.state["gradient"].value)


class OneOfTwo(sos.extend.Ranking):
    """Keeps the higher of each two neighbours along the first axis."""

    def masks(self, scores, sparsities):
        masks = []
        for score in scores:
            pairs = tf.reshape(score, [-1, 2, score.shape[-1]])
            first = pairs[:, :1] >= pairs[:, 1:]
            both = tf.concat([first, ~first], axis=1)
            masks.append(tf.cast(tf.reshape(both, score.shape), tf.uint8))
        return masks


class Together(sos.extend.Ranking):
    """Ranks all weights in one order."""

    def masks(self, scores, sparsities):
        flat = tf.concat([tf.reshape(score, [-1]) for score in scores], 0)
        place = round(flat.shape[0] * (1 - sparsities[0])) - 1
        threshold = tf.sort(flat, direction="DESCENDING")[place]
        return [tf.cast(score >= threshold, tf.uint8) for score in scores]


PRUNING = [
    name
    for name in techniques.NAMES
    if issubclass(sos.extend.techniques()[name], sos.extend.PruningWrapper)
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
def test_mask_update_compiled_equals_the_host(name, scope):
    expected = techniques.mlp(name)
    with scope():
        model = techniques.mlp(name)
        compiled = CompiledMaskUpdate()
        for sparsity in (0.0, 0.3, 0.5, 0.9):
            old = np.concatenate([mask.ravel() for mask in masks(model)])
            changes = [
                update(dict.fromkeys(find_wrappers(net), sparsity))
                for update, net in ((compiled, model), (update_masks, expected))
            ]
            for mask, other in zip(masks(model), masks(expected), strict=True):
                np.testing.assert_array_equal(mask, other)
            new = np.concatenate([mask.ravel() for mask in masks(model)])
            assert changes[0] == changes[1]
            assert dataclasses.astuple(changes[0]) == (
                new.size,
                new.sum(),
                (old > new).sum(),
                (old < new).sum(),
            )
    assert 0 < np.mean(masks(model)[0]) < 0.2
    # One compilation serves all sparsities.
    (function,) = compiled._functions.values()
    assert function.experimental_get_tracing_count() == 1


def test_mask_update_of_other_rankings_passes_the_sparsity(scope):
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


def test_mask_update_of_nan_scores_raises_and_changes_nothing(scope):
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
    for mask, old in zip(masks(model), before, strict=True):
        np.testing.assert_array_equal(mask, old)


def test_mask_update_of_nothing_does_nothing():
    assert CompiledMaskUpdate()({}) is None
    assert update_masks({}) is None


# All that there may be in one model, with rankings of several weights.
MIXED = [
    *((name, {}) for name in PRUNING),
    ("MagnitudePruning", {"ranking": OneOfTwo()}),
    (Saliency, {}),
    ("MagnitudePruning", {"ranking": Together()}),
    ("MagnitudePruning", {}),
    ("MagnitudePruning", {"ranking": Together()}),
]


def mixed():
    keras.utils.set_random_seed(0)
    wrapped = []
    for i, (technique, arguments) in enumerate(MIXED):
        if isinstance(technique, str):
            technique = sos.extend.techniques()[technique]
        wrapped.append(
            technique(
                layers.Dense(6, name=f"layer_{i}"),
                schedule=sos.schedules.PolynomialDecay(
                    0.2, 0.8, 2, 9, frequency=2
                ),
                **arguments,
            )
        )
    return keras.Sequential([keras.Input((6,)), *wrapped], name="toy")


def test_mask_update_compiled_in_training_has_the_bits_of_the_host(scope):
    """With weights that move, and gradients of each replica's own examples."""

    def trained(make_update):
        with scope():
            strategy = tf.distribute.get_strategy()
            model = mixed()
            optimizer = keras.optimizers.SGD(0.1)
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

            history = []
            with sos.SparsityUpdater(
                model, optimizer, update_masks=make_update()
            ) as updater:
                for i in range(10):
                    step(tf.constant(i))
                    updater.step()
                    history.append(masks(model))
        return history, [keras.ops.convert_to_numpy(v) for v in model.variables]

    on_device, variables = trained(CompiledMaskUpdate)
    on_host, expected = trained(lambda: update_masks)
    for step_masks, other_masks in zip(on_device, on_host, strict=True):
        for one, other in zip(step_masks, other_masks, strict=True):
            np.testing.assert_array_equal(one, other)
    for one, other in zip(variables, expected, strict=True):
        assert one.tobytes() == other.tobytes()
    # Updates were made at 2, 4, 6, 8 and 9, of which the first is 20 %.
    zeros = [np.mean([m == 0 for m in each]) for each in on_device]
    assert zeros[0] == 0 < zeros[1] == zeros[2] < 1
    assert zeros[-1] > zeros[1]


def test_mask_update_of_some_layers_leaves_the_others(scope):
    with scope():
        model = techniques.mlp("RandomPruning")
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
