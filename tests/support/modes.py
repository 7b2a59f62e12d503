"""Ways to run a function of tensors."""

import tensorflow as tf


def eager(function):
    """Returns the function itself."""
    return function


def graph(function):
    """Returns a function that runs in a graph."""
    return tf.function(function)


def xla(function):
    """Returns a function that XLA compiles."""
    return tf.function(function, jit_compile=True)


MODES = [eager, graph, xla]
