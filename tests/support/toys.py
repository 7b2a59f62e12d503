"""Small models, settings for every technique, and how to look at them."""

import keras
import numpy as np
import tensorflow as tf
from tensorboard.backend.event_processing import event_accumulator

import sos

SCHEDULE = sos.ConstantSparsity(0.5, begin_step=1, frequency=1)


def technique_names():
    """The package's own techniques; other tests register more."""
    return [
        name
        for name, technique in sos.techniques().items()
        if technique.__module__.startswith("sos.")
    ]


def settings(name):
    """The arguments that a technique cannot do without."""
    technique = sos.techniques()[name]
    if issubclass(technique, sos.PruningWrapper):
        return {"schedule": SCHEDULE}
    if issubclass(technique, sos.PenalizedWrapper):
        return {"penalty_weight": 1e-3}
    if technique is sos.FixedMask:
        return {"sparsity": 0.5}
    return {}


def wrap(name, layer, **overrides):
    return sos.techniques()[name](layer, **{**settings(name), **overrides})


def bind(layer, step=0):
    """Binds the clock of one wrapper to a new optimizer at a step."""
    optimizer = keras.optimizers.SGD()
    optimizer.iterations.assign(step)
    layer.clock.bind(optimizer)
    return optimizer


def normal(*shape, seed=0, scale=1.0):
    values = np.random.default_rng(seed).normal(scale=scale, size=shape)
    return values.astype(np.float32)


def state(wrapper, name):
    """The technique's variable of a wrapper's only weight."""
    (weight,) = wrapper.sparse_weights
    return weight.state[name]


def mlp(name, *, seed=0, **overrides):
    """Two sparse dense layers, 6 inputs and 2 outputs."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((6,)),
            wrap(
                name,
                keras.layers.Dense(8, activation="tanh", name="a"),
                **overrides,
            ),
            wrap(name, keras.layers.Dense(2, name="b"), **overrides),
        ],
        # Random numbers depend on the paths of weights.
        name="toy",
    )


def batch(size=8, seed=1):
    return normal(size, 6, seed=seed), normal(size, 2, seed=seed + 1)


def sparse_state(model):
    """The variables of a model's techniques, as arrays by weight path."""
    return {
        f"{weight.path}:{name}": keras.ops.convert_to_numpy(variable)
        for wrapper in sos.wrappers.base.find_wrappers(model)
        for weight in wrapper.sparse_weights
        for name, variable in weight.state.items()
    }


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


class Recorder(sos.PerTensorRanking):
    """Ranks as usual, and notes the sparsities that it is asked for."""

    def __init__(self):
        self.log = []

    def get_config(self):
        return {}

    def masks(self, scores, sparsities):
        self.log.append(list(sparsities))
        return super().masks(scores, sparsities)


class Staircase(sos.Schedule):
    """The sparsity t / 1000 at step t, so that a record shows the steps."""

    def __init__(self, begin=0, end=999, frequency=1):
        super().__init__(
            sos.PolynomialDecay(
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


class Shift(sos.PenalizedWrapper):
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
