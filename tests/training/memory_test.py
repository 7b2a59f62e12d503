import pathlib

import numpy as np
import pytest
import tensorflow as tf

from sos.training import memory as memory_lib
from sos.training.memory import PeakMemory

SIZE = 200  # MiB, much above what the interpreter allocates meanwhile.
NEAR = 30

needs_proc = pytest.mark.skipif(
    not pathlib.Path("/proc/self/clear_refs").exists(),
    reason="needs Linux's /proc",
)


def fill(mebibytes):
    """Memory that is really there: zeros alone would not be resident."""
    return np.ones(mebibytes * 2**20, np.uint8)


@needs_proc
def test_the_peak_is_that_of_the_scope():
    with PeakMemory() as before:
        pass
    with PeakMemory() as memory:
        fill(SIZE)
        fill(SIZE // 2)
    assert memory.host - before.host == pytest.approx(SIZE, abs=NEAR)
    with PeakMemory() as after:
        pass
    # The peak of an earlier scope is forgotten,
    assert after.host - before.host == pytest.approx(0, abs=NEAR)
    # and that of a finished scope stays.
    kept = fill(2 * SIZE)
    assert memory.host - before.host == pytest.approx(SIZE, abs=NEAR)
    del kept


@needs_proc
def test_the_peak_can_be_read_within_the_scope():
    with PeakMemory() as memory:
        begin = memory.host
        kept = fill(SIZE)
        assert memory.host - begin == pytest.approx(SIZE, abs=NEAR)
        del kept
        assert memory.host - begin == pytest.approx(SIZE, abs=NEAR)


@needs_proc
def test_the_memory_of_tensors_counts():
    with PeakMemory() as memory:
        begin = memory.host
        tf.ones([SIZE, 2**18]).numpy()
    assert memory.host - begin > SIZE - NEAR


def test_without_proc_it_is_the_peak_of_the_process(monkeypatch, tmp_path):
    monkeypatch.setattr(memory_lib, "_CLEAR_REFS", tmp_path / "no" / "file")
    monkeypatch.setattr(memory_lib, "_STATUS", tmp_path / "no" / "file")
    with PeakMemory() as first:
        fill(SIZE)
    with PeakMemory() as second:
        pass
    assert second.host >= first.host > SIZE


def test_without_a_gpu_there_is_no_figure_of_it():
    with PeakMemory() as memory:
        assert memory.device is None
    assert memory.device is None


def test_the_peak_of_a_gpu_is_that_of_the_scope(monkeypatch):
    # Stands for TensorFlow's counters, as tests run on a CPU.
    used = {"GPU:0": {"current": 0, "peak": 7 * 2**20}}
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [kind])
    monkeypatch.setattr(
        tf.config.experimental,
        "reset_memory_stats",
        lambda device: used[device].update(peak=0),
    )
    monkeypatch.setattr(
        tf.config.experimental, "get_memory_info", used.__getitem__
    )
    with PeakMemory() as memory:
        assert memory.device == 0
        used["GPU:0"]["peak"] = 3 * 2**20
    used["GPU:0"]["peak"] = 9 * 2**20
    assert memory.device == 3
