"""Lowers a traced TPU cluster to StableHLO for a TPU compiler.

Without a TPU, TensorFlow cannot lower a cluster. Therefore the graph is edited
to an ordinary function of one replica, which TensorFlow's compiler for CPUs
lowers. Collectives become those of XLA. The lowering of a few operations
(random numbers, resizing) may differ from a TPU's.
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
        StableHLO bytecode, a function of the arguments followed by the used
        variables; and the number of arguments before the variables.
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

    # TensorFlow exposes only the lowering of compiled functions.
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
    """Replaces operations that only a TPU has by those of XLA."""
    kind = node.op
    for name in [name for name in node.attr if name.startswith("_")]:
        del node.attr[name]
    node.device = ""
    if kind == "TPUReplicatedInput":
        # It has one input per replica: take the first.
        _replace(node, "Identity", "T", inputs=1)
    elif kind in ("TPUReplicateMetadata", "TPUCompilationResult"):
        _replace(node, "NoOp", inputs=0)
    elif kind == "CrossReplicaSum":
        _replace(node, "XlaAllReduce", "T")
        node.attr["reduce_op"].s = b"Add"
        node.attr["mode"].s = b"CrossReplica"
    elif kind == "AllToAll":
        # TensorFlow broadcasts a variable's value from the first replica by an
        # AllToAll of N equal values along the first axis. XLA on CPUs lacks it.
        if node.attr["concat_dimension"].i != node.attr["split_dimension"].i:
            raise NotImplementedError(
                f"The collective {node.name!r} (AllToAll) changes shapes, "
                "which is not supported."
            )
        _replace(node, "Identity", "T", inputs=1)


def _replace(
    node: Any, operation: str, *attributes: str, inputs: int | None = None
) -> None:
    """Replaces the operation of a node; keeps some attributes and inputs."""
    types = {name: node.attr[name].type for name in attributes}
    sources = [source for source in node.input if not source.startswith("^")]
    control_inputs = [s for s in node.input if s.startswith("^")]
    node.op = operation
    node.attr.clear()
    for name, value in types.items():
        node.attr[name].type = value
    del node.input[:]
    node.input.extend([*sources[:inputs], *control_inputs])


def _remove_placeholders(definition: Any) -> None:
    """Removes the placeholders, which `import_graph_def` replaces."""
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
