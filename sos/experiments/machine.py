"""The machine on which a run was trained."""

import os
import platform

import tensorflow as tf


def describe_machine(strategy: tf.distribute.Strategy) -> dict[str, str]:
    """Returns properties of the machine, to compare durations.

    Args:
        strategy: The strategy of the training.

    Returns:
        By name: "platform", the operating system; "processor", the model of
        the CPU; "cores" that this process may use; "device", the kind of device
        that trains, such as "CPU" or "NVIDIA H100"; and "devices", their number
        over all machines.

    Example:
    >>> import sos.training
    >>> from sos.experiments.machine import describe_machine
    >>> machine = describe_machine(sos.training.make_strategy("one_device"))
    >>> machine["devices"]
    '1'
    """
    return {
        "platform": platform.platform(),
        "processor": processor(),
        "cores": str(cores()),
        "device": _device_kind(strategy.extended.worker_devices[0]),
        "devices": str(strategy.num_replicas_in_sync),
    }


def cores() -> int:
    """Returns the number of cores that this process may use."""
    # Absent on some systems.
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def processor() -> str:
    """Returns the model of the CPU."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        # Not on Linux.
        pass
    return platform.processor() or platform.machine()


def _device_kind(name: str) -> str:
    device = tf.DeviceSpec.from_string(name)
    kind = device.device_type or "CPU"
    if kind == "GPU":
        # Indices count the visible ones.
        gpu = tf.config.get_visible_devices("GPU")[device.device_index or 0]
        details = tf.config.experimental.get_device_details(gpu)
        return details.get("device_name", kind)
    return kind
