"""Compiles a module for a TPU without one; a subprocess of `tpu_compile`.

    python tpu_compile_worker.py MODULE TOPOLOGY REPLICAS

It runs in its own environment, because the compiler (libtpu) comes with JAX,
which is not a dependency of this project. MODULE is a file of StableHLO
bytecode. The last line of the output is a JSON object: figures, or an "error".
"""

import importlib
import json
import os
import re
import sys

# There is no metadata server to query, and no TPU to lock.
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
os.environ["TPU_WORKER_ID"] = "0"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

# Imported by name, because the project's environment lacks them, and from this
# folder, because this environment lacks the project.
topologies = importlib.import_module("jax.experimental.topologies")
xla_module = importlib.import_module("xla_module")

# Larger than the memory of any TPU: the error contains the available memory.
TOO_BIG = """
module @too_big {
  func.func public @main(%x: tensor<1099511627776xf32>)
      -> tensor<1099511627776xf32> {
    %y = stablehlo.add %x, %x : tensor<1099511627776xf32>
    return %y : tensor<1099511627776xf32>
  }
}
"""


def memory_limit(devices):
    """Returns the bytes of one core's memory that the compiler may use."""
    try:
        xla_module.compile_module(xla_module.parse(TOO_BIG), devices[:1])
    except Exception as error:
        match = re.search(r"available HBM \(([\d.]+)G\)", str(error))
        if match:
            return int(float(match.group(1)) * 2**30)
    return None


def measure(path, topology, replicas):
    """Compiles a file; returns figures of one replica, memory in bytes."""
    devices = topologies.get_topology_desc(
        topology_name=topology, platform="tpu"
    ).devices
    if replicas > len(devices):
        return {
            "error": f"{topology} has {len(devices)} cores, too few for "
            f"{replicas} replicas. Choose a larger --topology or fewer "
            "--replicas."
        }
    with xla_module.context():
        limit = memory_limit(devices)
        module, _ = xla_module.read(path)
        executable = xla_module.compile_module(module, devices[:replicas])
    text = xla_module.text(executable)
    return {
        "limit": limit,
        **xla_module.figures(executable),
        "all_reduces": len(re.findall(r" all-reduce(?:-start)?\(", text)),
    }


def main():
    """Compiles and prints one line of JSON."""
    path, topology, replicas = sys.argv[1:]
    try:
        figures = measure(path, topology, int(replicas))
    except Exception as error:
        figures = {"error": " ".join(str(error).split())}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
