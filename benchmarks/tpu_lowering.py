"""Turns a traced TPU cluster into what a TPU's compiler takes.

TensorFlow without a TPU has no way from a cluster to StableHLO. So the graph is
edited until it is an ordinary function of one replica, which TensorFlow's
compiler for CPUs lowers; collectives stay in it as those of XLA. The lowering
of a few operations (random numbers, resizing) may differ from a TPU's.
"""

from typing import Any

import tensorflow as tf


def lower(function: Any) -> tuple[bytes, int]:
    """Lowers the cluster of a traced function, for one of its replicas.

    Args:
        function: A concrete function whose arguments are tensors, and which
            calls `strategy.run` once and returns nothing. The strategy's
            variables must not be packed.

    Returns:
        StableHLO bytecode, a function of the arguments and then the variables
        that are used; and how many arguments come before the variables.
    """
    graph = function.graph
    definition = graph.as_graph_def()
    for node in definition.node:
        _edit(node)
    for called in definition.library.function:
        for node in called.node_def:
            _edit(node)
    _remove_placeholders(definition)
    used = {
        _node_name(source) for node in definition.node for source in node.input
    }
    captured = {inner.name: outer for outer, inner in graph.captures}
    inputs = [t for t in graph.inputs if t.op.name in used]
    arguments = [t for t in inputs if t.name not in captured]

    # Compiled code is the one thing that TensorFlow shows the lowering of.
    @tf.function(jit_compile=True, autograph=False)
    def replica(*tensors: tf.Tensor) -> tf.Tensor:
        values = dict(zip((t.name for t in arguments), tensors, strict=True))
        here = tf.compat.v1.get_default_graph()
        for tensor in inputs:
            if tensor.name in captured:
                values[tensor.name] = here.capture(captured[tensor.name])
        effects = tf.graph_util.import_graph_def(
            definition,
            input_map=values,
            return_elements=[op.name for op in graph.control_outputs],
            name="",
        )
        with tf.control_dependencies(effects):
            return tf.constant(0)

    specs = [tf.TensorSpec(t.shape, t.dtype) for t in arguments]
    lowered = replica.experimental_get_compiler_ir(*specs)(
        stage="stablehlo_serialized", platform_name="CPU"
    )
    return lowered, len(arguments)


def _edit(node: Any) -> None:
    """Replaces what only a TPU knows by what XLA knows."""
    kind = node.op
    for name in [name for name in node.attr if name.startswith("_")]:
        del node.attr[name]
    node.device = ""
    if kind == "TPUReplicatedInput":
        # One input for each replica, of which this is the first.
        _become(node, "Identity", "T", inputs=1)
    elif kind in ("TPUReplicateMetadata", "TPUCompilationResult"):
        _become(node, "NoOp", inputs=0)
    elif kind == "CrossReplicaSum":
        _become(node, "XlaAllReduce", "T")
        node.attr["reduce_op"].s = b"Add"
        node.attr["mode"].s = b"CrossReplica"
    elif kind == "AllToAll":
        # How TensorFlow broadcasts a variable's value from the first replica:
        # of N equal ones along the first axis. There is no such operation.
        if node.attr["concat_dimension"].i != node.attr["split_dimension"].i:
            raise NotImplementedError(
                f"The collective {node.name!r} (AllToAll) changes shapes, "
                "which is not provided for."
            )
        _become(node, "Identity", "T", inputs=1)


def _become(
    node: Any, operation: str, *attributes: str, inputs: int | None = None
) -> None:
    """Makes another operation of a node, with some attributes and inputs."""
    kept = {name: node.attr[name].type for name in attributes}
    sources = [source for source in node.input if not source.startswith("^")]
    after = [source for source in node.input if source.startswith("^")]
    node.op = operation
    node.attr.clear()
    for name, value in kept.items():
        node.attr[name].type = value
    del node.input[:]
    node.input.extend([*sources[:inputs], *after])


def _remove_placeholders(definition: Any) -> None:
    """Removes the inputs, for which tensors are put in on import."""
    names = {n.name for n in definition.node if n.op == "Placeholder"}
    for node in definition.node:
        sources = [
            source
            for source in node.input
            if not source.startswith("^") or _node_name(source) not in names
        ]
        del node.input[:]
        node.input.extend(sources)
    nodes = [n for n in definition.node if n.name not in names]
    del definition.node[:]
    definition.node.extend(nodes)


def _node_name(source: str) -> str:
    return source.removeprefix("^").split(":")[0]
