"""Compiles or times training steps and mask updates for a GPU.

    python -m benchmarks.gpu_step
        [--model=resnet50|transformer|convnet|attention]
        [--technique=NAME,NAME] [--batch_size=N,N] [--size=N] [--mask_update]
        [--compile_only | --check | --export=FOLDER | --results=FOLDER] [--json]

The engine's training step is traced in mixed bfloat16 and lowered to StableHLO.
XLA, which comes with JAX, takes it from there, so that TensorFlow needs no GPU:

- on a machine with a GPU, it is compiled and run there: milliseconds, the
  techniques in turns, and memory;
- without one, or with `--compile_only`, it is compiled for the GPU that `--gpu`
  describes: memory, bytes moved and kernels, but no speed, and without the
  choice among kernels that needs a GPU;
- `--check` runs it on the CPU, on small batches in three dtypes, and compares
  two steps with TensorFlow's;
- `--export=FOLDER` writes all that a machine with JAX and a GPU needs. There
  `python FOLDER/gpu_step_worker.py FOLDER` measures, and
  `--results=FOLDER` prints what it wrote into FOLDER/results.json.

`--mask_update` adds the update of all masks of the network, between one read
and write of all weights, which no update can beat, and sorting each tensor, as
tensorflow-model-optimization does.

The compiler is installed with JAX in its own virtual environment on the first
call (2 GB to download, 5.5 GB on the disk). On two cores, ResNet-50 takes half
a minute to a minute for each technique without a GPU, and the check half a
minute each.

"Memory" is that of arguments, temporaries and results; variables are updated
in place. A module that does not fit the memory is a result: its row says so,
and the others go on.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import pathlib
import shutil
import statistics
import sys
import tempfile
from typing import Any, NamedTuple

import keras
import numpy as np
import rich.table
import tensorflow as tf

# XLA's sort has no public name.
from tensorflow.compiler.tf2xla.python import xla

import sos
from benchmarks import networks, training
from benchmarks.common import console, integers, machine, techniques
from benchmarks.compilers import (
    FOLDER,
    OutOfMemory,
    make_environment,
    run_worker,
    visible_gpus,
)
from benchmarks.gpus import GPUS
from benchmarks.lowering import Lowered, lower, run_steps
from benchmarks.networks import DENSE, NETWORKS
from benchmarks.recipes import Recipe, describe
from sos import masks, noise
from sos.wrappers.base import find_wrappers

REQUIREMENT = "jax[cuda12]==0.10.2"
ENVIRONMENT = FOLDER / "gpu_step"
WORKER = pathlib.Path(__file__).with_name("gpu_step_worker.py")
# What runs in the compiler's environment.
PROGRAMS = (WORKER.name, "xla_module.py", "recipes.py")

# A GPU takes more examples than a CPU, where it can.
BATCH_SIZES = {"resnet50": 256}
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


# By dtype policy. The first tells whether nothing was lost on the way from
# TensorFlow. It needs XLA on both sides, as noise is float32, in which kernels
# round differently. The others tell whether XLA computes the same as other
# kernels; in some variables a few rounded numbers of few are all.
CHECKS = {
    "float64": Check(True, "largest", 1e-11),
    "float32": Check(False, "median", 1e-4),
    "mixed_bfloat16": Check(False, "median", 0.1),
}
CHECK_BATCH_SIZE = 4
CHECK_STEPS = 2

# Headers of columns, where they are not the name.
COLUMNS = {
    "milliseconds": "ms",
    "times_base": "times",
    "memory_gib": "GiB",
    "memory_times_base": "times",
    "gigabytes": "GB moved",
    "gflop": "GFLOP",
    "compile_s": "compile s",
}

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
    keras.backend.clear_session()
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


def add_steps(modules: Modules, flags: argparse.Namespace) -> None:
    """Adds the training steps of all techniques and batch sizes."""
    for batch_size in flags.batch_size:
        for technique in flags.technique:
            _, lowered = lower_step(
                flags.model, technique, "mixed_bfloat16", batch_size, flags.size
            )
            row = Row(
                "results", f"{technique}, {batch_size}", f"{DENSE}_{batch_size}"
            )
            modules.add(f"{technique}_{batch_size}", lowered, row)


def add_checks(
    modules: Modules, flags: argparse.Namespace, folder: pathlib.Path
) -> None:
    """Adds small steps in several dtypes, with TensorFlow's results."""
    for policy, check in CHECKS.items():
        for technique in flags.technique:
            for batch_size in flags.batch_size:
                step, lowered = lower_step(
                    flags.model, technique, policy, batch_size, flags.size
                )
                name = f"{technique}_{batch_size}_{policy}"
                label = f"{technique}, {batch_size}, {policy}"
                function = tf.function(
                    step, jit_compile=check.xla, autograph=False
                )
                row = Row("results", label, name, policy)
                modules.add(name, lowered, row, steps=CHECK_STEPS)
                values = run_steps(function, lowered, CHECK_STEPS)
                first = len(lowered.data)
                for number, arrays in enumerate(values):
                    np.savez(
                        folder / f"{name}_{number}.npz",
                        **{str(i): a for i, a in enumerate(arrays, first)},
                    )


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

    @tf.function(jit_compile=True, autograph=False)
    def update(*arguments: tf.Tensor) -> list[tf.Tensor]:
        *weights, counts = arguments
        new_masks, nans = masks.top_k_masks_device(
            [tf.abs(weight) for weight in weights], counts
        )
        return [*new_masks, nans]

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
        lower(update, [*data, kept]),
        row(OURS),
        digest=digest.hexdigest(),
        digest_results=len(data),
    )


def execute(folder: pathlib.Path, python: pathlib.Path) -> None:
    """Runs the worker on all modules.

    Args:
        folder: The folder of modules.
        python: Path of Python in the compiler's environment.

    Raises:
        SystemExit: If it can do nothing at all, as without a driver.
    """
    plan = json.loads((folder / "plan.json").read_text("utf-8"))
    # In one process they take turns. Otherwise each has its own, so that one
    # that aborts leaves the others.
    together = plan["action"] == "run"
    for names in [plan["names"]] if together else [[n] for n in plan["names"]]:
        try:
            run_worker(python, WORKER, folder, *names)
        except RuntimeError as error:
            if together:
                raise SystemExit(
                    f"The GPU cannot be used: {error}. With --compile_only no "
                    "GPU is needed."
                ) from None
            add_error(folder, names[0], str(error))


def add_error(folder: pathlib.Path, name: str, error: str) -> None:
    """Adds the error of a module whose worker failed."""
    path = folder / "results.json"
    results = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    results[name] = {"error": error}
    path.write_text(json.dumps(results), "utf-8")


def read_report(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the report of a folder's results.

    Raises:
        SystemExit: If there are none.
    """
    try:
        plan = json.loads((folder / "plan.json").read_text("utf-8"))
        results = json.loads((folder / "results.json").read_text("utf-8"))
    except FileNotFoundError as error:
        raise SystemExit(
            f"{error.filename} is missing. Write the modules with --export, "
            "and run gpu_step_worker.py of that folder on a machine with a GPU."
        ) from None
    report = {
        "benchmark": "gpu_step",
        "model": plan["model"],
        "size": plan["size"],
        "action": plan["action"],
        "device": plan["gpu"],
        "compiler": REQUIREMENT,
        "results": {},
        "mask_update": {},
        "out_of_memory": {},
        "errors": {},
    }
    for name, row in plan["rows"].items():
        result = results.get(name, {"error": "was not reached"})
        label = row["label"]
        report["device"] = result.get("device", report["device"])
        if "error" in result:
            full = OutOfMemory.code in result["error"]
            kind = "out_of_memory" if full else "errors"
            report[kind][label] = result["error"]
        elif plan["action"] == "check":
            check = CHECKS[row["policy"]]
            difference = result[check.statistic]
            report["results"][label] = {
                "largest": result["largest"],
                "median": result["median"],
                "bound": check.bound,
                "of": check.statistic,
            }
            if not difference <= check.bound:
                report["errors"][label] = (
                    f"the {check.statistic} difference from TensorFlow is "
                    f"{difference:.1e}, more than {check.bound:.1e}"
                )
        else:
            base = results.get(row["base"], {})
            timed = plan["action"] == "run"
            report[row["table"]][label] = figures(result, base, timed)
            if result.get("equal") is False:
                report["errors"][label] = "differs from the masks of the host"
    return report


def figures(
    result: dict[str, Any], base: dict[str, Any], timed: bool
) -> dict[str, float | None]:
    """Returns the figures of a module to print, by name.

    Args:
        result: What the worker measured.
        base: The same of the module with which it is compared, or an empty
            dictionary.
        timed: Whether to include times, None if it was cut off before these.
    """
    printed = {}
    if timed:
        rounds = result.get("rounds_ms", [])
        # Within a round both ran at the same clock.
        ratios = [
            ours / theirs
            for ours, theirs in zip(
                rounds, base.get("rounds_ms", []), strict=False
            )
        ]
        printed["milliseconds"] = _median(rounds)
        printed["times_base"] = _median(ratios)
    printed["memory_gib"] = round(result["total"] / 2**30, 3)
    printed["memory_times_base"] = (
        round(result["total"] / base["total"], 3) if "total" in base else None
    )
    printed["gigabytes"] = round(result["bytes"] / 1e9, 3)
    printed["gflop"] = round(result["flops"] / 1e9, 1)
    printed["kernels"] = result["kernels"]
    printed["compile_s"] = round(result["compile_s"], 1)
    return printed


def _median(values: list[float]) -> float | None:
    return round(statistics.median(values), 3) if values else None


def print_tables(report: dict[str, Any]) -> None:
    """Prints a report as tables."""
    output = console()
    where = {
        "run": f"on {report['device']}",
        "compile": f"compiled for {report['device']}",
        "check": "compared with TensorFlow on the CPU",
    }[report["action"]]
    for key, title, base in (
        ("results", "training step", "the dense model"),
        ("mask_update", "mask update", COPY),
    ):
        rows = report[key]
        if not rows:
            continue
        title = f"One {title} of {report['model']}, {where}"
        if report["action"] != "check":
            title += f'; "times" compares with {base}'
        table = rich.table.Table(title=title, title_justify="left")
        table.add_column("", no_wrap=True)
        for column in next(iter(rows.values())):
            text = COLUMNS.get(column, column)
            table.add_column(text, justify="right")
        for label, values in rows.items():
            table.add_row(label, *(_format(v) for v in values.values()))
        output.print(table)
    for label in report["out_of_memory"]:
        output.print(f"{label}: does not fit the memory", highlight=False)
    for name, value in machine().items():
        output.print(f"{name}: {value}", highlight=False)


def _format(value: float | str | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:,}"


def parse_flags() -> argparse.Namespace:
    """Parses and validates the command line."""
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
        default=",".join([DENSE, *sos.extend.techniques()]),
        help="techniques, separated by commas",
    )
    add(
        "--batch_size",
        type=integers,
        help="number of examples, several separated by commas; by default "
        f"{BATCH_SIZES} and otherwise that of the network, and for --check "
        f"{CHECK_BATCH_SIZE}",
    )
    add(
        "--size",
        type=int,
        help="height and width of an image, or number of tokens in a sentence; "
        "by default that of the network, and for --check its smallest",
    )
    add(
        "--mask_update",
        action="store_true",
        help="measure the mask update, too",
    )
    add("--gpu", choices=GPUS, default="h100", help="GPU to compile for")
    add(
        "--venv",
        type=pathlib.Path,
        default=ENVIRONMENT,
        help="virtual environment of the compiler, created if missing",
    )
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument(
        "--compile_only",
        action="store_true",
        help="compile, but do not run; always so on a machine without a GPU",
    )
    actions.add_argument(
        "--check",
        action="store_true",
        help="compare small steps on the CPU with those of TensorFlow",
    )
    actions.add_argument(
        "--export",
        type=pathlib.Path,
        metavar="FOLDER",
        help="write what to run on another machine into a new folder",
    )
    actions.add_argument(
        "--results",
        type=pathlib.Path,
        metavar="FOLDER",
        help="print what another machine measured",
    )
    add("--json", action="store_true", help="print one JSON object")
    flags = parser.parse_args()
    network = NETWORKS[flags.model]
    if flags.batch_size is None:
        usual = BATCH_SIZES.get(flags.model, network.batch_size)
        flags.batch_size = [CHECK_BATCH_SIZE if flags.check else usual]
    if flags.size is None:
        flags.size = network.smallest_size if flags.check else network.size
    for name, value, least in (
        ("batch_size", min(flags.batch_size), 1),
        ("size", flags.size, network.smallest_size),
    ):
        if value < least:
            parser.error(
                f"--{name} must be at least {least}. Received: {value}"
            )
    if flags.check and flags.mask_update:
        parser.error(
            "--check compares training steps. Run --mask_update without it."
        )
    if flags.export and flags.export.exists():
        parser.error(f"--export must be a new folder. Received: {flags.export}")
    return flags


def gpu_at_hand() -> bool:
    """Returns whether this machine has an NVIDIA GPU that may be used."""
    hidden = visible_gpus() in ("", "-1")
    return not hidden and any(pathlib.Path("/dev").glob("nvidia[0-9]*"))


def write_modules(
    folder: pathlib.Path, action: str, flags: argparse.Namespace
) -> None:
    """Lowers all that the flags ask for.

    Args:
        folder: Existing directory.
        action: "run", "compile" or "check".
        flags: The flags.
    """
    modules = Modules(folder)
    if action == "check":
        add_checks(modules, flags, folder)
    else:
        add_steps(modules, flags)
        if flags.mask_update:
            add_mask_updates(modules, flags.model)
    modules.write_plan(
        action=action,
        model=flags.model,
        size=flags.size,
        gpu=flags.gpu,
        description=GPUS[flags.gpu],
    )


def measure(flags: argparse.Namespace) -> dict[str, Any]:
    """Lowers, compiles and perhaps runs in a temporary folder.

    Returns:
        The report.
    """
    if flags.check:
        action = "check"
    elif flags.compile_only or not gpu_at_hand():
        action = "compile"
    else:
        action = "run"
    python = make_environment(flags.venv, REQUIREMENT, "2 GB")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_modules(folder, action, flags)
        execute(folder, python)
        return read_report(folder)


def main() -> None:
    """Measures and prints tables or JSON."""
    flags = parse_flags()
    # TensorFlow warns that every technique is a new trace.
    tf.get_logger().setLevel("ERROR")
    if flags.export:
        flags.export.mkdir(parents=True)
        write_modules(flags.export, "run", flags)
        for name in PROGRAMS:
            shutil.copy(WORKER.with_name(name), flags.export)
        print(f"Wrote {flags.export}", file=sys.stderr)
        return
    report = read_report(flags.results) if flags.results else measure(flags)
    for kind in ("out_of_memory", "errors"):
        for label, error in report[kind].items():
            print(f"{label}: {error}", file=sys.stderr)
    if flags.json:
        print(json.dumps({**report, "machine": machine()}))
    else:
        print_tables(report)
    if report["errors"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
