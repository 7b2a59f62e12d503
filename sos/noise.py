"""Stateless noise: every random number is a function of a key.

A key is derived from the run's seed, the weight, the optimizer step and the
replica. Within one step the same key gives the same numbers, however often the
layer is called, so that a forward pass that is computed again in the backward
pass (rematerialisation) sees the noise that it saw the first time. A stateful
generator would draw new numbers there and give wrong gradients in silence, and
would give every replica the same stream.
"""

import contextlib
import hashlib
import math
import threading
from collections.abc import Iterator

import tensorflow as tf

#: The generator of all random bits. It is named because the default differs
#: between devices, and between compiled and other code on one device.
ALGORITHM = "philox"

_scope = threading.local()


@contextlib.contextmanager
def noise_scope(label: str) -> Iterator[None]:
    """Gives the calls made inside the scope activation noise of their own.

    Without a label, several calls of one shared layer in one step draw the same
    noise for equal shapes: one draw per step, as if a weight had been sampled.
    Labels make them independent, as the uses of a shared embedding are in Gale
    et al. 2019.

    Open the scope in the code that is traced and runs on the replicas, such as
    the `call` of a model: around a compiled function it has no effect. A label
    must be the same when a call is computed again in the backward pass: where a
    function is rematerialised, open the scope inside that function.

    Args:
        label: Any text that names the call within the step.

    Yields:
        Nothing.
    """
    outer = current_noise_scope()
    _scope.label = f"{outer}/{label}"
    try:
        yield
    finally:
        _scope.label = outer


def current_noise_scope() -> str:
    """The labels of the open `noise_scope` scopes, joined."""
    return getattr(_scope, "label", "")


@contextlib.contextmanager
def posterior_sample(seed: int | tf.Tensor) -> Iterator[None]:
    """Draws noise by the number of a sample, in the place of a step.

    Args:
        seed: The number, an integer or int32 scalar.

    Yields:
        Nothing.
    """
    outer = current_sample()
    _scope.sample = tf.cast(seed, tf.int32)
    try:
        yield
    finally:
        _scope.sample = outer


def current_sample() -> tf.Tensor | None:
    """Returns the number of the open `posterior_sample`, if any."""
    return getattr(_scope, "sample", None)


def text_id(text: str) -> int:
    """A 31-bit number that is the same for a text in every process."""
    digest = hashlib.blake2s(text.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") & 0x7FFFFFFF


def key(seed: tf.Tensor, name: str, step: tf.Tensor) -> tf.Tensor:
    """Derives the key of one stream of noise at one step on this replica.

    Args:
        seed: The run's seed, an int32 scalar.
        name: What the noise is for; streams of other names are independent.
        step: The optimizer step, an int32 scalar.

    Returns:
        A key for the `tf.random.stateless_*` functions, int32 of shape [2].
    """
    stream = tf.stack([tf.cast(seed, tf.int32), text_id(name)])
    for number in (step, _replica_id()):
        stream = tf.random.experimental.stateless_fold_in(
            stream, number, alg=ALGORITHM
        )
    return stream


def uniform(shape: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
    """Draws uniform noise, the same numbers with and without XLA.

    XLA generates the bits that TensorFlow does, but makes other floats of them
    in `tf.random.stateless_uniform`.

    Args:
        shape: Shape of the result, int32 of rank 1.
        key: From `key`.

    Returns:
        float32 of that shape, multiples of 2^-23 in [0, 1).
    """
    bits = tf.random.stateless_uniform(
        shape, key, minval=None, maxval=None, dtype=tf.int32, alg=ALGORITHM
    )
    # The mantissa of a float in [1, 2).
    mantissa = tf.bitwise.bitwise_and(bits, 0x007FFFFF)
    from_one = tf.bitwise.bitwise_or(mantissa, 0x3F800000)
    return tf.bitcast(from_one, tf.float32) - 1.0


def normal(shape: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
    """Draws standard normal noise by Box and Muller's transformation.

    On a CPU it takes half the time of `tf.random.stateless_normal`, whose
    kernel is not vectorised; under variational dropout, which draws a number
    for every activation, that is most of the cost beyond the second product.

    Args:
        shape: Shape of the result, int32 of rank 1.
        key: From `key`.

    Returns:
        float32 of that shape.
    """
    size = tf.reduce_prod(shape)
    half = [(size + 1) // 2]
    radius_key, angle_key = key, tf.bitwise.invert(key)
    # In (0, 1], so that the logarithm is finite.
    u = 1.0 - uniform(half, radius_key)
    angle = 2 * math.pi * uniform(half, angle_key)
    radius = tf.sqrt(-2.0 * tf.math.log(u))
    both = [radius * tf.cos(angle), radius * tf.sin(angle)]
    return tf.reshape(tf.concat(both, 0)[:size], shape)


def _replica_id() -> tf.Tensor:
    if current_sample() is not None:
        # A sample of the posterior is one model, equal on all replicas.
        return tf.constant(0)
    context = tf.distribute.get_replica_context()
    # Outside `strategy.run` there is one program and so one stream.
    replica = 0 if context is None else context.replica_id_in_sync_group
    return tf.convert_to_tensor(replica, tf.int32)
