"""A training binary for the tests: `models.train` with toy tasks.

    python -m tests.support.toy_train --techniques=dense,MagnitudePruning \
        --workdir=...

trains one after the other, each in its folder of the work directory, and writes
the final values of all variables beside them.
"""

import dataclasses
import os
import pathlib
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import sos

with sos.startup.quiet():
    import numpy as np
    import tensorflow as tf
    from absl import app, flags, logging

    from sos.training import flags as training_flags
    from sos.training import main
    from sos.training.trainer import Trainer
    from tests.support import toy_task

    tf.config.list_physical_devices()

SCHEDULE = sos.PolynomialDecay(0.0, 0.8, 3, 15, frequency=3)

_TECHNIQUES = flags.DEFINE_list("techniques", "dense", "With commas between.")
_TRAIN_STEPS = flags.DEFINE_integer("train_steps", 20, "Of each training.")
_DUMP = flags.DEFINE_string("dump", "values", "File name of the values.")
_STEP_SECONDS = flags.DEFINE_float(
    "step_seconds", 0.0, "How long it takes to get a batch."
)
flags.FLAGS.set_default("verbosity", logging.WARNING)


class SlowTask(toy_task.ToyTask):
    """A toy task that takes its time, for signals to hit it."""

    def train_dataset(self, context, step):
        batches = super().train_dataset(context, step)
        seconds = _STEP_SECONDS.value
        return batches.map(lambda batch: _after(seconds, batch))


def make_task(technique, task_class=toy_task.ToyTask):
    """The task of a technique, for the program and what it is compared with."""
    if technique == "dense":
        return task_class()
    pruning = issubclass(sos.techniques()[technique], sos.PruningWrapper)
    overrides = {"schedule": SCHEDULE} if pruning else {}
    return task_class(technique, **overrides)


def _after(seconds, batch):
    def sleep():
        time.sleep(seconds)
        return np.int64(0)

    with tf.control_dependencies([tf.numpy_function(sleep, [], tf.int64)]):
        return tf.nest.map_structure(tf.identity, batch)


def main(argv):
    settings = training_flags.settings(_TRAIN_STEPS.value)
    trainer = None
    for technique in _TECHNIQUES.value:

        def make_trainer(technique=technique):
            nonlocal trainer
            if trainer is None:
                trainer = training_flags.make_trainer(
                    lambda: make_task(technique, SlowTask)
                )
            else:
                # A process can join the others but once.
                trainer = Trainer(
                    make_task(technique, SlowTask), strategy=trainer.strategy
                )
            return trainer

        workdir = pathlib.Path(settings.workdir, technique)
        code = main.run(
            dataclasses.replace(settings, workdir=str(workdir)), make_trainer
        )
        if code:
            sys.exit(code)
        np.savez(workdir / f"{_DUMP.value}.npz", **toy_task.values(trainer))


if __name__ == "__main__":
    app.run(main)
