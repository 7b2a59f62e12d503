"""Small models, arguments for every technique, and how to look at them.

The tests walk the registry: a technique of the package is tested without being
named, if `HYPERPARAMETERS` holds what it needs.
"""

import keras
import numpy as np
import tensorflow as tf
from tensorboard.backend.event_processing import event_accumulator

import sos
from sos import keras_compat
from sos.wrappers.base import find_wrappers
from sos.wrappers.sparse_layer import as_plain

SCHEDULE = sos.schedules.ConstantSparsity(0.5, begin_step=1, frequency=1)

# With these, techniques prune from the first step on.
HYPERPARAMETERS = {
    "schedule": "constant",
    "sparsity": 0.5,
    "frequency": 1,
    "penalty_weight": 1e-3,
}

# The package's own techniques; other tests register more.
TECHNIQUES = [
    technique
    for technique in sos.extend.techniques().values()
    if technique.__module__.startswith("sos.")
]
NAMES = [technique.__name__ for technique in TECHNIQUES]


def arguments(technique, **overrides):
    """Arguments of a technique, for its constructor or `sos.sparsify`.

    Args:
        technique: The class or its name; None for a dense model.
        **overrides: Arguments that differ from `HYPERPARAMETERS`.
    """
    selected = sos.extend.select_hyperparameters(technique, HYPERPARAMETERS)
    if technique is None:
        return selected
    technique = sos.extend.techniques().get(technique, technique)
    return technique.resolve_hyperparameters(overrides, selected)


def wrap(technique, layer, **overrides):
    """A layer under a technique, which is a class or its name."""
    technique = sos.extend.techniques().get(technique, technique)
    return technique(layer, **arguments(technique, **overrides))


def bind(layer, step=0):
    """Binds one wrapper's step counter to a new optimizer at a step."""
    optimizer = keras.optimizers.SGD()
    optimizer.iterations.assign(step)
    layer.step_counter.bind(optimizer)
    return optimizer


def normal(*shape, seed=0, scale=1.0):
    values = np.random.default_rng(seed).normal(scale=scale, size=shape)
    return values.astype(np.float32)


def state(wrapper, name):
    """The technique's variable of a wrapper's only weight."""
    (weight,) = wrapper.sparse_weights
    return weight.state[name]


def mlp(technique, *, seed=0, **overrides):
    """Two sparse dense layers, 6 inputs and 2 outputs."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((6,)),
            wrap(
                technique,
                keras.layers.Dense(8, activation="tanh", name="a"),
                **overrides,
            ),
            wrap(technique, keras.layers.Dense(2, name="b"), **overrides),
        ],
        # Random numbers depend on the paths of weights.
        name="toy",
    )


def dense_mlp(*, seed=0):
    """The network of `mlp`, dense."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, activation="tanh", name="a"),
            keras.layers.Dense(2, name="b"),
        ],
        name="toy",
    )


def batch(size=8, seed=1):
    return normal(size, 6, seed=seed), normal(size, 2, seed=seed + 1)


def sparse_state(model):
    """The variables of a model's techniques, as arrays by weight path."""
    return {
        f"{weight.path}:{name}": keras.ops.convert_to_numpy(variable)
        for wrapper in find_wrappers(model)
        for weight in wrapper.sparse_weights
        for name, variable in weight.state.items()
    }


def values(layer):
    """All values of a layer or model, copied."""
    return [keras.ops.convert_to_numpy(v).copy() for v in layer.variables]


def make_zeros(model, seed=0):
    """Gives all techniques zeros in evaluation, as training would."""
    generator = np.random.default_rng(seed)
    for wrapper in find_wrappers(model):
        if isinstance(wrapper, sos.extend.MaskedWrapper):
            wrapper.set_masks(
                [
                    generator.random(weight.variable.shape) < 0.5
                    for weight in wrapper.sparse_weights
                ]
            )
            continue
        for weight in wrapper.sparse_weights:
            for variable in weight.state.values():
                variable.assign(generator.normal(-2, 3, variable.shape))


def assign_evaluation_weights(wrapper, plain):
    """Sets a plain layer to what a wrapper, also a nested one, evaluates."""
    layer = wrapper
    while isinstance(layer, sos.extend.SparseWrapper):
        layer = layer.layer
    position = {id(v): i for i, v in enumerate(layer.variables)}
    for old, new in zip(layer.variables, plain.variables, strict=True):
        new.assign(old)
    while isinstance(wrapper, sos.extend.SparseWrapper):
        for weight, value in wrapper.evaluation_weights().items():
            plain.variables[position[id(weight.variable)]].assign(value)
        wrapper = wrapper.layer


def two_replicas():
    """A strategy for the two devices that conftest.py makes of the CPU."""
    return tf.distribute.MirroredStrategy(
        ["CPU:0", "CPU:1"],
        # The default's collectives fail when a process has several strategies.
        cross_device_ops=tf.distribute.ReductionToOneDevice(),
    )


def train_step(model, optimizer, loss_fn=None, jit_compile=False):
    """A compiled custom training step with the model's penalties."""
    loss_fn = loss_fn or keras.losses.MeanSquaredError()

    @tf.function(jit_compile=jit_compile)
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = loss_fn(y, model(x, training=True))
            loss += sum(model.losses, 0.0)
        variables = model.trainable_variables
        gradients = tape.gradient(loss, variables)
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return loss

    return step


def train(model, inputs, *, steps=1, optimizer=None, call=None, traced=False):
    """Trains with a custom loop and returns the losses.

    The loss pulls all outputs of a model or layer to one. A trace takes ten
    times the time of an eager step.
    """
    optimizer = optimizer or keras.optimizers.SGD(0.01)
    optimizer.build(model.trainable_variables)
    call = call or (lambda training: model(inputs, training=training))

    def train_step():
        with tf.GradientTape() as tape:
            outputs = keras.tree.flatten(call(True))
            loss = tf.add_n(
                [tf.reduce_mean(tf.square(y - 1.0)) for y in outputs]
            )
            loss += sum(model.losses)
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(loss, variables), variables)
        return loss

    if traced:
        train_step = tf.function(train_step)
    losses = []
    with sos.SparsityUpdater(model, optimizer) as updater:
        for _ in range(steps):
            losses.append(float(train_step()))
            updater.step()
    return losses


class Recorder(sos.extend.PerTensorRanking):
    """Ranks as usual, and notes the sparsities that it is asked for."""

    def __init__(self):
        self.log = []

    def get_config(self):
        return {}

    def masks(self, scores, sparsities):
        self.log.append(list(sparsities))
        return super().masks(scores, sparsities)


class Staircase(sos.schedules.Schedule):
    """The sparsity t / 1000 at step t, so that a record shows the steps."""

    def __init__(self, begin=0, end=999, frequency=1):
        super().__init__(
            sos.schedules.PolynomialDecay(
                begin / 1000,
                end / 1000,
                begin,
                end,
                power=1,
                frequency=frequency,
            )
        )


def recorded(log):
    """The steps of which a record of a `Staircase` speaks."""
    return [round(sparsities[0] * 1000) for sparsities in log]


class Shift(sos.extend.PenalizedWrapper):
    """Only the penalty moves its state: by -rate * factor a step.

    The penalty is the sum of `shift`, whose gradient is 1, so that what SGD
    does to it tells how often and how strongly the penalty was applied.
    """

    def build_weight(self, weight):
        self.add_penalized_state(weight, "shift", initializer="zeros")

    def training_weight(self, weight):
        return weight.value

    def penalty(self, weight):
        return tf.reduce_sum(weight.state["shift"].value)


def shift_of(wrapper):
    """The common value of a `Shift` wrapper's states."""
    values = [np.ravel(w.state["shift"]) for w in wrapper.sparse_weights]
    value = values[0][0]
    assert all((v == value).all() for v in values)
    return float(value)


def scalars(directory):
    """What TensorBoard reads, as {tag: [(step, value), ...]}."""
    events = event_accumulator.EventAccumulator(str(directory))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def call_plain(layer, *args, **kwargs):
    """Calls a layer in a wrapper as its own class does, with dense weights."""
    with as_plain(keras_compat.all_layers(layer)):
        return layer(*args, **kwargs)
