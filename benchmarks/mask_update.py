"""Times one mask update of all weights of a network.

    python -m benchmarks.mask_update
        [--model=resnet50|transformer|convnet|attention] [--repeats=5]
        [--sparsity=0.9] [--json]

The contestants run in turns, so other load on the machine affects all of them.
Medians are compared:

- this package on the host: the mask update of `sos.SparsityUpdater` for a model
  with `sos.MagnitudePruning`;
- this package's update on an accelerator, compiled by XLA for the CPU;
- XLA's sort of each tensor of magnitudes, compiled for the CPU, without masks:
  what ranking on an accelerator would cost at least with a sort;
- tensorflow-model-optimization: the mask update of its `prune_low_magnitude`,
  as one `tf.function`, with masks and thresholds assigned;
- `numpy.partition` of precomputed float magnitudes, without masks.

With ResNet-50 it takes two minutes on two cores, mostly in the code for
accelerators and in sorting, neither of which is made for CPUs. With
`--model=convnet --repeats=1` it takes seconds.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable

import numpy as np
import tensorflow as tf

# XLA's sort has no public name. `tf.sort` would sort the positions as well.
from tensorflow.compiler.tf2xla.python import xla

# isort: split
# Before tfmot, which changes the environment.
import sos
from benchmarks import networks
from benchmarks.common import print_report
from sos import masks, schedules
from sos.wrappers.base import find_wrappers
from sos.wrappers.compiled_masks import rank_by_count
from sos.wrappers.masked import update_masks

# isort: split
from tensorflow_model_optimization.python.core.sparsity.keras import (
    pruning_impl,
)

OURS_HOST = "sos"
OURS_DEVICE = "sos, device path on CPU"
SORT = "XLA's sort on CPU"
TFMOT = "tfmot"
PARTITION = "numpy.partition"


def make_contestants(
    wrappers: list[sos.extend.PruningWrapper], sparsity: float
) -> dict[str, Callable[[], None]]:
    """Returns functions that each update all masks once."""
    sparse = [w for wrapper in wrappers for w in wrapper.sparse_weights]
    our_masks = [weight.state["mask"] for weight in sparse]
    kernels = [weight.value.numpy() for weight in sparse]
    weights = [tf.Variable(kernel) for kernel in kernels]
    counts = [masks.keep_count(kernel.size, sparsity) for kernel in kernels]

    def host() -> None:
        update_masks(dict.fromkeys(wrappers, sparsity))

    def device() -> None:
        new_masks, statistics = rank_by_count(
            [tf.abs(weight) for weight in weights],
            tf.constant(counts, tf.int32),
            [mask.value for mask in our_masks],
            [False] * len(weights),
        )
        statistics.numpy()  # Waits for the update.
        for variable, mask in zip(our_masks, new_masks, strict=True):
            variable.assign(tf.cast(mask, tf.bool))

    @tf.function(jit_compile=True)
    def sort_compiled() -> list[tf.Tensor]:
        return [xla.sort(tf.reshape(tf.abs(w), [-1])) for w in weights]

    def sort() -> None:
        sort_compiled()[-1].numpy()  # Waits for all.

    tfmot_masks = [tf.Variable(tf.ones(w.shape)) for w in weights]
    thresholds = [tf.Variable(0.0) for _ in weights]
    pruning = pruning_impl.Pruning(
        training_step_fn=lambda: tf.constant(0, tf.int64),
        pruning_vars=list(zip(weights, tfmot_masks, thresholds, strict=True)),
        pruning_schedule=schedules.ConstantSparsity(sparsity, 0),
        block_size=(1, 1),
        block_pooling_type="AVG",
    )
    update = tf.function(lambda: pruning.conditional_mask_update())

    def tfmot() -> None:
        update()
        tfmot_masks[-1].numpy()  # Waits for the update.

    magnitudes = [np.abs(kernel).ravel() for kernel in kernels]

    def partition() -> None:
        for magnitude, k in zip(magnitudes, counts, strict=True):
            np.partition(magnitude, magnitude.size - k)

    contestants = {
        OURS_HOST: host,
        OURS_DEVICE: device,
        SORT: sort,
        TFMOT: tfmot,
        PARTITION: partition,
    }
    for run in contestants.values():
        run()  # Traces and compiles.
    # Check that all do the same work: host and device agree (the device ran
    # last), and tfmot keeps as many, except for rounding and ties.
    device_masks = [m.numpy() for m in our_masks]
    host()
    for mask, variable, k in zip(device_masks, our_masks, counts, strict=True):
        np.testing.assert_array_equal(mask, variable.numpy())
        assert mask.sum() == k
    kept = sum(int(tf.reduce_sum(m)) for m in tfmot_masks)
    assert abs(kept - sum(counts)) <= len(counts) + 1e-4 * sum(counts)
    return contestants


def measure(
    contestants: dict[str, Callable[[], None]], repeats: int
) -> dict[str, list[float]]:
    """Runs the contestants in turns and returns seconds per update."""
    seconds = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Measures and prints a table or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--model",
        choices=networks.NETWORKS,
        default="resnet50",
        help="network whose weights are ranked",
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="updates of each"
    )
    parser.add_argument(
        "--sparsity", type=float, default=0.9, help="fraction of zeros"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object"
    )
    flags = parser.parse_args()
    if flags.repeats < 1:
        parser.error(f"--repeats must be at least 1. Received: {flags.repeats}")
    if not 0 <= flags.sparsity < 1:
        parser.error(
            f"--sparsity must be in [0, 1). Received: {flags.sparsity}"
        )

    wrappers = find_wrappers(
        networks.build(
            flags.model, "MagnitudePruning", {"sparsity": flags.sparsity}
        )
    )
    shapes = [
        tuple(weight.variable.shape)
        for wrapper in wrappers
        for weight in wrapper.sparse_weights
    ]
    contestants = make_contestants(wrappers, flags.sparsity)
    seconds = measure(contestants, flags.repeats)
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    report = {
        "benchmark": "mask_update",
        "model": flags.model,
        "tensors": len(shapes),
        "weights": sum(math.prod(shape) for shape in shapes),
        "sparsity": flags.sparsity,
        "repeats": flags.repeats,
        "results": {
            name: {
                "median_ms": round(1e3 * medians[name], 2),
                "min_ms": round(1e3 * min(seconds[name]), 2),
                "max_ms": round(1e3 * max(seconds[name]), 2),
                "times_faster_than_tfmot": round(
                    medians[TFMOT] / medians[name], 2
                ),
            }
            for name in medians
        },
    }
    print_report(
        f"One mask update of {flags.model}: {report['tensors']} tensors, "
        f"{report['weights']:,} weights, sparsity {flags.sparsity}",
        report,
        flags.json,
    )


if __name__ == "__main__":
    main()
