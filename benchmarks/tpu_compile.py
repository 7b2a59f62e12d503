"""Compiles training steps for a TPU, on a machine that has none.

    python -m benchmarks.tpu_compile [--model=convnet|resnet50]
        [--technique=NAME] [--replicas=N] [--topology=v5e:2x2]
        [--batch_size=N] [--lower_only] [--json]

The engine's own step is traced in mixed bfloat16 under a TPUStrategy that has
no TPU (`sos.training.tpu_check`), checked, lowered, and compiled by the TPU's
real compiler, libtpu, for a described set of chips. That tells whether it
compiles, what memory it takes and what it computes; it cannot tell how fast.

The compiler comes with JAX and lives in a virtual environment of its own, which
is made on the first call (200 MB to download, 1.3 GB on the disk). With the
small network a technique takes under a minute on two cores, with ResNet-50
magnitude pruning took seven. `--lower_only` stops before the compiler, which it
does not need then: that takes seconds.

Figures are of one replica and one step. "Total" is the memory that is set aside
for arguments, temporaries, code and results; variables are updated in place.
"Peak" is the compiler's own figure and seems to count the core's small memories
as well, as it may be above the total. TensorFlow's runtime may keep more, and
the lowering approximates in two places: see `benchmarks.tpu_lowering`.
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
# The compiler's figures that are printed; the limit is what it may use.
MEMORY = ("arguments", "temporaries", "code", "total", "peak", "limit")


class Classification(Task):
    """Classifies images into one of several classes."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def compute_metrics(
        self, model: keras.Model, batch: Any, training: bool
    ) -> dict[str, tuple[tf.Tensor, tf.Tensor]]:
        """The cross-entropy and the number of right answers."""
        logits = tf.cast(model(batch["image"], training=training), tf.float32)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
            batch["label"], logits
        )
        answers = tf.argmax(logits, axis=-1, output_type=tf.int32)
        right = tf.cast(answers == batch["label"], tf.float32)
        count = tf.cast(tf.size(losses), tf.float32)
        return {
            "loss": (tf.reduce_sum(losses), count),
            "accuracy": (tf.reduce_sum(right), count),
        }


def trace(model_name: str, technique: str, replicas: int, batch: int) -> Any:
    """Traces the engine's training step on replicas, and checks it.

    Args:
        model_name: One of `networks.NETWORKS`.
        technique: The name of a technique, or `DENSE`.
        replicas: The number of replicas.
        batch: The batch size of one replica.

    Returns:
        A concrete function of images and labels.
    """
    strategy = tpu_check.deviceless_strategy(replicas)
    # A packed variable stands for all replicas at once, and only a TPU can
    # unpack it; one replica's variables are to be lowered.
    strategy._enable_packed_variable_in_eager_mode = False
    keras.config.set_dtype_policy("mixed_bfloat16")
    with strategy.scope():
        model = networks.build(model_name, technique, HYPERPARAMETERS)
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True)
        optimizer.build(model.trainable_variables)
        task = Classification(batch * replicas)
        steps = Steps(task, model, optimizer)
    if steps.sparse_weights:
        # Not started: that would update masks, which needs a TPU.
        updater = sos.SparsityUpdater(model, optimizer)
        updater.resume()

    def replica_step(batch: dict[str, tf.Tensor]) -> None:
        # Without its results, which go to the host.
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
    """Makes the compiler's virtual environment, unless it is there.

    Args:
        folder: Where it is to be.

    Returns:
        Its Python.

    Raises:
        SystemExit: If it cannot be made.
    """
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    ready = folder / ".ready"
    # Written last: an installation that was cut off is made anew.
    if ready.is_file() and ready.read_text("utf-8") == REQUIREMENT:
        return python
    if folder.exists() and not (folder / "pyvenv.cfg").is_file():
        if not folder.is_dir() or any(folder.iterdir()):
            raise SystemExit(
                f"{folder} is no virtual environment and not empty. Choose "
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
        said = getattr(error, "stderr", None) or str(error)
        if isinstance(said, bytes):
            said = said.decode(errors="replace")
        lines = [line for line in said.splitlines() if "ERROR" in line]
        reason = (lines or said.splitlines() or ["unknown"])[-1].strip()
        raise SystemExit(
            f"The compiler's environment {folder} cannot be made, which needs "
            f"the network and a folder to write to: {reason}"
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
    """Compiles a lowered step in a process of its own, as it may abort.

    Args:
        python: Python of the compiler's environment.
        module: StableHLO bytecode.
        topology: Name of the set of chips.
        replicas: The number of replicas.
        batch_arguments: How many of the first arguments are data.

    Returns:
        Figures, as `tpu_compile_worker` gives them.

    Raises:
        RuntimeError: If the compiler refuses.
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
        said = result.stderr.strip().splitlines() or ["it said nothing"]
        figures = {"error": f"it ended with {result.returncode}: {said[-1]}"}
    if "error" in figures:
        raise RuntimeError(figures["error"])
    return figures


def _clean_environment() -> dict[str, str]:
    """The environment variables, without those of this environment."""
    foreign = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_LIBRARY_PATH")
    return {k: v for k, v in os.environ.items() if k not in foreign}


def measure(
    technique: str, flags: argparse.Namespace, python: pathlib.Path | None
) -> dict[str, float]:
    """Returns the figures of one technique, as they are printed.

    Args:
        technique: The name of a technique, or `DENSE`.
        flags: The command line.
        python: Python of the compiler's environment; None to lower only.

    Returns:
        The figures by name.

    Raises:
        RuntimeError: If the compiler refuses.
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
    """Prints a report, memory and operations apart, as both are wide."""
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
    limit = f"of {first['limit_mib']:,} that there are"
    for title, columns in (
        (f"Memory of one replica, MiB, {limit}", memory),
        ("Operations of one replica, and seconds taken here", operations),
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
    """Reads and checks the command line."""
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
        help="what is trained",
    )
    add(
        "--technique",
        choices=techniques,
        metavar="NAME",
        help=f"one of {', '.join(techniques)}; all by default",
    )
    add("--topology", default="v5e:2x2", help="kind and arrangement of chips")
    add(
        "--replicas",
        type=int,
        help="one for each core; by default the number of chips",
    )
    add("--batch_size", type=int, default=32, help="images for each replica")
    add(
        "--venv",
        type=pathlib.Path,
        default=ENVIRONMENT,
        help="the compiler's virtual environment, made if need be",
    )
    add("--lower_only", action="store_true", help="do not compile")
    add("--json", action="store_true", help="print one JSON object instead")
    flags = parser.parse_args()
    if not re.fullmatch(r"\w+:\d+(x\d+)+", flags.topology):
        parser.error(
            "--topology must be a kind of TPU and an arrangement, such as "
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
    """Compiles, and prints a table or JSON."""
    flags = parse_flags()
    python = None
    if not flags.lower_only:
        python = make_environment(flags.venv.expanduser().resolve())
    results: dict[str, dict[str, float]] = {}
    refused: dict[str, str] = {}
    for technique in flags.techniques:
        try:
            results[technique] = measure(technique, flags, python)
        except RuntimeError as error:
            refused[technique] = str(error)
            print(
                f"{technique}: the compiler refuses: {error}",
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
        "refused": refused,
        "results": results,
    }
    if flags.json:
        print(json.dumps({**report, "machine": machine()}))
    elif flags.lower_only:
        print_report(f"One training step of {flags.model}", report, False)
    elif results:
        print_tables(report)
    if refused:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
