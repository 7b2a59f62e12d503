"""Times cached beam search with each technique, and without a cache.

    python -m benchmarks.decode
        [--model=transformer|transformer_base|transformer_tiny]
        [--technique=NAME,NAME] [--batch_size=8] [--beam=4] [--tokens=64]
        [--source=32] [--repeats=5] [--json]

Sentences of random tokens are translated by a network with its initial weights.
None of them ends early, so that each search takes `--tokens` steps. All
contestants run in turns in one process; that without a cache is the dense
network, which computes all places in each step. The times are those of a step
for all sentences.

On two cores the small Transformer takes a minute. That of the study, with
`--model=transformer_base`, takes about eight, most of them without a cache.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

import sos
from benchmarks import networks
from benchmarks.common import print_report, techniques
from benchmarks.networks import DENSE, NETWORKS
from benchmarks.training import HYPERPARAMETERS
from models import beam_search
from models.transformer import Transformer

UNCACHED = "dense, without a cache"
MODELS = [name for name in NETWORKS if name.startswith("transformer")]


def cached(
    model: Transformer, source: tf.Tensor, tokens: int, beam: int
) -> Callable[[], tf.Tensor]:
    """Returns a compiled search with the model's cache."""

    @tf.function(autograph=False)
    def search() -> tf.Tensor:
        with sos.frozen(model):
            encoded = model.encode(source)
            cache = model.make_cache(encoded, source, tokens, beam)
            return _search(
                model,
                _endless(model.step),
                cache,
                batch=source.shape[0],
                tokens=tokens,
                beam=beam,
            )

    return search


def uncached(
    model: Transformer, source: tf.Tensor, tokens: int, beam: int
) -> Callable[[], tf.Tensor]:
    """Returns a compiled search that decodes all places in each step."""

    @tf.function(autograph=False)
    def search() -> tf.Tensor:
        with sos.frozen(model):
            sources = tf.repeat(source, beam, axis=0)
            encoded = tf.repeat(model.encode(source), beam, axis=0)

            def step(
                last: tf.Tensor,
                index: tf.Tensor,
                target: tf.Tensor,
                ancestors: tf.Tensor,
            ) -> tuple[tf.Tensor, tf.Tensor]:
                before = tf.maximum(index - 1, 0)
                parents = tf.gather(ancestors, before, axis=2)
                target = tf.gather(target, parents, axis=1, batch_dims=1)
                # The token before each place is known up to this one.
                is_last = tf.range(tokens) == index - 1
                target = tf.where(is_last, last[..., tf.newaxis], target)
                rows = tf.reshape(target, [-1, tokens])
                logits = model.decode(rows, encoded, sources)
                logits = tf.gather(logits, index, axis=1)
                return tf.reshape(logits, [*last.shape, -1]), target

            batch = source.shape[0]
            return _search(
                model,
                _endless(step),
                tf.zeros([batch, beam, tokens], tf.int32),
                batch=batch,
                tokens=tokens,
                beam=beam,
            )

    return search


def _endless(step: Callable) -> Callable:
    """Returns a step in which sentences never end, so that all take as long."""

    def endless(
        last: tf.Tensor, index: tf.Tensor, cache: Any, ancestors: tf.Tensor
    ) -> tuple[tf.Tensor, Any]:
        logits, cache = step(last, index, cache, ancestors)
        ends = tf.range(logits.shape[-1]) == beam_search.EOS
        return tf.where(ends, -1e9, logits), cache

    return endless


def _search(
    model: Transformer,
    step: Callable,
    cache: Any,
    *,
    batch: int,
    tokens: int,
    beam: int,
) -> tf.Tensor:
    return beam_search.beam_search(
        step,
        cache,
        limits=tf.fill([batch], tokens),
        length=tokens,
        vocabulary_size=model.vocabulary_size,
        beam=beam,
    ).tokens


def measure(flags: argparse.Namespace) -> dict[str, list[float]]:
    """Returns the seconds of each search by contestant."""
    keras.utils.set_random_seed(0)
    (recipe, *_) = NETWORKS[flags.model].data(flags.batch_size, flags.source)
    source = tf.constant(recipe.make(seed=0))
    searches = {}
    dense = networks.build(flags.model)
    for name in [DENSE, *(n for n in flags.technique if n != DENSE)]:
        model = dense
        if name != DENSE:
            model = networks.build(flags.model, name, HYPERPARAMETERS)
        searches[name] = cached(model, source, flags.tokens, flags.beam)
    searches[UNCACHED] = uncached(dense, source, flags.tokens, flags.beam)
    tokens = {name: search().numpy() for name, search in searches.items()}
    same = (tokens[UNCACHED] == tokens[DENSE]).mean()
    if same < 0.99:
        raise SystemExit(
            "The search without a cache found other tokens than that with it: "
            f"{same:.1%} are equal."
        )
    seconds: dict[str, list[float]] = {name: [] for name in searches}
    for _ in range(flags.repeats):
        for name, search in searches.items():
            begin = time.perf_counter()
            search().numpy()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def figures(
    seconds: list[float], dense: list[float], tokens: int
) -> dict[str, float]:
    """Returns the figures of one contestant to print, by name."""
    # Ratios are computed within each turn, because the load on the machine
    # varies.
    ratios = [s / d for s, d in zip(seconds, dense, strict=True)]
    return {
        "ms_per_token": round(1e3 * statistics.median(seconds) / tokens, 3),
        "times_dense": round(statistics.median(ratios), 3),
    }


def main() -> None:
    """Measures and prints a table or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", choices=MODELS, default="transformer", help="network")
    add(
        "--technique",
        type=techniques,
        default="MagnitudePruning,RandomPruning,L0Regularization,"
        "VariationalDropout,FixedMask",
        help="techniques to compare with the dense model, separated by commas",
    )
    numbers = {
        "batch_size": (8, "number of sentences"),
        "beam": (4, "number of hypotheses"),
        "tokens": (64, "number of tokens of each translation"),
        "source": (32, "number of tokens of each sentence"),
        "repeats": (5, "turns"),
    }
    for name, (default, text) in numbers.items():
        add(f"--{name}", type=int, default=default, help=text)
    add("--json", action="store_true", help="print one JSON object")
    flags = parser.parse_args()
    for name in numbers:
        if getattr(flags, name) < 1:
            parser.error(
                f"--{name} must be at least 1. Received: {getattr(flags, name)}"
            )
    seconds = measure(flags)
    report = {
        "benchmark": "decode",
        "model": flags.model,
        **{name: getattr(flags, name) for name in numbers},
        "results": {
            name: figures(one, seconds[DENSE], flags.tokens)
            for name, one in seconds.items()
        },
    }
    print_report(
        f"One token of {flags.batch_size} sentences, beam {flags.beam}",
        report,
        flags.json,
    )


if __name__ == "__main__":
    main()
