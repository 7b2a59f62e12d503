"""Small models that tests make sparse and strip."""

import keras
from keras import layers


def mlp(dtype=None):
    """Two dense layers."""
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, activation="relu", name="first", dtype=dtype),
            layers.Dense(4, name="last", dtype=dtype),
        ],
        name="net",
    )


def branches():
    """A shared layer, a nested model, attention and a recurrent layer."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5, 6))
    shared = layers.Dense(6, name="shared")
    inner_inputs = keras.Input((5, 6))
    inner = keras.Model(
        inner_inputs, layers.Dense(6, name="deep")(inner_inputs), name="inner"
    )
    x = shared(inner(shared(inputs)))
    x = layers.MultiHeadAttention(2, 3, name="attention")(x, x)
    x = layers.LSTM(4, name="lstm")(x)
    return keras.Model(inputs, layers.Dense(2, name="head")(x), name="net")
