"""Small models, a clock to set by hand, and settings for every technique."""

import keras
import numpy as np
import tensorflow as tf

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
        ]
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
