"""Modules of training steps and mask updates, and the plan for their worker.

A folder holds the modules, their metadata, and in plan.json what
`gpu_step_worker` does with them and what `gpu_report` prints.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

# XLA's sort has no public name.
from tensorflow.compiler.tf2xla.python import xla

from benchmarks import networks, training
from benchmarks.lowering import Lowered, lower, run_steps
from benchmarks.networks import DENSE, NETWORKS
from benchmarks.recipes import Recipe, describe
from sos import masks, noise
from sos.wrappers.base import find_wrappers
from sos.wrappers.compiled_masks import rank_by_count

# Each group of steps is long compared with the host's part, and short compared
# with changes of the GPU's clock.
TIMING = {"warm_up": 5, "rounds": 3, "steps": 10}


class Check(NamedTuple):
    """How one dtype policy is checked.

    Attributes:
        xla: Whether TensorFlow computes the step with XLA as well.
        statistic: Which difference of all variables is bounded, "largest" or
            "median".
        bound: The bound, relative to a step's change of the variable.
    """

    xla: bool
    statistic: str
    bound: float


# By dtype policy. float64 shows that nothing was lost on the way from
# TensorFlow. XLA is on both sides, because noise is float32 even there, and
# other kernels round its logarithms differently. The others show that XLA
# computes the same as other kernels. Of these the median is bounded: in small
# variables, one number that is rounded differently makes a large difference.
CHECKS = {
    "float64": Check(True, "largest", 1e-11),
    "float32": Check(False, "median", 1e-4),
    "mixed_bfloat16": Check(False, "median", 0.1),
}
CHECK_STEPS = 2

COPY = "one read and write"
SORT = "sorting each tensor"
OURS = "sos"


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the report.

    Attributes:
        table: "results" or "mask_update".
        label: Its name in the table.
        base: Name of the module with which it is compared.
        policy: In a check, the dtype policy.
    """

    table: str
    label: str
    base: str
    policy: str | None = None


class Modules:
    """A folder of modules and the plan of what to do with them."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self._rows: dict[str, Row] = {}

    def add(
        self, name: str, lowered: Lowered, row: Row, **metadata: Any
    ) -> None:
        """Writes a module."""
        lowered.save(self._folder, name, metadata)
        self._rows[name] = row
        print(f"{name}: lowered", file=sys.stderr, flush=True)

    def add_expected(
        self, name: str, lowered: Lowered, values: list[list[np.ndarray]]
    ) -> None:
        """Writes the values of a module's variables after each step."""
        first = len(lowered.data)
        for step, arrays in enumerate(values):
            by_argument = {str(i): a for i, a in enumerate(arrays, first)}
            np.savez(self._folder / f"{name}_{step}.npz", **by_argument)

    def write_plan(self, **plan: Any) -> None:
        """Writes the plan; removes earlier results."""
        rows = {
            name: dataclasses.asdict(row) for name, row in self._rows.items()
        }
        plan = {**plan, **TIMING, "names": list(rows), "rows": rows}
        path = self._folder / "plan.json"
        path.write_text(json.dumps(plan), "utf-8")
        (self._folder / "results.json").unlink(missing_ok=True)


def _reset(policy: str) -> None:
    """Forgets earlier models, whose memory adds up, and sets the policy."""
    training.forget()
    keras.config.set_dtype_policy(policy)


def lower_step(
    model: str, technique: str, policy: str, batch_size: int, size: int
) -> tuple[Any, Lowered]:
    """Lowers the engine's training step.

    Args:
        model: One of `networks.NETWORKS`.
        technique: Name of a technique, or "dense".
        policy: Keras's dtype policy.
        batch_size: Number of examples.
        size: Their size.

    Returns:
        The step as a function of the model's inputs and the labels, and the
        same lowered.
    """
    _reset(policy)
    prepared = training.prepare(model, technique, batch_size, size)
    if prepared.updater:
        prepared.updater.start()

    def step(*batch: tf.Tensor) -> tf.Tensor:
        # As where TensorFlow has a GPU.
        with noise.redrawing(True):
            return prepared.loss(list(batch))

    dtype = keras.config.dtype_policy().variable_dtype
    data = NETWORKS[model].data(batch_size, size, dtype)
    compiled = tf.function(step, jit_compile=True, autograph=False)
    return step, lower(compiled, data)


def add_steps(
    modules: Modules,
    model: str,
    techniques: Sequence[str],
    batch_sizes: Sequence[int],
    size: int,
) -> None:
    """Adds the training steps of all techniques and batch sizes."""
    for batch_size in batch_sizes:
        for technique in techniques:
            _, lowered = lower_step(
                model, technique, "mixed_bfloat16", batch_size, size
            )
            row = Row(
                "results", f"{technique}, {batch_size}", f"{DENSE}_{batch_size}"
            )
            modules.add(f"{technique}_{batch_size}", lowered, row)


def add_checks(
    modules: Modules,
    model: str,
    techniques: Sequence[str],
    batch_sizes: Sequence[int],
    size: int,
) -> None:
    """Adds training steps in several dtypes, with TensorFlow's results."""
    for policy, check in CHECKS.items():
        for technique in techniques:
            for batch_size in batch_sizes:
                step, lowered = lower_step(
                    model, technique, policy, batch_size, size
                )
                name = f"{technique}_{batch_size}_{policy}"
                label = f"{technique}, {batch_size}, {policy}"
                function = tf.function(
                    step, jit_compile=check.xla, autograph=False
                )
                row = Row("results", label, name, policy)
                modules.add(name, lowered, row, steps=CHECK_STEPS)
                values = run_steps(function, lowered, CHECK_STEPS)
                modules.add_expected(name, lowered, values)


def add_mask_updates(modules: Modules, model: str) -> None:
    """Adds the mask update of a network, and what it is compared with."""
    _reset("float32")
    wrappers = find_wrappers(
        networks.build(model, "MagnitudePruning", training.HYPERPARAMETERS)
    )
    data = [
        describe(weight.path, weight.value.numpy())
        for wrapper in wrappers
        for weight in wrapper.sparse_weights
    ]
    counts = [
        masks.keep_count(
            math.prod(recipe.shape), training.HYPERPARAMETERS["sparsity"]
        )
        for recipe in data
    ]

    @tf.function(jit_compile=True, autograph=False)
    def copy(*weights: tf.Tensor) -> list[tf.Tensor]:
        return [tf.cast(tf.abs(w) > 0.01, tf.uint8) for w in weights]

    @tf.function(jit_compile=True, autograph=False)
    def sort(*weights: tf.Tensor) -> list[tf.Tensor]:
        new_masks = []
        for weight, k in zip(weights, counts, strict=True):
            scores = tf.reshape(tf.abs(weight), [-1])
            # `tf.sort` would sort the positions as well.
            ascending = xla.sort(scores)
            mask = tf.abs(weight) >= ascending[scores.shape[0] - k]
            new_masks.append(tf.cast(mask, tf.uint8))
        return new_masks

    old = [
        Recipe(f"{recipe.name}/mask", recipe.shape, "uint8", "mask", (0.5,))
        for recipe in data
    ]

    @tf.function(jit_compile=True, autograph=False)
    def update(*arguments: tf.Tensor) -> list[tf.Tensor]:
        weights, old = arguments[: len(data)], arguments[len(data) : -1]
        new_masks, statistics = rank_by_count(
            [tf.abs(weight) for weight in weights],
            arguments[-1],
            list(old),
            [False] * len(data),
        )
        return [*new_masks, statistics]

    kept = Recipe("counts", (len(counts),), "int32", "values", tuple(counts))
    digest = hashlib.sha256()
    for seed, (recipe, k) in enumerate(zip(data, counts, strict=True)):
        scores = np.abs(recipe.make(seed))
        digest.update(masks.top_k_mask_host(scores, k).tobytes())

    def row(label: str) -> Row:
        return Row("mask_update", label, "masks_copy")

    modules.add("masks_copy", lower(copy, data), row(COPY))
    modules.add("masks_sort", lower(sort, data), row(SORT))
    modules.add(
        "masks_sos",
        lower(update, [*data, *old, kept]),
        row(OURS),
        digest=digest.hexdigest(),
        digest_results=len(data),
    )
