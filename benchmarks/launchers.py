"""Times three ways of launching the runs of a sweep on this machine.

    python -m benchmarks.launchers [--steps=700] [--seeds=2] [--json]

The same runs of configs/fashion_mnist.py (dense ones, and two sparsities or
penalties of three techniques) are trained in three ways. Each begins with
an empty directory, and its time includes the start of its processes:

- by worker processes that share compiled steps among their runs, as many as
  `sos.experiments.launchers.LocalLauncher` starts by default;
- by one worker process with all cores;
- by one process per run, one after the other.

It takes about seven minutes on two cores.
"""

import argparse
import pathlib
import tempfile
import time
from collections.abc import Callable, Sequence

import ml_collections

import sos
from benchmarks.common import print_report
from configs import fashion_mnist
from sos.experiments import sweeps
from sos.experiments.launchers import LocalLauncher

SPARSITIES = (0.5, 0.9)
VD_PENALTIES = (0.12, 0.3)
L0_PENALTIES = (0.5, 1.3)


def make_configs(
    steps: int, seeds: int, techniques: Sequence[str]
) -> list[ml_collections.ConfigDict]:
    """Returns the configs of the timed runs."""
    config = fashion_mnist.get_config(f"dense,train_steps={steps}")
    grid = fashion_mnist.make_sweep(
        config,
        seeds=range(seeds),
        sparsities=SPARSITIES,
        variational_dropout=VD_PENALTIES,
        l0=L0_PENALTIES,
    )
    return [
        config
        for config in sweeps.expand(config, grid)
        if config.sparsity.technique in (*techniques, None)
        and not config.sparsity.rules
    ]


def launch(configs: Sequence[ml_collections.ConfigDict], workers: int) -> float:
    """Trains runs and returns the duration in seconds."""
    with tempfile.TemporaryDirectory() as workdir:
        begin = time.perf_counter()
        sweeps.run_sweep(
            configs, pathlib.Path(workdir), launcher=LocalLauncher(workers)
        )
        return time.perf_counter() - begin


def main() -> None:
    """Measures and prints a table or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--steps", type=int, default=700, help="steps of each run"
    )
    parser.add_argument(
        "--seeds", type=int, default=2, help="seeds of each point"
    )
    parser.add_argument(
        "--repeats", type=int, default=1, help="measurements of each way"
    )
    parser.add_argument(
        "--techniques",
        default="MagnitudePruning,VariationalDropout,L0Regularization",
        help="techniques besides dense runs, separated by commas",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object"
    )
    flags = parser.parse_args()
    for name in ("steps", "seeds", "repeats"):
        if getattr(flags, name) < 1:
            parser.error(
                f"--{name} must be at least 1. Received: {getattr(flags, name)}"
            )
    names = [name for name in flags.techniques.split(",") if name]
    known = sos.extend.techniques()
    unknown = set(names) - set(known)
    if unknown:
        parser.error(
            f"--techniques must be some of {', '.join(known)}. "
            f"Received: {', '.join(sorted(unknown))}"
        )
    configs = make_configs(flags.steps, flags.seeds, names)
    workers = LocalLauncher().workers
    default = f"default, {workers} workers"
    ways: dict[str, Callable[[], float]] = {
        default: lambda: launch(configs, workers),
        "one worker": lambda: launch(configs, 1),
        "one process per run": lambda: sum(
            launch([config], 1) for config in configs
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(flags.repeats):
        for name, way in ways.items():
            seconds[name].append(way())
    least = min(seconds[default])
    print_report(
        f"{len(configs)} runs of {flags.steps} steps",
        {
            "benchmark": "launchers",
            "runs": len(configs),
            "steps": flags.steps,
            "repeats": flags.repeats,
            "results": {
                name: {
                    "seconds": round(min(times), 1),
                    "seconds_per_run": round(min(times) / len(configs), 2),
                    "times_default": round(min(times) / least, 2),
                }
                for name, times in seconds.items()
            },
        },
        flags.json,
    )


if __name__ == "__main__":
    main()
