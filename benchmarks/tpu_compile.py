"""Compiles training steps for a TPU, on a machine without one.

    python -m benchmarks.tpu_compile
        [--model=convnet|resnet50|transformer|attention]
        [--technique=NAME,NAME] [--batch_size=N,N] [--replicas=N]
        [--topology=v5e:2x2] [--lower_only] [--json]
    python -m benchmarks.tpu_compile --config=FILE:ARGUMENT
        [--set=NAME=VALUE] ...

The engine's training step is traced under a TPUStrategy without a TPU
(`sos.training.tpu_check`), checked, lowered, and compiled by the TPU compiler,
libtpu, for a described topology. It is that of a network of the benchmarks with
any technique, in mixed bfloat16, or with `--config` that of a run, with its
loss, optimizer, dtypes and gradient accumulation. This shows whether it
compiles, its memory and its operations, but not its speed.

The compiler is installed with JAX in its own virtual environment on the first
call (200 MB to download, 1.3 GB on the disk). On two cores, a technique takes
less than a minute with the small network; magnitude pruning of ResNet-50 took
seven. `--lower_only` stops before the compiler, does not install it, and takes
seconds.

Results are for one replica and one step. "Total" is the memory of arguments,
temporaries, code and results; variables are updated in place. "Peak" is
reported by the compiler. It may exceed the total, and seems to include the
core's small memories. A step that does not fit is a result: its row says so,
and the others go on. TensorFlow's runtime may need more memory, and the
lowering approximates in two places: see `benchmarks.tpu_lowering`.
"""

import argparse
import ast
import contextlib
import functools
import json
import math
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import ml_collections
import rich.table
import tensorflow as tf

import sos
from benchmarks import networks, training
from benchmarks.common import (
    console,
    integers,
    machine,
    print_report,
    techniques,
)
from benchmarks.compilers import (
    FOLDER,
    OutOfMemory,
    make_environment,
    run_worker,
)
from benchmarks.lowering import specs
from benchmarks.tpu_lowering import lower
from models.config_flag import load_config
from sos.errors import UsageError, reason
from sos.experiments.config import resolve
from sos.experiments.task import make_task
from sos.training import tpu_check

REQUIREMENT = "jax[tpu]==0.10.2"
ENVIRONMENT = FOLDER / "tpu_compile"
WORKER = pathlib.Path(__file__).with_name("tpu_compile_worker.py")
# Memory figures to print. The limit is what the compiler may use.
MEMORY = ("arguments", "temporaries", "code", "total", "peak", "limit")


def trace_network(
    model_name: str, technique: str, replicas: int, batch: int
) -> Any:
    """Traces the training step of a network of the benchmarks.

    Args:
        model_name: One of `networks.NETWORKS`.
        technique: Name of a technique, or "dense".
        replicas: Number of replicas.
        batch: Batch size of one replica.

    Returns:
        A concrete function of a batch.
    """
    keras.config.set_dtype_policy("mixed_bfloat16")
    network = networks.NETWORKS[model_name]
    return _trace(
        lambda: training.prepare(model_name, technique, batch * replicas),
        specs(network.data(batch, network.size)),
        replicas,
    )


def trace_config(
    config: ml_collections.ConfigDict, replicas: int, batch: int
) -> Any:
    """Traces the training step of a run.

    Args:
        config: The config. Its batch size is replaced.
        replicas: Number of replicas.
        batch: Batch size of one replica.

    Returns:
        A concrete function of a batch.

    Raises:
        UsageError: If the config is invalid.
    """
    config.batch_size = batch * replicas
    keras.config.set_dtype_policy(config.dtype_policy)
    task = make_task(resolve(config))
    context = tf.distribute.InputContext(num_replicas_in_sync=replicas)
    return _trace(
        lambda: training.prepare_task(task),
        task.train_dataset(context, 0).element_spec,
        replicas,
    )


def _trace(
    prepare: Callable[[], training.Training], batch_spec: Any, replicas: int
) -> Any:
    """Traces a training step and checks its TPU compatibility.

    Args:
        prepare: Makes the training in the scope of the strategy.
        batch_spec: Specs of the tensors of a replica's batch, in any structure.
        replicas: Number of replicas.

    Returns:
        A concrete function of a batch.
    """
    strategy = tpu_check.deviceless_strategy(replicas)
    # One replica's variables are lowered. A packed variable represents those of
    # all replicas, and only a TPU can unpack it.
    strategy._enable_packed_variable_in_eager_mode = False
    with strategy.scope():
        prepared = prepare()
    if prepared.updater:
        # Not `start`, which would update masks, for which it needs a TPU.
        prepared.updater.resume()

    def replica_step(batch: Any) -> None:
        # Without the results, which go to the host.
        prepared.loss(batch)

    @tf.function
    def train(batch: Any) -> None:
        strategy.run(replica_step, args=(batch,))

    function = train.get_concrete_function(batch_spec)
    tpu_check.check(function)
    return function


def measure(
    make_trace: Callable[[], Any],
    flags: argparse.Namespace,
    python: pathlib.Path | None,
) -> dict[str, float]:
    """Measures one step.

    Args:
        make_trace: Returns the concrete function of the step.
        flags: The flags.
        python: Path of Python in the compiler's environment; None to only
            lower the step.

    Returns:
        Figures to print, by name.

    Raises:
        OutOfMemory: If the step does not fit the TPU's memory.
        RuntimeError: If the compiler rejects the step.
    """
    begin = time.perf_counter()
    module, batch_arguments = lower(make_trace())
    # The compiler needs the memory of the model and its graph.
    training.forget()
    lowered = time.perf_counter()
    if python is None:
        return {
            "stablehlo_kib": round(len(module) / 2**10, 1),
            "batch_arguments": batch_arguments,
            "lower_s": round(lowered - begin, 1),
        }
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "step.mlirbc"
        path.write_bytes(module)
        figures = run_worker(
            python, WORKER, path, flags.topology, flags.replicas
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
    output = console()
    output.print(
        f"One training step of {report['model']} for {report['topology']}: "
        f"{report['replicas']} replicas",
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
        table.add_column("technique, batch of a replica", no_wrap=True)
        for key in columns:
            name = key.removesuffix("_mib").replace("_", " ")
            table.add_column(name, justify="right")
        for name, figures in rows.items():
            table.add_row(name, *(f"{figures[key]:,}" for key in columns))
        for name in report["out_of_memory"]:
            table.add_row(f"{name}: does not fit")
        output.print(table)
    for key, value in {"compiler": report["compiler"], **machine()}.items():
        # Without markup, which brackets in a requirement would be.
        output.print(f"{key}: {value}", highlight=False, markup=False)


def parse_flags() -> argparse.Namespace:
    """Parses and validates the command line."""
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
        type=techniques,
        default=",".join([networks.DENSE, *sos.extend.techniques()]),
        help="techniques, separated by commas",
    )
    add(
        "--config",
        action="append",
        default=[],
        metavar="FILE[:ARGUMENT]",
        help="the run of a config, instead of --model and --technique; may be "
        "repeated",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="entry of the configs to override, such as data.name=synthetic; "
        "may be repeated",
    )
    add("--topology", default="v5e:2x2", help="kind and topology of TPU")
    add(
        "--replicas",
        type=int,
        help="number of replicas; by default the number of chips",
    )
    add(
        "--batch_size",
        type=integers,
        default="32",
        help="number of examples per replica; several separated by commas",
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
    if flags.set and not flags.config:
        parser.error("--set is for --config only")
    if not re.fullmatch(r"\w+:\d+(x\d+)+", flags.topology):
        parser.error(
            "--topology must be a kind of TPU and a topology, such as "
            f"v5e:2x2 or v4:2x2x1. Received: {flags.topology}"
        )
    if flags.replicas is None:
        sizes = flags.topology.partition(":")[2].split("x")
        flags.replicas = math.prod(map(int, sizes))
    for name, least in (
        ("replicas", flags.replicas),
        ("batch_size", min(flags.batch_size)),
    ):
        if least < 1:
            parser.error(f"--{name} must be at least 1. Received: {least}")
    return flags


def _load(path: str, overrides: Sequence[str]) -> ml_collections.ConfigDict:
    """Loads a config file and overrides entries.

    Args:
        path: FILE or FILE:ARGUMENT.
        overrides: NAME=VALUE. Values are Python literals or, failing that,
            strings.

    Raises:
        UsageError: If an override is invalid.
        SystemExit: If the file cannot be loaded.
    """
    config, _ = load_config(path)
    # Unknown entries raise.
    config.lock()
    for override in overrides:
        name, _, value = override.partition("=")
        with contextlib.suppress(SyntaxError, ValueError):
            value = ast.literal_eval(value)
        try:
            config.update_from_flattened_dict({name: value})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UsageError(
                "--set must be NAME=VALUE, with the name of an entry of the "
                "config and a value of its type, such as "
                f"data.name=synthetic. Received: {override}. Cause: "
                f"{reason(error)}"
            ) from error
    return config


def traces(
    flags: argparse.Namespace,
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yields the name of each step, and a function that traces it."""
    for batch in flags.batch_size:
        for path in flags.config:
            yield (
                f"{path.partition(':')[2] or path}, {batch}",
                functools.partial(
                    trace_config,
                    _load(path, flags.set),
                    flags.replicas,
                    batch,
                ),
            )
        if flags.config:
            continue
        for technique in flags.technique:
            yield (
                f"{technique}, {batch}",
                functools.partial(
                    trace_network,
                    flags.model,
                    technique,
                    flags.replicas,
                    batch,
                ),
            )


def main() -> None:
    """Compiles and prints a table or JSON."""
    flags = parse_flags()
    try:
        report = compile_steps(flags)
    except UsageError as error:
        sys.exit(f"FATAL {error}")
    if flags.json:
        print(json.dumps({**report, "machine": machine()}))
    elif flags.lower_only:
        print_report(f"One training step of {report['model']}", report, False)
    elif report["results"]:
        print_tables(report)
    else:
        for name in report["out_of_memory"]:
            print(f"{name}: does not fit")
    if report["errors"]:
        raise SystemExit(1)


def compile_steps(flags: argparse.Namespace) -> dict[str, Any]:
    """Compiles the steps that the flags select.

    Returns:
        The report.

    Raises:
        UsageError: If a config is invalid.
    """
    steps = list(traces(flags))
    python = None
    if not flags.lower_only:
        python = make_environment(flags.venv, REQUIREMENT, "200 MB")
    results: dict[str, dict[str, float]] = {}
    out_of_memory: dict[str, str] = {}
    errors: dict[str, str] = {}
    for name, make_trace in steps:
        try:
            results[name] = measure(make_trace, flags, python)
            message = json.dumps(results[name])
        except OutOfMemory as error:
            out_of_memory[name] = message = str(error)
        except RuntimeError as error:
            errors[name] = str(error)
            message = f"the compiler failed: {error}"
        # At once, as one may take an hour.
        print(f"{name}: {message}", file=sys.stderr, flush=True)
    return {
        "benchmark": "tpu_compile",
        "model": "a run" if flags.config else flags.model,
        "topology": flags.topology,
        "replicas": flags.replicas,
        "compiler": None if flags.lower_only else REQUIREMENT,
        "errors": errors,
        "out_of_memory": out_of_memory,
        "results": results,
    }


if __name__ == "__main__":
    main()
