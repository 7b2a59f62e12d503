"""TPU compatibility check of a training step, on a machine without a TPU.

`deviceless_strategy` returns TensorFlow's TPUStrategy with the description of a
TPU that does not exist. Under it a step is traced into the cluster that a TPU
would compile. `check` looks up every operation of the cluster in a table of
those that the TPU compiler accepts. Nothing is run, so results, speed and
memory stay unknown (`benchmarks/tpu_compile.py` in the source tree also runs
the compiler).

The table, data/tpu_ops_tf2.20.json, lists the kernels of each operation and the
types that each kernel accepts. It is the registry of the newest TensorFlow for
TPUs: the kernels of the device XLA_TPU_JIT that
`tensorflow.python.framework.kernels.get_all_registered_kernels()` lists in
tensorflow-tpu 2.20.0 with libtpu 0.0.21. A first call of
`experimental_get_compiler_ir`, which needs no TPU either, loads them.
"""

import collections
import dataclasses
import functools
import importlib.resources
import json
import operator
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

# It has no public name.
from tensorflow.python.tpu.tpu_system_metadata import TPUSystemMetadata

from sos.errors import UsageError

_TABLE = "tpu_ops_tf2.20.json"
_HOST = "/job:localhost/replica:0/task:0/device:"
_Device = collections.namedtuple("_Device", ["name", "device_type"])

# Operations that mark a cluster. The compiler removes them.
_MARKERS = ("TPUReplicateMetadata", "TPUCompilationResult")

# Operations of static shapes that the compiler evaluates. The size of their
# outputs, axes to sum over, is unknown until then.
_EVALUATED = ("BroadcastGradientArgs",)


class _Resolver(tf.distribute.cluster_resolver.ClusterResolver):
    """Describes one host with a TPU that does not exist."""

    task_type = "localhost"
    task_id = 0
    environment = ""
    tpu_topology = None
    tpu_hardware_feature = None

    def __init__(self, cores: int) -> None:
        self._cores = cores

    def get_tpu_system_metadata(self) -> TPUSystemMetadata:
        return TPUSystemMetadata(
            num_cores=self._cores,
            num_hosts=1,
            num_of_cores_per_host=self._cores,
            topology=None,
            devices=[
                _Device(f"{_HOST}CPU:0", "CPU"),
                *(
                    _Device(f"{_HOST}TPU:{i}", "TPU")
                    for i in range(self._cores)
                ),
            ],
        )

    def cluster_spec(self) -> tf.train.ClusterSpec:
        return tf.train.ClusterSpec({})

    def master(self, *args: Any, **kwargs: Any) -> str:
        return ""

    def num_accelerators(self, *args: Any, **kwargs: Any) -> dict[str, int]:
        return {"TPU": self._cores}

    def get_job_name(self) -> str:
        return "localhost"

    def get_coordination_service_leader(self) -> str:
        return ""


def deviceless_strategy(replicas: int) -> tf.distribute.TPUStrategy:
    """Returns a TPUStrategy on a machine without a TPU, for tracing only.

    Its variables are in the host's memory, because their devices do not exist.
    They can be assigned, read and saved outside of `strategy.run`. Running a
    function with a cluster raises an error. The process may also use other
    strategies.

    Args:
        replicas: Number of replicas, one for each core; at least 1.

    Returns:
        The strategy.

    Raises:
        UsageError: If `replicas` is not a positive integer, or soft device
            placement is off.

    Example:
    >>> from sos.training import tpu_check
    >>> strategy = tpu_check.deviceless_strategy(8)
    >>> strategy.num_replicas_in_sync
    8
    """
    try:
        valid = operator.index(replicas) >= 1
    except TypeError:
        valid = False
    if not valid:
        raise UsageError(
            "`replicas` must be an integer of at least 1. "
            f"Received: replicas={replicas!r}"
        )
    if not tf.config.get_soft_device_placement():
        raise UsageError(
            "The TPU compatibility check needs soft device placement, "
            "TensorFlow's default, because there is no TPU to place variables "
            "on. Remove `tf.config.set_soft_device_placement(False)`."
        )
    return tf.distribute.TPUStrategy(_Resolver(operator.index(replicas)))


def check(function: Any) -> None:
    """Raises an error that lists all violations in a function, if any.

    Args:
        function: A concrete function, as for `violations`.

    Raises:
        UsageError: If there are violations, or no TPU cluster.
        TypeError: If `function` is not a concrete function.

    Example:
    >>> import tensorflow as tf
    >>> from sos.training import tpu_check
    >>> strategy = tpu_check.deviceless_strategy(8)
    >>> def double(x):  # Not a lambda: the cluster is named after it.
    ...     return 2.0 * x
    >>> @tf.function
    ... def step(x):
    ...     return strategy.run(double, args=(x,))
    >>> tpu_check.check(step.get_concrete_function(tf.TensorSpec((4,))))
    """
    if lines := violations(function):
        listed = "".join(f"\n- {line}" for line in lines)
        raise UsageError(
            "The TPU compiler would not accept this function. Decode, print "
            "and work on strings on the host, use other operations and types, "
            "and give every tensor a static shape, inputs too "
            "(`drop_remainder=True`; without it their operation is "
            f"XlaSetDynamicDimensionSize):{listed}"
        )


def violations(function: Any) -> list[str]:
    """Lists operations in a traced function that a TPU does not accept.

    Checks all operations that `strategy.run` puts into TPU clusters, including
    clusters in host loops, and loops, branches and functions in clusters. The
    operation and its types must be in the table, and all shapes must be static.
    An operation that TensorFlow could move to the host, at the cost of a
    transfer in every step, is a violation.

    Args:
        function: A concrete function, from `get_concrete_function` of a
            `tf.function` that calls `run` of a `deviceless_strategy`.

    Returns:
        One line per kind of violation, with its count and an example. Of
        several dependent tensors without a static shape only the first is
        listed.

    Raises:
        TypeError: If `function` is not a concrete function.
        UsageError: If `function` contains no TPU cluster.

    Example:
    >>> import tensorflow as tf
    >>> from sos.training import tpu_check
    >>> strategy = tpu_check.deviceless_strategy(8)
    >>> def lengths(text):
    ...     return tf.strings.length(text)
    >>> @tf.function
    ... def step(text):
    ...     return strategy.run(lengths, args=(text,))
    >>> spec = tf.TensorSpec((4,), tf.string)
    >>> lines = tpu_check.violations(step.get_concrete_function(spec))
    >>> print(lines[-1].partition(" (")[0])
    StringLength: a TPU has no such operation
    """
    graph = getattr(function, "graph", None)
    if not isinstance(graph, tf.Graph):
        raise TypeError(
            "The TPU compatibility check takes a traced function: "
            "`my_function.get_concrete_function(...)` of a `tf.function`. "
            f"Received: function={function!r} of type {type(function).__name__}"
        )
    places_of: dict[str, list[str]] = {}
    empty = True
    for node in _cluster_nodes(graph):
        empty = False
        for problem in _problems(node):
            places_of.setdefault(problem, []).append(node.place)
    if empty:
        raise UsageError(
            "The function contains no TPU cluster to check. It must call "
            "`strategy.run` of a `deviceless_strategy`. "
            f"Received: function={function!r}"
        )
    return [
        f"{problem} ({len(places)} "
        f"{'node' if len(places) == 1 else 'nodes'}, such as {places[0]})"
        for problem, places in places_of.items()
    ]


@dataclasses.dataclass(frozen=True)
class _Node:
    """A node of a cluster.

    Attributes:
        definition: Its NodeDef, with the shapes of its outputs.
        place: Its name and that of its function.
        dynamic_input: Whether an input tensor has no static shape.
    """

    definition: Any
    place: str
    dynamic_input: bool


def _problems(node: _Node) -> Iterator[str]:
    definition = node.definition
    operation = definition.op
    if operation in _MARKERS:
        return
    kernels = _table().get(operation)
    if kernels is None:
        yield f"{operation}: a TPU has no such operation"
    elif kernels:
        wrong = [_wrong_types(definition, kernel) for kernel in kernels]
        if all(wrong):
            # Of several kernels the most similar one.
            types = ", ".join(min(wrong, key=len))
            yield f"{operation} with {types}: a TPU does not support this type"
    if not node.dynamic_input and operation not in _EVALUATED:
        for shape in dict.fromkeys(map(str, _dynamic_shapes(definition))):
            yield f"{operation} of shape {shape}: the shape is not static"


def _wrong_types(definition: Any, kernel: dict[str, set[int]]) -> list[str]:
    wrong = []
    for name, allowed in kernel.items():
        value = definition.attr[name] if name in definition.attr else None
        if value is None or not allowed:
            continue
        single = value.WhichOneof("value") == "type"
        types = [value.type] if single else value.list.type
        wrong += [
            f"{name}={tf.as_dtype(other).name}"
            for other in dict.fromkeys(types)
            if other not in allowed
        ]
    return wrong


def _dynamic_shapes(definition: Any) -> list[tf.TensorShape]:
    shapes = map(tf.TensorShape, definition.attr["_output_shapes"].list.shape)
    return [shape for shape in shapes if not shape.is_fully_defined()]


def _cluster_nodes(graph: tf.Graph) -> Iterator[_Node]:
    """Yields all nodes of clusters, each function once."""
    definition = graph.as_graph_def(add_shapes=True)
    functions = {f.signature.name: f for f in definition.library.function}
    visited = set()
    # Of each function: nodes, whether they are in a cluster, names of arguments
    # without a static shape, and its name.
    pending = [(definition.node, False, frozenset(), "")]
    while pending:
        nodes, inside, dynamic, where = pending.pop()

        # A host loop has its clusters in its body, which is a function.
        def is_in_cluster(node: Any, inside: bool = inside) -> bool:
            return inside or "_tpu_replicate" in node.attr

        dynamic |= {
            node.name
            for node in nodes
            if is_in_cluster(node) and _dynamic_shapes(node)
        }
        for node in nodes:
            in_cluster = is_in_cluster(node)
            if in_cluster:
                sources = {i.split(":")[0] for i in node.input}
                place = f"{node.name!r}" + (f" in {where}" if where else "")
                yield _Node(node, place, bool(sources & dynamic))
            for name in _called(node):
                if name in functions and (name, in_cluster) not in visited:
                    visited.add((name, in_cluster))
                    called = functions[name]
                    pending.append(
                        (
                            called.node_def,
                            in_cluster,
                            _dynamic_arguments(called)
                            if in_cluster
                            else frozenset(),
                            name,
                        )
                    )


def _called(node: Any) -> Iterator[str]:
    """Yields the names of the functions that a node calls."""
    for value in node.attr.values():
        if value.WhichOneof("value") == "func":
            yield value.func.name
        for function in value.list.func:
            yield function.name


def _dynamic_arguments(function: Any) -> frozenset[str]:
    # The caller, where the tensors come from, is what violates.
    shapes = function.attr["_input_shapes"].list.shape
    return frozenset(
        argument.name
        for argument, shape in zip(
            function.signature.input_arg, shapes, strict=False
        )
        if not tf.TensorShape(shape).is_fully_defined()
    )


@functools.cache
def _table() -> dict[str, list[dict[str, set[int]]]]:
    """Returns, by operation, the valid types of each kernel's attributes."""
    file = importlib.resources.files("sos.training") / "data" / _TABLE
    return {
        operation: [
            {
                name: {tf.as_dtype(t).as_datatype_enum for t in types.split()}
                for name, types in kernel.items()
            }
            for kernel in kernels
        ]
        for operation, kernels in json.loads(file.read_text("utf-8")).items()
    }
