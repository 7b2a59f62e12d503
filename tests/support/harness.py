"""What the tests of all techniques share.

The tests walk the registry: a technique of the package is tested without being
named here, if it can do with the arguments of `settings`.
"""

import inspect

import keras
import numpy as np
import tensorflow as tf

import sos

TECHNIQUES = list(sos.techniques().values())


def settings(technique, sparsity=0.5):
    """Arguments with which a technique prunes from the first step on."""
    if issubclass(technique, sos.PruningWrapper):
        schedule = sos.ConstantSparsity(sparsity, begin_step=0, frequency=1)
        return {"schedule": schedule}
    if issubclass(technique, sos.PenalizedWrapper):
        return {"penalty_weight": 1e-3}
    takes_sparsity = "sparsity" in inspect.signature(technique).parameters
    return {"sparsity": sparsity} if takes_sparsity else {}


def wrap(technique, layer, **kwargs):
    """The layer under the technique."""
    return technique(layer, **{**settings(technique), **kwargs})


def wrappers(model):
    """The sparse wrappers of a model, in any order."""
    return [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, sos.SparseWrapper)
    ]


def make_zeros(model, seed=0):
    """Gives all techniques zeros in evaluation, as training would."""
    generator = np.random.default_rng(seed)
    for wrapper in wrappers(model):
        if isinstance(wrapper, sos.MaskedWrapper):
            wrapper.set_masks(
                [
                    generator.random(weight.variable.shape) < 0.5
                    for weight in wrapper.sparse_weights
                ]
            )
            continue
        for weight in wrapper.sparse_weights:
            for state in weight.state.values():
                state.assign(generator.normal(-2, 3, state.shape))


def train(model, inputs, *, steps=1, optimizer=None, call=None):
    """Trains with a custom loop and returns the losses.

    The loss pulls all outputs of a model or layer to one.
    """
    optimizer = optimizer or keras.optimizers.SGD(0.01)
    optimizer.build(model.trainable_variables)
    call = call or (lambda training: model(inputs, training=training))

    @tf.function
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

    losses = []
    with sos.Driver(model, optimizer) as driver:
        for _ in range(steps):
            losses.append(float(train_step()))
            driver.step()
    return losses


def values(layer):
    """All values of a layer or model, copied."""
    return [keras.ops.convert_to_numpy(v).copy() for v in layer.variables]


def assign_evaluation_weights(wrapper, plain):
    """Sets a plain layer to what a wrapper, also a nested one, evaluates."""
    layer = wrapper
    while isinstance(layer, sos.SparseWrapper):
        layer = layer.layer
    position = {id(v): i for i, v in enumerate(layer.variables)}
    for old, new in zip(layer.variables, plain.variables, strict=True):
        new.assign(old)
    while isinstance(wrapper, sos.SparseWrapper):
        for weight, value in wrapper.evaluation_weights().items():
            plain.variables[position[id(weight.variable)]].assign(value)
        wrapper = wrapper.layer
