"""The most memory that a part of a program uses."""

import pathlib
import re
import sys
from types import TracebackType

import tensorflow as tf

_MIB = 2**20
_CLEAR_REFS = pathlib.Path("/proc/self/clear_refs")
_STATUS = pathlib.Path("/proc/self/status")


class PeakMemory:
    """Measures the peak of the memory used within its scope.

    ```
    with PeakMemory() as memory:
        train()
    print(memory.host, "MiB")
    ```

    The counters are those of the process: scopes may follow one another, but
    not overlap. What TensorFlow or Python keep for later use counts as used.

    Attributes:
        host: Peak resident memory of this process in MiB. Where Linux's
            `/proc/self/clear_refs` is missing or not writable, it is the peak
            since the process began.
        device: Peak memory that TensorFlow used on the first GPU in MiB; None
            without a GPU.
    """

    def __init__(self) -> None:
        self._peaks: tuple[float, float | None] | None = None

    @property
    def host(self) -> float:
        """Peak resident memory in MiB, so far or of the whole scope."""
        return self._read()[0]

    @property
    def device(self) -> float | None:
        """Peak memory on the first GPU in MiB, so far or of the whole scope."""
        return self._read()[1]

    def __enter__(self) -> "PeakMemory":
        self._peaks = None
        try:
            # The peak is then what is resident now: see proc(5).
            _CLEAR_REFS.write_text("5")
        except OSError:
            self._host_is_reset = False
        else:
            self._host_is_reset = True
        if tf.config.list_physical_devices("GPU"):
            tf.config.experimental.reset_memory_stats("GPU:0")
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._peaks = self._read()

    def _read(self) -> tuple[float, float | None]:
        if self._peaks is not None:
            return self._peaks
        device = None
        if tf.config.list_physical_devices("GPU"):
            info = tf.config.experimental.get_memory_info("GPU:0")
            device = info["peak"] / _MIB
        return _host_peak(self._host_is_reset), device


def _host_peak(from_proc: bool) -> float:
    """Peak resident memory in MiB since it was reset, if it was."""
    if from_proc:
        match = re.search(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(), re.M)
        return int(match[1]) / 1024
    # Not on every system.
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # In KiB, but on macOS in bytes.
    return peak / _MIB if sys.platform == "darwin" else peak / 1024
