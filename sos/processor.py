"""Features of the processor."""

import functools
import os
import pathlib

CPU_INFO = pathlib.Path("/proc/cpuinfo")

# Instructions of x86 processors that multiply numbers of bfloat16.
_FLAGS = {"avx512_bf16", "amx_bf16"}


@functools.cache
def multiplies_bfloat16() -> bool:
    """Returns whether TensorFlow's products of bfloat16 are fast on the CPU.

    This needs instructions of the processor, which are known on Linux only, and
    oneDNN, which uses them, unless `TF_ENABLE_ONEDNN_OPTS=0` disables it.

    Example:
    >>> from sos import processor
    >>> processor.multiplies_bfloat16() in (False, True)
    True
    """
    if os.environ.get("TF_ENABLE_ONEDNN_OPTS", "1").lower() in ("0", "false"):
        return False
    try:
        flags = CPU_INFO.read_text("utf-8").split()
    except OSError:
        return False
    return not _FLAGS.isdisjoint(flags)
