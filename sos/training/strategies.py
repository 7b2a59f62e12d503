"""Distribution strategies, and communication between workers."""

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from sos.errors import ABORTED, UsageError, WorkerLostError, reason

#: The names that `make_strategy` accepts.
STRATEGIES = ("tpu", "mirrored", "multi_worker", "one_device")

# Errors that TensorFlow raises in a worker when another one is lost.
_LOST_WORKER = (
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.FailedPreconditionError,
    tf.errors.UnavailableError,
)

# Dtypes that TensorFlow cannot send to other workers.
_UNSENDABLE_DTYPES = (tf.uint8, tf.int8, tf.uint16, tf.int16)

# The compiled function of `gather`, by strategy.
_GATHER: dict[tf.distribute.Strategy, Callable[[tf.Tensor], tf.Tensor]] = {}


def make_strategy(
    name: str | None = None,
    *,
    tpu: str | None = None,
    cpu_replicas: int | None = None,
) -> tf.distribute.Strategy:
    """Returns a strategy by name, or the default for this machine.

    Call it before anything else uses TensorFlow's devices: a process cannot
    join other workers later. It also turns off a graph rewriter of TensorFlow
    ("remapping") that fails on variational dropout.

    Args:
        name: One of:

            - "tpu"
            - "mirrored": all GPUs of this machine, or all logical CPU devices
              if it has no GPU
            - "multi_worker": the machines that the environment variable
              TF_CONFIG lists
            - "one_device"
            - None: "mirrored" if `cpu_replicas` is set, "tpu" if `tpu` is set
              or the machine has a TPU, "multi_worker" if TF_CONFIG lists
              several workers, "mirrored" if there are several GPUs, else
              "one_device".

        tpu: Name or address of the TPU, or "local" for a TPU of this machine.
        cpu_replicas: Number of logical devices into which "mirrored" divides
            the CPU, to try several replicas without GPUs. They share its cores.

    Returns:
        The strategy.

    Raises:
        UsageError: If the name is unknown, `tpu` or `cpu_replicas` is set for
            another strategy or machine, `cpu_replicas` is below 1 or set for
            several workers, TF_CONFIG is invalid for several workers, or the
            TPU cannot be used.

    Example:
    >>> import sos.training
    >>> strategy = sos.training.make_strategy("one_device")
    >>> strategy.num_replicas_in_sync
    1
    """
    if name is not None and name not in STRATEGIES:
        raise UsageError(
            f"`strategy` must be one of {', '.join(STRATEGIES)}. "
            f"Received: strategy={name!r}"
        )
    if tpu and name not in (None, "tpu"):
        raise UsageError(
            "`tpu` is for the strategy tpu only. "
            f"Received: tpu={tpu!r} with strategy={name!r}"
        )
    if cpu_replicas is not None:
        if name not in (None, "mirrored") or tpu:
            raise UsageError(
                "`cpu_replicas` is for the strategy mirrored only. Received: "
                f"cpu_replicas={cpu_replicas!r} with strategy={name!r}, "
                f"tpu={tpu!r}"
            )
        if cpu_replicas < 1:
            raise UsageError(
                "`cpu_replicas` must be at least 1. "
                f"Received: cpu_replicas={cpu_replicas}"
            )
        if len(_workers()) > 1:
            # Each would train alone, in the same directory.
            raise UsageError(
                "`cpu_replicas` is for a single process. Remove it, or unset "
                f"TF_CONFIG. Received: cpu_replicas={cpu_replicas} with "
                f"{len(_workers())} workers in TF_CONFIG"
            )
        name = "mirrored"
        _divide_cpu(cpu_replicas)
    # This graph rewriter fails on noise between a bias and its activation: it
    # prints an error, without other effects.
    tf.config.optimizer.set_experimental_options({"remapping": False})
    if name is None:
        name = _name_for_this_machine(tpu)
    if name == "tpu":
        return _tpu_strategy(tpu or "local")
    if name == "multi_worker":
        _check_workers()
        return _join_workers()
    gpus = tf.config.list_logical_devices("GPU")
    cpus = tf.config.list_logical_devices("CPU")
    if name == "one_device":
        return tf.distribute.OneDeviceStrategy((gpus or cpus)[0].name)
    devices = [device.name for device in gpus or cpus]
    if gpus:
        return tf.distribute.MirroredStrategy(devices)
    return tf.distribute.MirroredStrategy(
        devices,
        # The default collectives fail if a process has several strategies.
        cross_device_ops=tf.distribute.ReductionToOneDevice(),
    )


def _divide_cpu(replicas: int) -> None:
    """Divides the CPU into logical devices."""
    if tf.config.list_physical_devices("GPU"):
        raise UsageError(
            "`cpu_replicas` is for machines without GPUs: this one has "
            f"{len(tf.config.list_physical_devices('GPU'))}, and each gets a "
            "replica. To hide them, set the environment variable "
            f"CUDA_VISIBLE_DEVICES=-1. Received: cpu_replicas={replicas}"
        )
    (cpu,) = tf.config.list_physical_devices("CPU")
    try:
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * replicas
        )
    except RuntimeError:
        # TensorFlow's devices are in use already, as in a notebook.
        devices = len(tf.config.list_logical_devices("CPU"))
        if devices != replicas:
            raise UsageError(
                "`cpu_replicas` must be set before anything else uses "
                "TensorFlow's devices. Start a new process. Received: "
                f"cpu_replicas={replicas} in a process with {devices}"
            ) from None


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Returns whether this process writes the files."""
    resolver = strategy.cluster_resolver
    if not several_processes(strategy) or resolver is None:
        return True
    return resolver.task_type in (None, "chief") or (
        resolver.task_type == "worker"
        and resolver.task_id == 0
        and "chief" not in resolver.cluster_spec().jobs
    )


def gather(
    strategy: tf.distribute.Strategy, values: Sequence[float]
) -> np.ndarray:
    """Gathers numbers from all processes.

    All processes must call it at the same point of the program.

    Args:
        strategy: The strategy.
        values: Numbers of this process, exact in float64; the same count in
            every process.

    Returns:
        float64 of shape [processes, len(values)], equal in all processes.
    """
    row = np.asarray([values], np.float64)
    if not several_processes(strategy):
        return row
    if strategy not in _GATHER:
        # Cached: `strategy.gather` would trace a function in every call.
        _GATHER[strategy] = _make_gather(strategy)
    rows = _GATHER[strategy](tf.constant(row)).numpy()
    # All replicas of a process have the same row.
    return rows[:: len(strategy.extended.worker_devices)]


def _make_gather(
    strategy: tf.distribute.Strategy,
) -> Callable[[tf.Tensor], tf.Tensor]:
    def on_a_replica(row: tf.Tensor) -> tf.Tensor:
        context = tf.distribute.get_replica_context()
        # The tensor must be on the device of the replica.
        return context.all_gather(tf.identity(row), axis=0)

    @tf.function
    def gather_rows(row: tf.Tensor) -> tf.Tensor:
        rows = strategy.run(on_a_replica, args=(row,))
        return strategy.experimental_local_results(rows)[0]

    return gather_rows


def input_pipelines(strategy: tf.distribute.Strategy) -> int:
    """Returns the number of hosts that read data."""
    if isinstance(strategy, tf.distribute.TPUStrategy):
        return strategy.extended.num_hosts
    if not several_processes(strategy):
        return 1
    # `worker_devices` are the devices of this process.
    local = len(strategy.extended.worker_devices)
    return strategy.num_replicas_in_sync // local


def several_processes(strategy: tf.distribute.Strategy) -> bool:
    """Returns whether other processes run the same program."""
    # One process drives a TPU pod with any number of hosts.
    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)


def several_workers() -> bool:
    """Returns whether this process is one of several workers.

    Unlike `several_processes`, this works before the workers have joined,
    because it reads TF_CONFIG.
    """
    try:
        return len(_workers()) > 1
    except UsageError:
        # `make_strategy` raises this error.
        return False


def is_lost_worker(error: BaseException) -> bool:
    """Returns whether an error among several workers is due to a lost one."""
    # TensorFlow also raises FailedPreconditionError for invalid data.
    return isinstance(error, _LOST_WORKER) and (
        not isinstance(error, tf.errors.FailedPreconditionError)
        or ABORTED in error.message
    )


@contextlib.contextmanager
def lost_worker_errors() -> Iterator[None]:
    """Converts errors about lost workers within the scope to `WorkerLostError`.

    Enter it with several workers only: in a single process TensorFlow raises
    the same errors for other reasons.

    Yields:
        Nothing.

    Raises:
        WorkerLostError: If another worker ended or cannot be reached.
    """
    try:
        yield
    except _LOST_WORKER as error:
        if not is_lost_worker(error):
            raise
        raise WorkerLostError(
            "Another worker ended or cannot be reached: "
            f"{reason(error)}. Start all workers again to continue from the "
            "last checkpoint."
        ) from error


class _MultiWorkerStrategy(tf.distribute.MultiWorkerMirroredStrategy):
    """A strategy with support for uint8 variables, such as masks.

    TensorFlow sends the chief's initial value of every variable to all workers,
    and cannot send uint8. This class sends such values as int32.
    """

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Returns the scope to create variables in."""
        dtypes: list[tf.DType] = []

        def widen(make: Callable[..., tf.Variable], **kwargs: Any) -> Any:
            dtype = kwargs.get("dtype")
            if dtype is None or tf.as_dtype(dtype) not in _UNSENDABLE_DTYPES:
                return make(**kwargs)
            dtypes.append(tf.as_dtype(dtype))
            try:
                return make(**_cast(kwargs, tf.int32))
            finally:
                dtypes.pop()

        def narrow(make: Callable[..., tf.Variable], **kwargs: Any) -> Any:
            return make(**(_cast(kwargs, dtypes[-1]) if dtypes else kwargs))

        # The innermost scope is called first; the strategy sends in between.
        with (
            tf.variable_creator_scope(narrow),
            super().scope(),
            tf.variable_creator_scope(widen),
        ):
            yield


def _join_workers() -> tf.distribute.Strategy:
    """Waits for the other workers; prints a line about it."""
    # TensorFlow may wait for an hour, and handles SIGTERM itself.
    print(
        f"Waiting for the workers {', '.join(_workers())}. Ctrl-C ends the "
        "program, SIGTERM does not.",
        file=sys.stderr,
        flush=True,
    )
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        return _MultiWorkerStrategy()
    # Python's own handler would wait for the end of the call.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        return _MultiWorkerStrategy()
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _cast(kwargs: dict[str, Any], dtype: tf.DType) -> dict[str, Any]:
    """Returns the arguments of a variable with another dtype."""
    value = kwargs["initial_value"]

    def cast_value() -> tf.Tensor:
        return tf.cast(value() if callable(value) else value, dtype)

    return {**kwargs, "initial_value": cast_value, "dtype": dtype}


def _name_for_this_machine(tpu: str | None) -> str:
    if tpu or tf.config.list_physical_devices("TPU"):
        return "tpu"
    if len(_workers()) > 1:
        return "multi_worker"
    several = len(tf.config.list_logical_devices("GPU")) > 1
    return "mirrored" if several else "one_device"


def _workers() -> list[str]:
    cluster = _tf_config()["cluster"]
    return [
        address
        for task_type in ("chief", "worker")
        for address in cluster.get(task_type, [])
    ]


def _tf_config() -> dict[str, Any]:
    """Returns TF_CONFIG with the keys "cluster" and "task"."""
    text = os.environ.get("TF_CONFIG", "")
    try:
        config = json.loads(text) if text.strip() else {}
        if not isinstance(config, dict):
            raise ValueError("it is not a JSON object")
        config = {"cluster": {}, "task": {}, **config}
        for name in ("cluster", "task"):
            if not isinstance(config[name], dict):
                raise ValueError(f"its {name} is not a JSON object")
        for task_type, addresses in config["cluster"].items():
            if not isinstance(addresses, list):
                raise ValueError(
                    f"{task_type!r} in its cluster is not a list of addresses"
                )
    except ValueError as error:
        raise UsageError(
            "The environment variable TF_CONFIG must be a JSON object such as "
            '{"cluster": {"worker": ["host1:2222", "host2:2222"]}, "task": '
            f'{{"type": "worker", "index": 0}}}}. Cause: {error}. '
            f"Received: {text!r}"
        ) from error
    return config


def _check_workers() -> None:
    config = _tf_config()
    task = config["task"]
    addresses = config["cluster"].get(str(task.get("type")), [])
    index = task.get("index")
    if not _workers() or not (
        isinstance(index, int) and 0 <= index < len(addresses)
    ):
        raise UsageError(
            "The strategy multi_worker needs the environment variable "
            "TF_CONFIG with the addresses of all workers and the task of this "
            'worker, such as {"cluster": {"worker": ["host1:2222", '
            '"host2:2222"]}, "task": {"type": "worker", "index": 0}}. '
            f"Received: TF_CONFIG={os.environ.get('TF_CONFIG')!r}"
        )


def _tpu_strategy(tpu: str) -> tf.distribute.Strategy:
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=tpu)
        if tpu != "local":
            tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
    except (tf.errors.OpError, ValueError, OSError) as error:
        raise UsageError(
            f"The TPU {tpu!r} cannot be used: {reason(error)}. "
            "Set --tpu=NAME of a TPU in this project, or --tpu=local on a TPU "
            "machine with the package tensorflow-tpu."
        ) from error
    return tf.distribute.TPUStrategy(resolver)
