"""A training binary for the tests: `models.train` with a toy task.

    python -m tests.training.toy_train --technique=MagnitudePruning \
        --train_steps=20 --workdir=... --dump=....npz
"""

import os
import sys
import time

from absl import app, flags

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf

from sos.training import flags as training_flags
from sos.training import modes
from tests import toys
from tests.training import toy_task

_TECHNIQUE = flags.DEFINE_string("technique", None, "None for a dense model.")
_TRAIN_STEPS = flags.DEFINE_integer("train_steps", 20, "Of the training.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Of all replicas.")
_DEVICES = flags.DEFINE_integer("devices", 1, "Logical CPUs.")
_STEP_SECONDS = flags.DEFINE_float(
    "step_seconds", 0.0, "How long a step takes at least."
)
_DUMP = flags.DEFINE_string(
    "dump", None, "File for the final values of all variables."
)


class SlowTask(toy_task.ToyTask):
    """A toy task that takes its time, for signals to hit it."""

    def train_dataset(self, context, step):
        def wait(batch):
            # Of one batch after the other, as nothing runs ahead.
            with tf.control_dependencies(
                [tf.numpy_function(_sleep, [], tf.int64)]
            ):
                return tf.nest.map_structure(tf.identity, batch)

        batches = super().train_dataset(context, step)
        return batches.map(wait) if _STEP_SECONDS.value else batches


def _sleep():
    time.sleep(_STEP_SECONDS.value)
    return 0


def main(argv):
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * _DEVICES.value,
    )
    trainers = []

    def make_task():
        overrides = {}
        if _TECHNIQUE.value and "schedule" in toys.settings(_TECHNIQUE.value):
            overrides["schedule"] = toys.Staircase(0, 700, frequency=3)
        return SlowTask(
            _TECHNIQUE.value, batch_size=_BATCH_SIZE.value, **overrides
        )

    def make_trainer():
        trainers.append(training_flags.make_trainer(make_task))
        return trainers[0]

    settings = training_flags.settings(_TRAIN_STEPS.value)
    code = modes.run(settings, make_trainer)
    if _DUMP.value and not code:
        np.savez(_DUMP.value, **toy_task.values(trainers[0]))
    sys.exit(code)


if __name__ == "__main__":
    app.run(main)
