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
- `--export=FOLDER` writes all that a machine with a GPU and JAX, of the version
  that it prints, needs. There `python FOLDER/gpu_step_worker.py FOLDER`
  measures, and here `--results=FOLDER` prints what that wrote into
  FOLDER/results.json.

`--mask_update` adds the compiled part of an update of all masks of the network:
ranking, and counting what changes. It is compared with one read of all weights
and write of all masks, in a kernel for each tensor, and with sorting each
tensor, as tensorflow-model-optimization does.

The compiler is installed with JAX in its own virtual environment on the first
call (2 GB to download, 5.5 GB on the disk). Without a GPU, on two cores,
ResNet-50 takes one to two minutes for each technique, sorting four, and the
check of the small network half a minute for each.

"GiB" is the memory of arguments, temporaries and results; variables are
updated in place. "GB moved" is what XLA expects its kernels to read and write;
those in a loop count once. A module that does not fit the memory is a result:
its row says so, and the others go on.
"""

import argparse
import json
import pathlib
import shutil
import sys
import tempfile
from typing import Any

import tensorflow as tf

import sos
from benchmarks import gpu_modules
from benchmarks.common import integers, machine, techniques
from benchmarks.compilers import (
    FOLDER,
    make_environment,
    run_worker,
    visible_gpus,
)
from benchmarks.gpu_report import print_tables, read_report
from benchmarks.gpus import GPUS
from benchmarks.networks import DENSE, NETWORKS

REQUIREMENT = "jax[cuda12]==0.10.2"
ENVIRONMENT = FOLDER / "gpu_step"
WORKER = pathlib.Path(__file__).with_name("gpu_step_worker.py")
# What runs in the compiler's environment.
PROGRAMS = (WORKER.name, "xla_module.py", "recipes.py")

# A GPU takes more examples than a CPU, where it can.
BATCH_SIZES = {"resnet50": 256}
CHECK_BATCH_SIZE = 4


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
    modules = gpu_modules.Modules(folder)
    add = gpu_modules.add_steps
    if action == "check":
        add = gpu_modules.add_checks
    add(modules, flags.model, flags.technique, flags.batch_size, flags.size)
    if flags.mask_update:
        gpu_modules.add_mask_updates(modules, flags.model)
    modules.write_plan(
        action=action,
        model=flags.model,
        size=flags.size,
        gpu=flags.gpu,
        description=GPUS[flags.gpu],
        compiler=REQUIREMENT,
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
            if together and not (folder / "results.json").is_file():
                raise SystemExit(
                    f"The GPU cannot be used: {error}. With --compile_only no "
                    "GPU is needed."
                ) from None
            print(f"Ended early: {error}", file=sys.stderr, flush=True)
            add_errors(folder, names, str(error))


def add_errors(folder: pathlib.Path, names: list[str], error: str) -> None:
    """Adds the error of modules whose worker failed before their result."""
    path = folder / "results.json"
    results = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    results = {**{name: {"error": error} for name in names}, **results}
    path.write_text(json.dumps(results), "utf-8")


def measure(flags: argparse.Namespace) -> dict[str, Any]:
    """Lowers, compiles and perhaps runs.

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
    # Removed only at the end.
    folder = pathlib.Path(tempfile.mkdtemp(prefix="gpu_step_"))
    print(
        f"If this is cut off, --results={folder} prints what it reached.",
        file=sys.stderr,
        flush=True,
    )
    write_modules(folder, action, flags)
    execute(folder, python)
    report = read_report(folder)
    shutil.rmtree(folder)
    return report


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
        print(
            f"Wrote {flags.export}. On a machine with a GPU, copy it, install "
            f"{REQUIREMENT}, and run: python {flags.export.name}/{WORKER.name} "
            f"{flags.export.name}",
            file=sys.stderr,
        )
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
