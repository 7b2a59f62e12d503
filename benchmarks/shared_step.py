"""Times runs of the study that share a compiled step against runs that do not.

    python -m benchmarks.shared_step [--runs=4] [--steps=700] [--json]

For each technique of configs/fashion_mnist.py it trains the same runs twice: by
one runner, as the study does, and each by a runner of its own, which builds and
traces everything anew. The two take turns, run by run.

It takes about ten minutes on two cores.
"""

import argparse
import time

import tensorflow as tf

from benchmarks.common import print_report
from configs import fashion_mnist as config_file
from models import networks
from sos.experiments import runs as runs_lib
from sos.experiments.runner import Runner


def measure(technique: str, count: int, steps: int) -> dict[str, float]:
    """Returns seconds per run, shared and alone, and their ratio."""
    config = config_file.get_config()
    config.techniques = technique
    config.steps = steps
    config.seeds = tuple(range(count))
    data = networks.load_data(config.dataset)
    build_model = networks.builder(config.model)
    runs = runs_lib.expand(config, train_examples=len(data.y_train))[:count]
    shared = Runner(runs[0], data, build_model)
    shared.train(runs[0])  # Traces.
    seconds = {"shared": 0.0, "alone": 0.0}
    for run in runs:
        begin = time.perf_counter()
        shared.train(run)
        seconds["shared"] += time.perf_counter() - begin
        begin = time.perf_counter()
        Runner(run, data, build_model).train(run)
        seconds["alone"] += time.perf_counter() - begin
    return {
        "seconds_shared": seconds["shared"] / count,
        "seconds_alone": seconds["alone"] / count,
        "alone_by_shared": seconds["alone"] / seconds["shared"],
    }


def main() -> None:
    """Measures and prints what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=4, help="per technique")
    parser.add_argument("--steps", type=int, default=700, help="of each run")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    # Tracing anew is what is measured here; no need to be warned of it.
    tf.get_logger().setLevel("ERROR")
    tf.config.experimental.enable_op_determinism()
    tf.config.optimizer.set_experimental_options({"remapping": False})
    techniques = ("dense", "magnitude", "variational_dropout", "l0")
    print_report(
        f"Seconds for a run of {options.steps} steps",
        {
            "runs": options.runs,
            "steps": options.steps,
            "results": {
                technique: measure(technique, options.runs, options.steps)
                for technique in techniques
            },
        },
        options.json,
    )


if __name__ == "__main__":
    main()
