"""Compiles a module for a TPU without one; a subprocess of `tpu_compile`.

    python tpu_compile_worker.py MODULE TOPOLOGY REPLICAS BATCH_ARGUMENTS

It runs in its own environment, because the compiler (libtpu) comes with JAX,
which is not a dependency of this project. MODULE is a file of StableHLO
bytecode. Its first BATCH_ARGUMENTS arguments are data, the others variables.
The last line of the output is a JSON object: figures, or an "error".
"""

import importlib
import json
import os
import pathlib
import re
import sys

# There is no metadata server to query, and no TPU to lock.
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
os.environ["TPU_WORKER_ID"] = "0"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

import numpy as np

# Imported by name, because the project's environment lacks them. Private
# modules are the reason why the version of JAX is pinned.
topologies = importlib.import_module("jax.experimental.topologies")
_jax = importlib.import_module("jax._src.lib")._jax
compiler = importlib.import_module("jax._src.compiler")
mlir = importlib.import_module("jax._src.interpreters.mlir")
ir = importlib.import_module("jax._src.lib.mlir").ir

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


def compile_module(module, devices):
    """Compiles a module for one replica on each of the devices."""
    count = len(devices)
    options = compiler.get_compile_options(
        count, 1, device_assignment=np.arange(count).reshape(count, 1)
    )
    return devices[0].client.compile(
        module,
        executable_devices=_jax.DeviceList(tuple(devices)),
        compile_options=options,
    )


def memory_limit(devices):
    """Returns the bytes of one core's memory that the compiler may use."""
    try:
        compile_module(ir.Module.parse(TOO_BIG), devices[:1])
    except Exception as error:
        match = re.search(r"available HBM \(([\d.]+)G\)", str(error))
        if match:
            return int(float(match.group(1)) * 2**30)
    return None


def remove_copies(operation):
    """Removes `mhlo.copy`, which TensorFlow adds before returned values.

    The compiler accepts only pure StableHLO.
    """
    for region in operation.regions:
        for block in region:
            for child in list(block):
                child = child.operation
                if child.name == "mhlo.copy":
                    child.results[0].replace_all_uses_with(child.operands[0])
                    child.erase()
                else:
                    remove_copies(child)


def update_in_place(module, first):
    """Lets results reuse the memory of arguments, to update variables in place.

    The variable of a result is unknown here. Any of the same type gives the
    same memory.
    """
    (main,) = [
        operation
        for operation in module.body.operations
        if ir.StringAttr(operation.attributes["sym_name"]).value == "main"
    ]
    kind = ir.FunctionType(ir.TypeAttr(main.attributes["function_type"]).value)
    free = [str(argument) for argument in kind.inputs]
    free[:first] = [None] * first
    attributes = [ir.DictAttr.get({}) for _ in free]
    for place, result in enumerate(kind.results):
        if str(result) in free:
            argument = free.index(str(result))
            free[argument] = None
            index = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), place)
            attributes[argument] = ir.DictAttr.get(
                {"tf.aliasing_output": index}
            )
    main.attributes["arg_attrs"] = ir.ArrayAttr.get(attributes)


def measure(path, topology, replicas, batch_arguments):
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
    with mlir.make_ir_context(), ir.Location.unknown():
        limit = memory_limit(devices)
        module = ir.Module.parse(pathlib.Path(path).read_bytes())
        remove_copies(module.operation)
        update_in_place(module, batch_arguments)
        executable = compile_module(module, devices[:replicas])
    memory = executable.get_compiled_memory_stats()
    costs = executable.cost_analysis()
    costs = costs[0] if isinstance(costs, list) else costs
    text = executable.hlo_modules()[0].to_string()
    return {
        "limit": limit,
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
        "total": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "flops": costs.get("flops", 0.0),
        "bytes": costs.get("bytes accessed", 0.0),
        "all_reduces": len(re.findall(r" all-reduce(?:-start)?\(", text)),
    }


def main():
    """Compiles and prints one line of JSON."""
    path, topology, replicas, batch_arguments = sys.argv[1:]
    try:
        figures = measure(path, topology, int(replicas), int(batch_arguments))
    except Exception as error:
        figures = {"error": " ".join(str(error).split())}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
