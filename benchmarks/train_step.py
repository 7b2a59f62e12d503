"""Times one training step of a network under each technique.

    python -m benchmarks.train_step
        [--model=resnet50|transformer|transformer_base|...]
        [--technique=NAME,NAME] [--repeats=7] [--batch_size=N | --tokens=N]
        [--size=N] [--json]

Each technique has its own process, whose peak memory is reported. The processes
run one step each in turns, so other load on the machine affects all of them.
Medians are compared with the dense model. The step is the engine's, forward
pass, backward pass and optimizer, as a `tf.function` without XLA and without
mask updates (see `benchmarks.mask_update`). Tracing is timed apart.

With ResNet-50 it takes about three minutes and 16 GB of memory on two cores,
with the small Transformer two minutes and 8 GB. With
`--model=convnet --technique=MagnitudePruning --repeats=1` it takes seconds.

`--model=transformer_base` is the Transformer of the study, on `--tokens=N`
tokens of each language in a step: 2,048 by default.
"""

import argparse
import contextlib
import multiprocessing
import resource
import statistics
import time
from multiprocessing.connection import Connection

import keras
import tensorflow as tf

import sos
from benchmarks import training
from benchmarks.common import print_report, techniques
from benchmarks.networks import DENSE, NETWORKS

# Size of the examples where the usual one takes long on a CPU.
SIZES = {"resnet50": 128}


def work(
    pipe: Connection, name: str, technique: str, batch: int, size: int
) -> None:
    """Builds a model, traces its step and runs it, one for each message.

    A false message ends it.
    """
    keras.utils.set_random_seed(0)
    prepared = training.prepare(name, technique, batch, size)
    data = [
        tf.constant(recipe.make(seed))
        for seed, recipe in enumerate(NETWORKS[name].data(batch, size))
    ]
    updater = prepared.updater or contextlib.nullcontext()
    train_step = tf.function(prepared.loss, autograph=False)
    with updater:
        pipe.recv()
        start = time.perf_counter()
        train_step.get_concrete_function(data)
        pipe.send({"trace": time.perf_counter() - start})
        while pipe.recv():
            start = time.perf_counter()
            train_step(data).numpy()
            seconds = time.perf_counter() - start
            if prepared.updater:
                prepared.updater.step()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            pipe.send({"step": seconds, "peak": peak})


def measure(
    name: str, techniques: list[str], repeats: int, batch: int, size: int
) -> dict[str, dict[str, list[float]]]:
    """Returns measurements by technique and, within, by kind.

    These are the seconds of tracing ("trace"), those of each step ("step"), and
    the peak memory in GiB after each step ("peak").
    """
    context = multiprocessing.get_context("spawn")
    pipes = {}
    workers = []
    for technique in techniques:
        pipes[technique], child_pipe = context.Pipe()
        worker = context.Process(
            target=work,
            args=(child_pipe, name, technique, batch, size),
            daemon=True,
        )
        worker.start()
        child_pipe.close()
        workers.append(worker)
    measured = {
        technique: {"trace": [], "step": [], "peak": []}
        for technique in techniques
    }
    # The first turn traces. The second warms up caches and is not counted.
    for turn in range(-2, repeats):
        for technique, pipe in pipes.items():
            pipe.send(True)
            try:
                answer = pipe.recv()
            except EOFError:
                raise SystemExit(
                    f"The process of {technique} died; see its error above."
                ) from None
            if turn != -1:
                for kind, value in answer.items():
                    measured[technique][kind].append(value)
    for pipe in pipes.values():
        pipe.send(False)
    for worker in workers:
        worker.join()
    return measured


def figures(
    measured: dict[str, list[float]], dense: dict[str, list[float]]
) -> dict[str, float]:
    """Returns the figures of one technique to print, by name."""
    # Ratios are computed within each turn, because the load on the machine
    # varies.
    ratios = [
        s / d for s, d in zip(measured["step"], dense["step"], strict=True)
    ]
    peak = max(measured["peak"])
    return {
        "median_ms": round(1e3 * statistics.median(measured["step"]), 1),
        "min_ms": round(1e3 * min(measured["step"]), 1),
        "times_dense": round(statistics.median(ratios), 3),
        "peak_gib": round(peak, 2),
        "peak_times_dense": round(peak / max(dense["peak"]), 2),
        "trace_s": round(measured["trace"][0], 1),
    }


def _batch_size(
    parser: argparse.ArgumentParser, flags: argparse.Namespace
) -> int:
    """Returns the number of pairs of sentences that have `--tokens` tokens."""
    if not flags.model.startswith("transformer"):
        parser.error(
            "--tokens is for Transformers; give --batch_size. "
            f"Received: --model={flags.model}"
        )
    if flags.batch_size is not None:
        parser.error(
            "--tokens and --batch_size exclude each other. Received: "
            f"--tokens={flags.tokens} --batch_size={flags.batch_size}"
        )
    if flags.tokens < 1 or flags.size < 1 or flags.tokens % flags.size:
        parser.error(
            f"--tokens must be a multiple of --size, {flags.size} tokens in a "
            f"sentence. Received: --tokens={flags.tokens}"
        )
    return flags.tokens // flags.size


def main() -> None:
    """Measures and prints a table or JSON."""
    # Others have the training step of magnitude pruning.
    defaults = [
        name for name, t in sos.extend.techniques().items() if t.needs_step
    ]
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--model",
        choices=NETWORKS,
        default="resnet50",
        help="network to train",
    )
    add(
        "--technique",
        type=techniques,
        default=",".join(defaults),
        help="techniques to compare with the dense model, separated by commas",
    )
    add("--repeats", type=int, default=7, help="turns")
    add(
        "--batch_size",
        type=int,
        help="number of images, or of pairs of sentences, in a step; by "
        "default that of the network",
    )
    add(
        "--tokens",
        type=int,
        help="number of tokens of each language in a step, instead of "
        "--batch_size: a multiple of --size",
    )
    add(
        "--size",
        type=int,
        help="height and width of an image, or number of tokens in a sentence; "
        f"by default that of the network, but {SIZES}",
    )
    add("--json", action="store_true", help="print one JSON object")
    flags = parser.parse_args()
    network = NETWORKS[flags.model]
    if flags.size is None:
        flags.size = SIZES.get(flags.model, network.size)
    if flags.tokens is not None:
        flags.batch_size = _batch_size(parser, flags)
    if flags.batch_size is None:
        flags.batch_size = network.batch_size
    for name, least in (
        ("repeats", 1),
        ("batch_size", 1),
        ("size", network.smallest_size),
    ):
        if getattr(flags, name) < least:
            parser.error(
                f"--{name} must be at least {least}. "
                f"Received: {getattr(flags, name)}"
            )
    others = [name for name in flags.technique if name != DENSE]
    measured = measure(
        flags.model,
        [DENSE, *others],
        flags.repeats,
        flags.batch_size,
        flags.size,
    )
    report = {
        "benchmark": "train_step",
        "model": flags.model,
        "batch": flags.batch_size,
        "size": flags.size,
        "repeats": flags.repeats,
        "results": {
            name: figures(one, measured[DENSE])
            for name, one in measured.items()
        },
    }
    print_report(
        f"One training step of {flags.model}, "
        f"{network.describe(flags.batch_size, flags.size)}",
        report,
        flags.json,
    )


if __name__ == "__main__":
    main()
