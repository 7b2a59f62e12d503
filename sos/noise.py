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

# Coefficients of sin(2 pi x) / (x - 4 x^3) in powers of x^2, which minimise the
# largest error of the sine for |x| <= 1/2: 1e-7 without rounding.
_SINE = (6.2831826, -16.20867, 16.760975, -9.530799, 3.0583255)

# A TPU pads the last two axes of a tensor's layout to multiples of these.
_SUBLANES, _LANES = 8, 128

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

    It is half of the Philox block (Salmon et al. 2011) at the counter (seed,
    name, step, replica), so that streams of any two keys are independent.

    Args:
        seed: The run's seed, an int32 scalar.
        name: Purpose of the noise. Streams of other names are independent.
        step: The optimizer step, an int32 scalar.

    Returns:
        A key for the functions of this module, int32 of shape [2].
    """
    seed, step = tf.cast(seed, tf.int32), tf.cast(step, tf.int32)
    counter = tf.stack([[seed, text_id(name)], [step, _replica_id()]])
    # Not `tf.random.stateless_uniform`, which adds 46 operations to a graph.
    return tf.raw_ops.StatelessRandomUniformFullIntV2(
        shape=[2],
        key=tf.constant([0], tf.uint64),
        counter=tf.bitcast(counter, tf.uint64),
        alg=tf.random.Algorithm.PHILOX.value,
        dtype=tf.int32,
    )


def bits(shape: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
    """Draws random words, each a hash of its position and the key.

    XLA computes them within the kernel that uses them, and writes nothing to
    memory. The words of `tf.random.stateless_uniform` it would write and read
    again: for the activations of variational dropout this takes longer than all
    the rest. Words are the same with and without XLA.

    A word is the hash of a counter: two rounds of multiplication and shift with
    the constants that the search of https://github.com/skeeto/hash-prospector
    found. The counter is a quadratic function of the row (all axes except the
    last) plus one of the column, with coefficients from the key. In a linear
    one, words at one lag would have counters of one difference, and a few
    differences in ten million leave the hashes correlated, by up to 0.1.

    Args:
        shape: Shape of the result, int32 of rank 1 with a static length.
        key: Key from `noise.key`, int32 of shape [2]. Words of keys that are
            not mixed, such as neighbouring integers, may be equal.

    Returns:
        uint32 tensor of that shape.
    """
    shape = tf.convert_to_tensor(shape, tf.int32)
    if shape.shape[0] == 0:
        return tf.reshape(bits([1], key), shape)
    start, step = tf.unstack(tf.bitcast(key, tf.uint32))
    *outer, columns = tf.unstack(shape)
    x = start + _permuted(_positions([columns], start + step))
    if outer:
        x = tf.expand_dims(_permuted(_positions(outer, step)), -1) + x
    x = _fold(x, 16) * _uint32(0x21F0AAAD)
    x = _fold(x, 15) * _uint32(0xD35A2D97)
    return _fold(x, 15)


def _bits_in_tiles(shape: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
    """Draws the words of `bits`, on a TPU in tiles that need no padding.

    The compiler chooses the layout of numbers that depend on their position. If
    this needs less padding, it swaps the last two axes, and then those of all
    activations that they reach through additions and pooling. In ResNet-50 the
    stem (112 x 112 x 64) made it do so with tensors of 7 x 7 x 2048, which took
    18 times their size. So draw as many columns as fill tiles, and drop those
    that are not needed. If the batch fills tiles there is no such swap, as
    convolutions put it last.

    Args:
        shape: Shape of the result, int32 of rank 1 with a static length.
        key: Key from `noise.key`, int32 of shape [2].

    Returns:
        uint32 tensor of that shape.
    """
    shape = tf.convert_to_tensor(shape, tf.int32)
    static = tf.get_static_value(shape)
    if not _on_tpu() or static is None or len(static) < 3:
        return bits(shape, key)
    *outer, columns = map(int, static)
    tiles = _round_up(columns, _LANES)
    padded = tiles * _round_up(outer[-1], _SUBLANES)
    swapped = _round_up(outer[-1], _LANES) * _round_up(columns, _SUBLANES)
    if swapped >= padded or outer[0] % _LANES == 0:
        return bits(shape, key)
    # A word depends on its row and column, not on the number of columns.
    return bits([*outer, tiles], key)[..., :columns]


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _positions(sizes: list[tf.Tensor], step: tf.Tensor) -> tf.Tensor:
    """Returns the positions in a tensor of these sizes, times step | 1.

    It is a sum over axes of terms that depend on the key. A range over all
    positions TensorFlow would fold into a constant of megabytes, and a TPU
    would copy to reshape it.
    """
    stride = tf.bitwise.bitwise_or(step, _uint32(1))
    *outer, last = sizes
    positions = tf.cast(tf.range(last), tf.uint32) * stride
    if outer:
        stride *= tf.cast(last, tf.uint32)
    for size in reversed(outer):
        axis = tf.cast(tf.range(size), tf.uint32) * stride
        axis = tf.reshape(axis, [-1] + [1] * positions.shape.rank)
        positions = axis + positions
        stride *= tf.cast(size, tf.uint32)
    return positions


def _permuted(x: tf.Tensor) -> tf.Tensor:
    """Returns x + a x^2 modulo 2^32: a is even, so it is a permutation."""
    return x * (x * _uint32(0x3C6EF372) + _uint32(1))


def _fold(x: tf.Tensor, shift: int) -> tf.Tensor:
    return tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, _uint32(shift)))


def _uint32(number: int) -> tf.Tensor:
    return tf.constant(number, tf.uint32)


def _to_float(words: tf.Tensor) -> tf.Tensor:
    # Through int32, which every processor converts in one instruction.
    return tf.cast(tf.bitcast(words, tf.int32), tf.float32)


def uniform(shape: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
    """Draws uniform noise.

    Args:
        shape: Shape of the result, int32 of rank 1 with a static length.
        key: Key from `noise.key`, int32 of shape [2].

    Returns:
        float32 tensor of that shape, odd multiples of 2^-24 in (0, 1), so that
        logarithms of u and 1 - u are finite.
    """
    high = tf.bitwise.right_shift(bits(shape, key), _uint32(9))
    return _to_float(high) * 2.0**-23 + 2.0**-24


def normal(shape: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
    """Draws standard normal noise by the Box-Muller transform.

    One word gives one number: its high half the radius, its low half the angle.
    So the largest number is 4.85, the variance 1 - 5e-6 and the kurtosis
    2.9998.

    Args:
        shape: Shape of the result, int32 of rank 1 with a static length.
        key: Key from `noise.key`, int32 of shape [2].

    Returns:
        float32 tensor of that shape.
    """
    words = _bits_in_tiles(shape, key)
    high = tf.bitwise.right_shift(words, _uint32(16))
    low = tf.bitwise.left_shift(words, _uint32(16))
    # An odd multiple of 2^-17 in (0, 1).
    u = _to_float(high) * 2.0**-16 + 2.0**-17
    return tf.sqrt(-2.0 * tf.math.log(u)) * _sine(_to_float(low) * 2.0**-32)


def _sine(x: tf.Tensor) -> tf.Tensor:
    """Returns sin(2 pi x) for |x| <= 1/2, with an error of at most 3e-7."""
    if not redraws():
        return tf.sin(2 * math.pi * x)
    # XLA reduces the range of any float, and takes three times as long to
    # compile a step for a TPU. Without XLA this polynomial takes longer.
    square = x * x
    result = _SINE[-1] * square + _SINE[-2]
    for coefficient in reversed(_SINE[:-2]):
        result = result * square + coefficient
    return result * (x * (1.0 - 4.0 * square))


@contextlib.contextmanager
def redrawing(enabled: bool) -> Iterator[None]:
    """Sets whether gradients computed inside draw noise again.

    Open it where the step is traced.

    Args:
        enabled: Whether they do.

    Yields:
        Nothing.
    """
    outer = getattr(_scope, "redraws", None)
    _scope.redraws = enabled
    try:
        yield
    finally:
        _scope.redraws = outer


def redraws() -> bool:
    """Returns whether gradients draw noise again instead of keeping it.

    On an accelerator, where XLA draws noise within the kernel that uses it,
    memory and its traffic cost more than drawing; on a CPU it is the reverse.
    The numbers are the same.
    """
    enabled = getattr(_scope, "redraws", None)
    if enabled is not None:
        return enabled
    return _on_tpu() or bool(tf.config.list_logical_devices("GPU"))


def _on_tpu() -> bool:
    return isinstance(tf.distribute.get_strategy(), tf.distribute.TPUStrategy)


def _replica_id() -> tf.Tensor:
    if current_sample() is not None:
        # A sample of the posterior is one model, the same on all replicas.
        return tf.constant(0)
    context = tf.distribute.get_replica_context()
    # None outside `strategy.run`, where there is one stream.
    replica = 0 if context is None else context.replica_id_in_sync_group
    return tf.convert_to_tensor(replica, tf.int32)
