"""Times a decoding loop with and without `sos.frozen`.

    python -m benchmarks.frozen [--vocabulary=32000] [--width=512] [--json]

A tied table and two dense layers run in a `tf.while_loop` on one token at a
time, like the decoder of a Transformer. All contestants run in turns in one
process. At the default size, 18.5 million weights, it takes a minute.
"""

import argparse
import contextlib
import time
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

import sos
from benchmarks.common import print_report

# Hyperparameters of all techniques; each ignores those of others.
HYPERPARAMETERS = {"sparsity": 0.9, "penalty_weight": 1e-6}


def build(vocabulary: int, width: int) -> keras.Model:
    """Builds a model that returns the logits after one token."""
    token = keras.Input((1,), dtype="int32")
    table = keras.layers.ReversibleEmbedding(vocabulary, width, name="table")
    x = table(token)
    x = keras.layers.Dense(4 * width, activation="relu", name="wide")(x)
    x = keras.layers.Dense(width, name="narrow")(x)
    return keras.Model(token, table(x, reverse=True))


def decoder(
    model: keras.Model, steps: int, frozen: bool
) -> Callable[[], tf.Tensor]:
    """Returns a function that decodes, traced and called once."""

    @tf.function
    def decode() -> tf.Tensor:
        scope = sos.frozen(model) if frozen else contextlib.nullcontext()
        with scope:
            token = tf.ones((1, 1), tf.int32)
            for _ in tf.range(steps):
                logits = model(token)
                token = tf.argmax(logits, -1, output_type=tf.int32)
                token = tf.ensure_shape(token, (1, 1))
        return token

    decode()
    return decode


def main() -> None:
    """Measures and prints a table or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name, default, text in (
        ("vocabulary", 32_000, "number of rows of the table"),
        ("width", 512, "number of columns of the table"),
        ("steps", 20, "number of tokens in one loop"),
        ("repeats", 5, "number of loops of each contestant"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object"
    )
    flags = parser.parse_args()
    for name in ("vocabulary", "width", "steps", "repeats"):
        if getattr(flags, name) < 1:
            parser.error(
                f"--{name} must be at least 1. Received: {getattr(flags, name)}"
            )
    model = build(flags.vocabulary, flags.width)
    contestants = {"dense": decoder(model, flags.steps, frozen=False)}
    for name in ("MagnitudePruning", "L0Regularization", "VariationalDropout"):
        selected = sos.extend.select_hyperparameters(name, HYPERPARAMETERS)
        sparse = sos.sparsify(model, name, **selected)
        for frozen in (True, False):
            key = f"{name}, {'frozen' if frozen else 'not'}"
            contestants[key] = decoder(sparse, flags.steps, frozen)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(flags.repeats):
        for name, decode in contestants.items():
            begin = time.perf_counter()
            decode()
            seconds[name].append(time.perf_counter() - begin)
    dense = np.median(seconds["dense"])
    print_report(
        f"One token, {model.count_params() / 1e6:.1f} million weights",
        {
            "benchmark": "frozen",
            "vocabulary": flags.vocabulary,
            "width": flags.width,
            "steps": flags.steps,
            "repeats": flags.repeats,
            "results": {
                name: {
                    "milliseconds": 1000 * np.median(times) / flags.steps,
                    "times_dense": np.median(times) / dense,
                }
                for name, times in seconds.items()
            },
        },
        flags.json,
    )


if __name__ == "__main__":
    main()
