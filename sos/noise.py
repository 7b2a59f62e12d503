"""Stateless noise: every random number is a function of a key.

A key is derived from the run's seed, the weight, the optimizer step and the
replica. Within a step the same key gives the same numbers, so that a forward
pass that is repeated in the backward pass (rematerialisation) gets the same
noise. A stateful generator would draw new numbers there, which silently gives
wrong gradients, and would give all replicas the same numbers.
"""

import contextlib
import hashlib
import math
import threading
from collections.abc import Iterator

import tensorflow as tf

#: Algorithm of all random bits. The default differs between devices, and
#: between compiled and other code on one device.
ALGORITHM = "philox"

_scope = threading.local()


@contextlib.contextmanager
def noise_scope(label: str) -> Iterator[None]:
    """Makes the activation noise of calls inside the scope independent.

    Calls of a shared layer in one step draw the same noise for equal shapes, as
    if one weight were sampled per step. In scopes with different labels they
    draw independent noise, as the uses of a shared embedding do in Gale et al.
    2019.

    Open the scope in code that is traced and runs on the replicas, such as the
    `call` of a model: it has no effect around a compiled function. In a
    function that is rematerialised, open it inside that function, so that the
    repeated call has the same label.

    Args:
        label: Any text that names the call within the step.

    Yields:
        Nothing.

    Example:
    >>> import keras, sos
    >>> class Tied(keras.Model):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.table = keras.layers.ReversibleEmbedding(10, 4)
    ...
    ...     def call(self, tokens):
    ...         with sos.noise_scope("encoder"):
    ...             rows = self.table(tokens)
    ...         with sos.noise_scope("logits"):
    ...             return self.table(rows, reverse=True)
    >>> model = Tied()
    >>> model(keras.ops.zeros((1, 3), "int32")).shape
    TensorShape([1, 3, 10])
    """
    outer = current_noise_scope()
    _scope.label = f"{outer}/{label}"
    try:
        yield
    finally:
        _scope.label = outer


def current_noise_scope() -> str:
    """Returns the labels of the open `noise_scope` scopes, joined by "/"."""
    return getattr(_scope, "label", "")


@contextlib.contextmanager
def posterior_sample(seed: int | tf.Tensor) -> Iterator[None]:
    """Makes noise inside the scope depend on a seed instead of the step.

    Args:
        seed: Seed of the sample, an integer or int32 scalar.

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
    """Returns the seed of the open `posterior_sample`, if any."""
    return getattr(_scope, "sample", None)


def text_id(text: str) -> int:
    """Returns a 31-bit hash of a text that is equal in every process."""
    digest = hashlib.blake2s(text.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") & 0x7FFFFFFF


def key(seed: tf.Tensor, name: str, step: tf.Tensor) -> tf.Tensor:
    """Derives the key of one stream of noise at one step on this replica.

    Args:
        seed: The run's seed, an int32 scalar.
        name: Purpose of the noise. Streams of other names are independent.
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
    """Draws uniform noise, with equal numbers in XLA and other code.

    In `tf.random.stateless_uniform` both generate equal bits, but convert them
    to different floats.

    Args:
        shape: Shape of the result, int32 of rank 1.
        key: Key from `noise.key`, int32 of shape [2].

    Returns:
        float32 tensor of that shape, multiples of 2^-23 in [0, 1).
    """
    bits = tf.random.stateless_uniform(
        shape, key, minval=None, maxval=None, dtype=tf.int32, alg=ALGORITHM
    )
    # The mantissa of a float in [1, 2).
    mantissa = tf.bitwise.bitwise_and(bits, 0x007FFFFF)
    from_one = tf.bitwise.bitwise_or(mantissa, 0x3F800000)
    return tf.bitcast(from_one, tf.float32) - 1.0


def normal(shape: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
    """Draws standard normal noise by the Box-Muller transform.

    On a CPU it takes half the time of `tf.random.stateless_normal`, whose
    kernel is not vectorised. Variational dropout draws a number for every
    activation: after the second product, that is most of its cost.

    Args:
        shape: Shape of the result, int32 of rank 1.
        key: Key from `noise.key`, int32 of shape [2].

    Returns:
        float32 tensor of that shape.
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
        # A sample of the posterior is one model, the same on all replicas.
        return tf.constant(0)
    context = tf.distribute.get_replica_context()
    # None outside `strategy.run`, where there is one stream.
    replica = 0 if context is None else context.replica_id_in_sync_group
    return tf.convert_to_tensor(replica, tf.int32)
