"""A training program for the tests, with toy tasks.

    python -m tests.support.toy_train --techniques=dense,MagnitudePruning \
        --workdir=...

trains one after the other, each in its folder of the work directory, and writes
the final values of all variables beside them.
"""

import dataclasses
import os
import pathlib
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import sos

with sos.startup.quiet():
    import keras
    import numpy as np
    import tensorflow as tf
    from absl import app, flags, logging

    from sos.training import flags as training_flags
    from sos.training.main import end_process, run
    from tests.support import techniques, toy_task

    tf.config.list_physical_devices()

SCHEDULE = sos.schedules.PolynomialDecay(0.0, 0.8, 3, 15, frequency=3)

_TECHNIQUES = flags.DEFINE_list("techniques", "dense", "With commas between.")
_TRAIN_STEPS = flags.DEFINE_integer("train_steps", 20, "Of each training.")
_DUMP = flags.DEFINE_string("dump", "values", "File name of the values.")
_UNITS = flags.DEFINE_integer("units", 16, "Width of the hidden layer.")
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 0.02, "At step 0.")
_GRADIENT_ACCUMULATION_STEPS = flags.DEFINE_integer(
    "gradient_accumulation_steps", 1, "Parts of a batch."
)
_STEP_SECONDS = flags.DEFINE_float(
    "step_seconds", 0.0, "How long it takes to get a batch."
)


class ProgramTask(toy_task.ToyTask):
    """A toy task with the size, the speed and the rate of the flags."""

    def configuration(self):
        # A toy task without flags has the same configuration as the defaults.
        changed = {
            flag.name: flag.value
            for flag in (_UNITS, _LEARNING_RATE)
            if flag.value != flag.default
        }
        return {**super().configuration(), **changed}

    def build_model(self):
        keras.utils.set_random_seed(self.seed)
        model = keras.Sequential(
            [
                keras.Input((6,)),
                keras.layers.Dense(_UNITS.value, "relu", name="a"),
                keras.layers.Dense(3, name="b"),
            ],
            name="toy",
        )
        if self.technique is None:
            return model
        arguments = techniques.arguments(self.technique, **self.overrides)
        return sos.sparsify(model, self.technique, **arguments)

    def build_optimizer(self, model):
        return keras.optimizers.Adam(
            keras.optimizers.schedules.CosineDecay(_LEARNING_RATE.value, 100)
        )

    def train_dataset(self, context, step):
        batches = super().train_dataset(context, step)
        seconds = _STEP_SECONDS.value
        return batches.map(lambda batch: _after(seconds, batch))


def make_task(technique, task_class=toy_task.ToyTask):
    """The task of a technique, for the program and what it is compared with."""
    if technique == "dense":
        return task_class()
    pruning = issubclass(
        sos.extend.techniques()[technique], sos.extend.PruningWrapper
    )
    overrides = {"schedule": SCHEDULE} if pruning else {}
    return task_class(technique, **overrides)


def _after(seconds, batch):
    def sleep():
        time.sleep(seconds)
        return np.int64(0)

    with tf.control_dependencies([tf.numpy_function(sleep, [], tf.int64)]):
        return tf.nest.map_structure(tf.identity, batch)


def main(argv):
    # TensorFlow logs every save; absl sets the level of the flag's default.
    logging.set_verbosity(logging.WARNING)
    options = training_flags.options(_TRAIN_STEPS.value)
    strategy = trainer = None
    for technique in _TECHNIQUES.value:

        def make_trainer(technique=technique):
            nonlocal strategy, trainer
            # A process can join the other workers only once.
            strategy = strategy or training_flags.make_strategy()
            trainer = training_flags.make_trainer(
                lambda: make_task(technique, ProgramTask),
                strategy=strategy,
                gradient_accumulation_steps=_GRADIENT_ACCUMULATION_STEPS.value,
            )
            return trainer

        workdir = pathlib.Path(options.workdir, technique)
        code = run(
            dataclasses.replace(options, workdir=str(workdir)), make_trainer
        )
        if code:
            end_process(code)
        np.savez(workdir / f"{_DUMP.value}.npz", **toy_task.values(trainer))


if __name__ == "__main__":
    app.run(main)
