"""Strategies: how training is spread over devices and machines."""

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

#: The names that `make_strategy` takes.
STRATEGIES = ("tpu", "mirrored", "multi_worker", "one_device")


def make_strategy(
    name: str | None = None, *, tpu: str | None = None
) -> tf.distribute.Strategy:
    """Makes the strategy of that name, or the one that the machine calls for.

    Call it before anything else touches TensorFlow's devices: several workers
    cannot be joined later.

    Args:
        name: "tpu"; "mirrored", over all GPUs of this machine (or all logical
            CPU devices, where there is none); "multi_worker", over the machines
            that the environment variable TF_CONFIG lists; "one_device"; or
            None: a TPU if `tpu` is given, several workers if TF_CONFIG lists
            them, all GPUs if there are several, else one device.
        tpu: Name or address of the TPU, or "local" for that of this machine.

    Returns:
        The strategy.

    Raises:
        ValueError: If the name is unknown, `tpu` goes with another strategy, or
            TF_CONFIG is not what several workers need.
        RuntimeError: If the TPU cannot be reached.
    """
    if name is not None and name not in STRATEGIES:
        raise ValueError(
            f"`strategy` must be one of {', '.join(STRATEGIES)}. "
            f"Received: strategy={name!r}"
        )
    if tpu and name not in (None, "tpu"):
        raise ValueError(
            "`tpu` goes with the strategy tpu alone. "
            f"Received: tpu={tpu!r} with strategy={name!r}"
        )
    if name is None:
        name = _name_for_this_machine(tpu)
    if name == "tpu":
        return _tpu_strategy(tpu or "local")
    if name == "multi_worker":
        _check_workers()
        return tf.distribute.MultiWorkerMirroredStrategy()
    gpus = tf.config.list_logical_devices("GPU")
    cpus = tf.config.list_logical_devices("CPU")
    if name == "one_device":
        return tf.distribute.OneDeviceStrategy((gpus or cpus)[0].name)
    devices = [device.name for device in gpus or cpus]
    if gpus:
        return tf.distribute.MirroredStrategy(devices)
    return tf.distribute.MirroredStrategy(
        devices,
        # The default's collectives fail when a process has several strategies.
        cross_device_ops=tf.distribute.ReductionToOneDevice(),
    )


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process is the one that writes files."""
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
    """Lets all processes of a job see what each of them says.

    All of them must call it at the same point of the program.

    Args:
        strategy: The strategy of the job.
        values: This process's numbers, as many in every process; exact in
            float64.

    Returns:
        float64 of shape [processes, len(values)], the same everywhere.
    """
    row = np.asarray([values], np.float64)
    if not several_processes(strategy):
        return row
    values_of_replicas = strategy.gather(
        strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(row)
        ),
        axis=0,
    ).numpy()
    return values_of_replicas


def several_processes(strategy: tf.distribute.Strategy) -> bool:
    """Whether other processes take part in a job, running the same program."""
    # A TPU pod is driven by one process, whatever its number of hosts.
    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)


def _name_for_this_machine(tpu: str | None) -> str:
    if tpu or tf.config.list_physical_devices("TPU"):
        return "tpu"
    if len(_workers()) > 1:
        return "multi_worker"
    several = len(tf.config.list_logical_devices("GPU")) > 1
    return "mirrored" if several else "one_device"


def _workers() -> list[str]:
    cluster = _tf_config().get("cluster", {})
    return [
        address
        for job in ("chief", "worker")
        for address in cluster.get(job, [])
    ]


def _tf_config() -> dict[str, Any]:
    text = os.environ.get("TF_CONFIG", "")
    try:
        config = json.loads(text) if text.strip() else {}
        if not isinstance(config, dict):
            raise ValueError("it is no JSON object")
    except ValueError as error:
        raise ValueError(
            "The environment variable TF_CONFIG must be a JSON object such as "
            '{"cluster": {"worker": ["host1:2222", "host2:2222"]}, "task": '
            f'{{"type": "worker", "index": 0}}}}. Cause: {error}. '
            f"Received: {text!r}"
        ) from error
    return config


def _check_workers() -> None:
    config, workers = _tf_config(), _workers()
    if not workers or "task" not in config:
        raise ValueError(
            "The strategy multi_worker needs the environment variable "
            "TF_CONFIG with the addresses of all workers and the task of this "
            'one, such as {"cluster": {"worker": ["host1:2222", '
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
        reason = str(error).strip().splitlines()[0]
        raise RuntimeError(
            f"The TPU {tpu!r} cannot be used: {reason} "
            "Give --tpu=NAME of a TPU in this project, or --tpu=local on a TPU "
            "machine with the package tensorflow-tpu."
        ) from error
    return tf.distribute.TPUStrategy(resolver)
