"""Compiles training steps for a TPU, on a machine without one.

    python -m benchmarks.tpu_compile [--model=convnet|resnet50]
        [--technique=NAME] [--replicas=N] [--topology=v5e:2x2]
        [--batch_size=N] [--lower_only] [--json]

The engine's training step is traced in mixed bfloat16 under a TPUStrategy
without a TPU (`sos.training.tpu_check`), checked, lowered, and compiled by the
TPU compiler, libtpu, for a described topology. This shows whether the step
compiles, its memory and its operations, but not its speed.

The compiler is installed with JAX in its own virtual environment on the first
call (200 MB to download, 1.3 GB on the disk). On two cores, a technique takes
less than a minute with the small network; magnitude pruning of ResNet-50 took
seven. `--lower_only` stops before the compiler, does not install it, and takes
seconds.

Results are for one replica and one step. "Total" is the memory of arguments,
temporaries, code and results; variables are updated in place. "Peak" is
reported by the compiler. It may exceed the total, and seems to include the
core's small memories. TensorFlow's runtime may need more, and the lowering
approximates in two places: see `benchmarks.tpu_lowering`.
"""

import argparse
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from typing import Any

import keras
import rich.console
import rich.table
import tensorflow as tf

import sos
from benchmarks import networks
from benchmarks.common import machine, print_report
from benchmarks.networks import DENSE
from benchmarks.tpu_lowering import lower
from sos.training import tpu_check
from sos.training.steps import Steps
from sos.training.task import Task

HYPERPARAMETERS = {
    "schedule": "constant",
    "sparsity": 0.9,
    "frequency": 100,
    "penalty_weight": 1e-7,
}
REQUIREMENT = "jax[tpu]==0.10.2"
ENVIRONMENT = pathlib.Path.home() / ".cache" / "sos" / "tpu_compile"
WORKER = pathlib.Path(__file__).with_name("tpu_compile_worker.py")
# Memory figures to print. The limit is what the compiler may use.
MEMORY = ("arguments", "temporaries", "code", "total", "peak", "limit")


class Classification(Task):
    """Classifies images into one of several classes."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def compute_metrics(
        self, model: keras.Model, batch: Any, training: bool
    ) -> dict[str, tuple[tf.Tensor, tf.Tensor]]:
        """Computes cross-entropy and accuracy."""
        logits = tf.cast(model(batch["image"], training=training), tf.float32)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
            batch["label"], logits
        )
        predictions = tf.argmax(logits, axis=-1, output_type=tf.int32)
        correct = tf.cast(predictions == batch["label"], tf.float32)
        count = tf.cast(tf.size(losses), tf.float32)
        return {
            "loss": (tf.reduce_sum(losses), count),
            "accuracy": (tf.reduce_sum(correct), count),
        }


def trace(model_name: str, technique: str, replicas: int, batch: int) -> Any:
    """Traces the engine's training step and checks its TPU compatibility.

    Args:
        model_name: One of `networks.NETWORKS`.
        technique: Name of a technique, or `DENSE`.
        replicas: Number of replicas.
        batch: Batch size of one replica.

    Returns:
        A concrete function of images and labels.
    """
    strategy = tpu_check.deviceless_strategy(replicas)
    # One replica's variables are lowered. A packed variable represents those of
    # all replicas, and only a TPU can unpack it.
    strategy._enable_packed_variable_in_eager_mode = False
    keras.config.set_dtype_policy("mixed_bfloat16")
    with strategy.scope():
        model = networks.build(model_name, technique, HYPERPARAMETERS)
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True)
        optimizer.build(model.trainable_variables)
        task = Classification(batch * replicas)
        steps = Steps(task, model, optimizer)
    if steps.sparse_weights:
        # Not `start`, which would update masks, for which it needs a TPU.
        updater = sos.SparsityUpdater(model, optimizer)
        updater.resume()

    def replica_step(batch: dict[str, tf.Tensor]) -> None:
        # Without the results, which go to the host.
        steps.train_step(batch)

    @tf.function
    def train(image: tf.Tensor, label: tf.Tensor) -> None:
        data = {"image": image, "label": label}
        strategy.run(replica_step, args=(data,))

    shape, _ = networks.NETWORKS[model_name]
    function = train.get_concrete_function(
        tf.TensorSpec((batch, *shape)), tf.TensorSpec((batch,), tf.int32)
    )
    tpu_check.check(function)
    return function


def make_environment(folder: pathlib.Path) -> pathlib.Path:
    """Creates the compiler's virtual environment, unless it exists.

    Args:
        folder: Directory of the environment.

    Returns:
        Path of its Python.

    Raises:
        SystemExit: If it cannot be created.
    """
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    ready = folder / ".ready"
    # Written last: an interrupted installation is repeated.
    if ready.is_file() and ready.read_text("utf-8") == REQUIREMENT:
        return python
    if folder.exists() and not (folder / "pyvenv.cfg").is_file():
        if not folder.is_dir() or any(folder.iterdir()):
            raise SystemExit(
                f"{folder} is not empty and not a virtual environment. Choose "
                "another --venv."
            )
    print(
        f"Installing {REQUIREMENT} into {folder}, once (200 MB to download)",
        file=sys.stderr,
        flush=True,
    )
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install"]
    try:
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run(
            [*pip, "--quiet", "--no-input", REQUIREMENT],
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=_clean_environment(),
        )
    except (OSError, subprocess.CalledProcessError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        output = getattr(error, "stderr", None) or str(error)
        if isinstance(output, bytes):
            output = output.decode(errors="replace")
        lines = [line for line in output.splitlines() if "ERROR" in line]
        reason = (lines or output.splitlines() or ["unknown"])[-1].strip()
        raise SystemExit(
            f"The compiler's environment {folder} cannot be created: {reason}. "
            "It needs the network and a writable directory."
        ) from None
    ready.write_text(REQUIREMENT, "utf-8")
    return python


def compile_for_tpu(
    python: pathlib.Path,
    module: bytes,
    *,
    topology: str,
    replicas: int,
    batch_arguments: int,
) -> dict[str, float]:
    """Compiles a lowered step in its own process, because libtpu may abort.

    Args:
        python: Path of Python in the compiler's environment.
        module: StableHLO bytecode.
        topology: Name of the topology.
        replicas: Number of replicas.
        batch_arguments: Number of arguments that are data; these come first.

    Returns:
        Figures of `tpu_compile_worker` by name.

    Raises:
        RuntimeError: If the compiler rejects the module.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "step.mlirbc"
        path.write_bytes(module)
        command = [python, WORKER, path, topology, replicas, batch_arguments]
        result = subprocess.run(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd=folder,
            env=_clean_environment(),
        )
    try:
        figures = json.loads(result.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        lines = result.stderr.strip().splitlines() or ["no output"]
        figures = {"error": f"exit code {result.returncode}: {lines[-1]}"}
    if "error" in figures:
        raise RuntimeError(figures["error"])
    return figures


def _clean_environment() -> dict[str, str]:
    """Returns the environment variables without those of this environment."""
    excluded = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_LIBRARY_PATH")
    return {k: v for k, v in os.environ.items() if k not in excluded}


def measure(
    technique: str, flags: argparse.Namespace, python: pathlib.Path | None
) -> dict[str, float]:
    """Measures one technique.

    Args:
        technique: Name of a technique, or `DENSE`.
        flags: The flags.
        python: Path of Python in the compiler's environment; None to only
            lower the step.

    Returns:
        Figures to print, by name.

    Raises:
        RuntimeError: If the compiler rejects the step.
    """
    begin = time.perf_counter()
    function = trace(flags.model, technique, flags.replicas, flags.batch_size)
    module, batch_arguments = lower(function)
    lowered = time.perf_counter()
    if python is None:
        return {
            "stablehlo_kib": round(len(module) / 2**10, 1),
            "batch_arguments": batch_arguments,
            "lower_s": round(lowered - begin, 1),
        }
    figures = compile_for_tpu(
        python,
        module,
        topology=flags.topology,
        replicas=flags.replicas,
        batch_arguments=batch_arguments,
    )
    return {
        **{f"{name}_mib": round(figures[name] / 2**20, 1) for name in MEMORY},
        "gflop": round(figures["flops"] / 1e9, 3),
        "gigabytes": round(figures["bytes"] / 1e9, 3),
        "all_reduces": figures["all_reduces"],
        "lower_s": round(lowered - begin, 1),
        "compile_s": round(time.perf_counter() - lowered, 1),
    }


def print_tables(report: dict[str, Any]) -> None:
    """Prints a report as two tables, memory and operations."""
    console = rich.console.Console()
    console.print(
        f"One training step of {report['model']} for {report['topology']}: "
        f"{report['replicas']} replicas, each with a batch of "
        f"{report['batch_per_replica']}",
        highlight=False,
    )
    rows = report["results"]
    first = next(iter(rows.values()))
    memory = [f"{name}_mib" for name in MEMORY if name != "limit"]
    operations = [key for key in first if not key.endswith("_mib")]
    limit = f"{first['limit_mib']:,} available"
    for title, columns in (
        (f"Memory of one replica in MiB ({limit})", memory),
        ("Operations of one replica, and seconds on this machine", operations),
    ):
        table = rich.table.Table(title=title, title_justify="left")
        table.add_column("", no_wrap=True)
        for key in columns:
            name = key.removesuffix("_mib").replace("_", " ")
            table.add_column(name, justify="right")
        for name, figures in rows.items():
            table.add_row(name, *(f"{figures[key]:,}" for key in columns))
        console.print(table)
    for key, value in machine().items():
        console.print(f"{key}: {value}", highlight=False)


def parse_flags() -> argparse.Namespace:
    """Parses and validates the command line."""
    techniques = [DENSE, *sos.extend.techniques()]
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--model",
        choices=networks.NETWORKS,
        default="convnet",
        help="network to train",
    )
    add(
        "--technique",
        choices=techniques,
        metavar="NAME",
        help=f"one of {', '.join(techniques)}; all by default",
    )
    add("--topology", default="v5e:2x2", help="kind and topology of TPU")
    add(
        "--replicas",
        type=int,
        help="number of replicas; by default the number of chips",
    )
    add(
        "--batch_size",
        type=int,
        default=32,
        help="number of images per replica",
    )
    add(
        "--venv",
        type=pathlib.Path,
        default=ENVIRONMENT,
        help="virtual environment of the compiler, created if missing",
    )
    add(
        "--lower_only",
        action="store_true",
        help="lower the step, but do not compile it",
    )
    add("--json", action="store_true", help="print one JSON object")
    flags = parser.parse_args()
    if not re.fullmatch(r"\w+:\d+(x\d+)+", flags.topology):
        parser.error(
            "--topology must be a kind of TPU and a topology, such as "
            f"v5e:2x2 or v4:2x2x1. Received: {flags.topology}"
        )
    if flags.replicas is None:
        sizes = flags.topology.partition(":")[2].split("x")
        flags.replicas = math.prod(map(int, sizes))
    for name in ("replicas", "batch_size"):
        if getattr(flags, name) < 1:
            parser.error(
                f"--{name} must be at least 1. Received: {getattr(flags, name)}"
            )
    flags.techniques = [flags.technique] if flags.technique else techniques
    return flags


def main() -> None:
    """Compiles and prints a table or JSON."""
    flags = parse_flags()
    python = None
    if not flags.lower_only:
        python = make_environment(flags.venv.expanduser().resolve())
    results: dict[str, dict[str, float]] = {}
    errors: dict[str, str] = {}
    for technique in flags.techniques:
        try:
            results[technique] = measure(technique, flags, python)
        except RuntimeError as error:
            errors[technique] = str(error)
            print(
                f"{technique}: the compiler failed: {error}",
                file=sys.stderr,
                flush=True,
            )
    report = {
        "benchmark": "tpu_compile",
        "model": flags.model,
        "topology": flags.topology,
        "replicas": flags.replicas,
        "batch_per_replica": flags.batch_size,
        "compiler": None if flags.lower_only else REQUIREMENT,
        "errors": errors,
        "results": results,
    }
    if flags.json:
        print(json.dumps({**report, "machine": machine()}))
    elif flags.lower_only:
        print_report(f"One training step of {flags.model}", report, False)
    elif results:
        print_tables(report)
    if errors:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
