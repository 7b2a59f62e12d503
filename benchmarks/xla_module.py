"""Modules of StableHLO that TensorFlow lowered, as JAX compiles them.

The workers of `benchmarks.tpu_compile` and `benchmarks.gpu_step` use it. It
runs in their environments, which have JAX but not this project; private modules
are the reason why the version of JAX is pinned.
"""

import importlib
import pathlib
import re

import numpy as np

# Imported by name, because the project's environment lacks them.
jax = importlib.import_module("jax")
_jax = importlib.import_module("jax._src.lib")._jax
compiler = importlib.import_module("jax._src.compiler")
mlir = importlib.import_module("jax._src.interpreters.mlir")
ir = importlib.import_module("jax._src.lib.mlir").ir

# TensorFlow writes which result is the new value of which argument.
_ALIASES = "mhlo.input_output_alias"
_ALIAS = re.compile(
    r"parameter_number = (\d+) : i64\}, output_index = array<i64(?:: (\d+))?>"
)


def context():
    """Returns the context in which modules are read and compiled."""
    return mlir.make_ir_context()


def read(path):
    """Reads a module, and lets its results reuse the memory of arguments.

    Args:
        path: File of StableHLO bytecode from TensorFlow.

    Returns:
        The module, and by result the argument that it replaces.
    """
    with ir.Location.unknown():
        module = ir.Module.parse(pathlib.Path(path).read_bytes())
        _remove_copies(module.operation)
        aliases = _take_aliases(module)
        _update_in_place(module, aliases)
    return module, aliases


def parse(text):
    """Parses the text of a module."""
    with ir.Location.unknown():
        return ir.Module.parse(text)


def _remove_copies(operation):
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
                    _remove_copies(child)


def _take_aliases(module):
    """Removes attributes of TensorFlow; returns what one of them says."""
    attributes = module.operation.attributes
    text = str(attributes[_ALIASES]) if _ALIASES in attributes else ""
    for name in [getattr(a, "name", a) for a in attributes]:
        if name.startswith("mhlo."):
            del attributes[name]
    return {
        int(result or 0): int(argument)
        for argument, result in _ALIAS.findall(text)
    }


def main_function(module):
    """Returns a module's function of the name "main"."""
    (main,) = [
        operation
        for operation in module.body.operations
        if ir.StringAttr(operation.attributes["sym_name"]).value == "main"
    ]
    return main


def _update_in_place(module, aliases):
    """Lets results reuse the memory of the arguments that they replace."""
    main = main_function(module)
    kind = ir.FunctionType(ir.TypeAttr(main.attributes["function_type"]).value)
    attributes = [ir.DictAttr.get({}) for _ in kind.inputs]
    for result, argument in aliases.items():
        index = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), result)
        attributes[argument] = ir.DictAttr.get({"tf.aliasing_output": index})
    main.attributes["arg_attrs"] = ir.ArrayAttr.get(attributes)


def compile_module(module, devices, options=None, *, load=False):
    """Compiles a module for one replica on each of the devices.

    Args:
        module: The module.
        devices: Devices of one client, or of one topology.
        options: XLA's options by name.
        load: Whether to load the result, for which the devices must exist.

    Returns:
        An executable.
    """
    count = len(devices)
    compile_options = compiler.get_compile_options(
        count,
        1,
        device_assignment=np.arange(count).reshape(count, 1),
        env_options_overrides=options,
    )
    client = devices[0].client
    method = client.compile_and_load if load else client.compile
    return method(
        module,
        executable_devices=_jax.DeviceList(tuple(devices)),
        compile_options=compile_options,
    )


def figures(executable):
    """Returns memory and operations of a compiled module.

    Returns:
        "arguments", "temporaries", "code", "total" and "peak" in bytes,
        "flops", and "bytes", those read and written.
    """
    memory = executable.get_compiled_memory_stats()
    costs = _costs(executable)
    return {
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
    }


def _costs(executable):
    """Returns XLA's analysis of what a compiled module costs, by name."""
    try:
        costs = executable.cost_analysis()
    except jax.errors.JaxRuntimeError:
        # Unknown to a described GPU. Any client can analyse the module.
        costs = _jax.hlo_module_cost_analysis(
            jax.devices()[0].client, executable.hlo_modules()[0]
        )
    return costs[0] if isinstance(costs, list) else costs


def text(executable):
    """Returns the text of the optimized module."""
    return executable.hlo_modules()[0].to_string()
