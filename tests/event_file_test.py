import math
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing import plugin_event_accumulator

from sos.event_file import EventFile
from tests.support import techniques


def shown_scalars(directory):
    """As `scalars`, but as the web page shows them."""
    events = plugin_event_accumulator.EventAccumulator(str(directory))
    events.Reload()
    return {
        tag: [
            (event.step, float(tf.make_ndarray(event.tensor_proto)))
            for event in events.Tensors(tag)
        ]
        for tag in events.Tags()["tensors"]
    }


@pytest.mark.parametrize("read_back", [techniques.scalars, shown_scalars])
def test_event_file_in_tensorboard_shows_what_was_written(tmp_path, read_back):
    file = EventFile(tmp_path / "new")
    file.write(3, {"loss": 2.5, "sparsity/a/kernel": np.float64(0.5)})
    # A process that is killed now has written it.
    assert read_back(tmp_path / "new") == {
        "loss": [(3, 2.5)],
        "sparsity/a/kernel": [(3, 0.5)],
    }
    file.write(10**7, {"loss": 1.5})
    file.close()
    assert read_back(tmp_path / "new")["loss"] == [(3, 2.5), (10**7, 1.5)]


@pytest.mark.parametrize("read_back", [techniques.scalars, shown_scalars])
def test_event_file_resumed_hides_the_later_steps(tmp_path, read_back):
    first = EventFile(tmp_path)
    for step in (100, 200, 300, 400):
        first.write(step, {"loss": step})
    # As if killed: not closed.
    resumed = EventFile(tmp_path, resume_step=200)
    resumed.write(250, {"loss": 1.0})
    resumed.close()
    expected = [(100, 100.0), (200, 200.0), (250, 1.0)]
    assert read_back(tmp_path) == {"loss": expected}
    first.close()
    # Without a step nothing is hidden.
    other = EventFile(tmp_path)
    other.write(300, {"loss": 2.0})
    other.close()
    assert read_back(tmp_path) == {"loss": [*expected, (300, 2.0)]}


def test_event_file_of_numbers_that_are_not_finite_shows_them(tmp_path):
    file = EventFile(tmp_path)
    file.write(1, {"loss": math.nan, "penalty": np.float32("inf")})
    file.close()
    found = techniques.scalars(tmp_path)
    assert math.isnan(found["loss"][0][1])
    assert found["penalty"] == [(1, math.inf)]


def test_import_without_tensorboard_writes_and_keeps_the_users_keras(tmp_path):
    # One process for both, as it takes seconds to start.
    program = (
        "import os, sys\n"
        "sys.modules['tensorboard'] = None\n"
        "from sos.event_file import EventFile\n"
        "file = EventFile(sys.argv[1])\n"
        "file.write(3, {'loss': 2.5})\n"
        "file.close()\n"
        "assert os.environ['TF_USE_LEGACY_KERAS'] == '0'\n"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        check=True,
        env={
            **os.environ,
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "TF_USE_LEGACY_KERAS": "0",
        },
    )
    assert techniques.scalars(tmp_path) == {"loss": [(3, 2.5)]}
