"""Times one training step of a network under each technique.

    python -m benchmarks.train_step [--model=resnet50|convnet]
        [--techniques=NAME,NAME] [--repeats=7] [--batch=32] [--size=128]
        [--json]

Each technique lives in a process of its own, which gives its peak memory, and
the processes take turns, one step each, so that whatever else the machine does
hits them all. Medians over the turns are compared with the dense model. The
step is forward pass, backward pass and SGD with momentum, as a `tf.function`;
mask updates are not part of it (see `benchmarks.mask_update`).

With ResNet-50 it takes about three minutes and 16 GB of memory on two cores;
with `--model=convnet --techniques=MagnitudePruning --repeats=1`, to try it out,
seconds.
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from multiprocessing.connection import Connection

from benchmarks.common import print_report

# Masks are updated once, before the first step.
HYPERPARAMETERS = {
    "sparsity": 0.9,
    "schedule": "constant",
    "frequency": 10**9,
    "penalty_weight": 1e-7,
}
# Height and width of the images by network.
SIZES = {"resnet50": 128, "convnet": 28}


def work(
    pipe: Connection, network: str, technique: str, batch: int, size: int
) -> None:
    """Builds one model and makes a step whenever it is asked for one."""
    import contextlib

    import keras
    import tensorflow as tf

    import sos
    from benchmarks.networks import DENSE, build

    keras.utils.set_random_seed(0)
    model = build(network, technique, HYPERPARAMETERS, size=size)
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True)
    optimizer.build(model.trainable_variables)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    images = tf.random.normal((batch, *model.input_shape[1:]))
    classes = model.output_shape[-1]
    labels = tf.random.uniform((batch,), maxval=classes, dtype=tf.int32)

    @tf.function
    def train_step() -> tf.Tensor:
        with tf.GradientTape() as tape:
            total = loss(labels, model(images, training=True))
            total += sum(model.losses)
        gradients = tape.gradient(total, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        return total

    updater = (
        sos.SparsityUpdater(model, optimizer)
        if technique != DENSE
        else contextlib.nullcontext()
    )
    with updater:
        train_step().numpy()
        if technique != DENSE:
            updater.step()
        while pipe.recv():
            start = time.perf_counter()
            train_step().numpy()
            seconds = time.perf_counter() - start
            if technique != DENSE:
                updater.step()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            pipe.send((seconds, peak))


def measure(
    network: str, techniques: list[str], repeats: int, batch: int, size: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Returns seconds per step and peak memory in GiB of each technique."""
    context = multiprocessing.get_context("spawn")
    pipes = {}
    workers = []
    for name in techniques:
        pipes[name], theirs = context.Pipe()
        worker = context.Process(
            target=work,
            args=(theirs, network, name, batch, size),
            daemon=True,
        )
        worker.start()
        theirs.close()
        workers.append(worker)
    seconds = {name: [] for name in techniques}
    peaks = {}
    # The first turn warms caches up and is not counted.
    for turn in range(-1, repeats):
        for name, pipe in pipes.items():
            pipe.send(True)
            try:
                elapsed, peaks[name] = pipe.recv()
            except EOFError:
                raise SystemExit(
                    f"The process of {name} died; its error stands above."
                ) from None
            if turn >= 0:
                seconds[name].append(elapsed)
    for pipe in pipes.values():
        pipe.send(False)
    for worker in workers:
        worker.join()
    return seconds, peaks


def main() -> None:
    """Measures, and prints a table or JSON."""
    import sos
    from benchmarks.networks import DENSE, NETWORKS

    # One that needs no step has the training step of magnitude pruning.
    names = [
        name for name, t in sos.extend.techniques().items() if t.needs_step
    ]
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--model",
        choices=NETWORKS,
        default="resnet50",
        help="what is trained",
    )
    parser.add_argument(
        "--techniques",
        default=",".join(names),
        help="compared with the dense model, with commas between",
    )
    parser.add_argument("--repeats", type=int, default=7, help="steps of each")
    parser.add_argument("--batch", type=int, default=32, help="images a step")
    parser.add_argument(
        "--size", type=int, help=f"of the images; by default {SIZES}"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead"
    )
    flags = parser.parse_args()
    if flags.size is None:
        flags.size = SIZES[flags.model]
    for name, least in (("repeats", 1), ("batch", 1), ("size", 16)):
        if getattr(flags, name) < least:
            parser.error(
                f"--{name} must be at least {least}. "
                f"Received: {getattr(flags, name)}"
            )
    techniques = [DENSE, *flags.techniques.split(",")]
    known = sos.extend.techniques()
    unknown = [name for name in techniques[1:] if name not in known]
    if unknown:
        parser.error(
            f"--techniques must be some of {','.join(known)}. "
            f"Received: {unknown[0]!r}"
        )
    seconds, peaks = measure(
        flags.model, techniques, flags.repeats, flags.batch, flags.size
    )
    # Ratios are taken turn by turn: neighbours in time share the machine's
    # mood.
    ratios = {
        name: [
            s / d for s, d in zip(seconds[name], seconds[DENSE], strict=True)
        ]
        for name in techniques
    }
    report = {
        "benchmark": "train_step",
        "model": flags.model,
        "batch": flags.batch,
        "image_size": flags.size,
        "repeats": flags.repeats,
        "results": {
            name: {
                "median_ms": round(1e3 * statistics.median(seconds[name]), 1),
                "min_ms": round(1e3 * min(seconds[name]), 1),
                "times_dense": round(statistics.median(ratios[name]), 3),
                "peak_gib": round(peaks[name], 2),
                "peak_times_dense": round(peaks[name] / peaks[DENSE], 2),
            }
            for name in techniques
        },
    }
    print_report(
        f"One training step of {flags.model}, batch {flags.batch}, "
        f"{flags.size}x{flags.size} images",
        report,
        flags.json,
    )


if __name__ == "__main__":
    main()
