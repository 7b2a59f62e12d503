import contextlib

import pytest
import tensorflow as tf
from absl import flags
from absl.testing import flagsaver

from sos import errors
from sos.training import flags as training_flags
from sos.training.main import Options
from tests.support.toy_task import ToyTask


@pytest.fixture
def parse():
    """Parses flags; what it changes is changed back."""
    with contextlib.ExitStack() as stack:

        def parse(**values):
            # Not a command line: other tests define flags that it would need.
            stack.enter_context(flagsaver.as_parsed(**values))

        stack.enter_context(flagsaver.flagsaver(workdir="somewhere"))
        flags.FLAGS.mark_as_parsed()
        stack.callback(flags.FLAGS.unparse_flags)
        yield parse
    tf.config.optimizer.set_experimental_options({"remapping": True})


@pytest.mark.usefixtures("parse")
def test_options_without_flags_are_the_defaults():
    assert training_flags.options(20) == Options(
        workdir="somewhere", train_steps=20
    )


def test_options_are_those_of_the_flags(parse):
    parse(
        mode="eval",
        save_checkpoints_steps="5",
        keep_checkpoint_max="2",
        keep_checkpoint_every_n_steps="10",
        steps_per_eval="4",
        eval_timeout="1.5",
        profile_steps="3,6",
    )
    assert training_flags.options(20) == Options(
        mode="eval",
        workdir="somewhere",
        train_steps=20,
        save_checkpoints_steps=5,
        keep_checkpoint_max=2,
        keep_checkpoint_every_n_steps=10,
        steps_per_eval=4,
        eval_timeout=1.5,
        profile_steps=(3, 6),
    )


@pytest.mark.usefixtures("parse")
def test_options_overrides_replace_flags():
    options = training_flags.options(
        20, workdir="elsewhere", keep_checkpoint_steps=(0, 20)
    )
    assert options.workdir == "elsewhere"
    assert options.keep_checkpoint_steps == (0, 20)


def test_options_invalid_flags_raise(parse):
    parse(profile_steps="9,5")
    with pytest.raises(errors.UsageError, match="`profile_steps`.*9,5"):
        training_flags.options(20)
    with pytest.raises(flags.IllegalFlagValueError, match="profile_steps"):
        parse(profile_steps="9")


def test_make_strategy_contradiction_raises(parse):
    parse(strategy="one_device", tpu="mine")
    with pytest.raises(errors.UsageError, match="`tpu`.*one_device"):
        training_flags.make_strategy()


def test_make_trainer_is_the_one_of_the_flags(parse):
    parse(strategy="one_device")
    trainer = training_flags.make_trainer(
        ToyTask, gradient_accumulation_steps=2
    )
    assert isinstance(trainer.strategy, tf.distribute.OneDeviceStrategy)
    assert trainer.configuration()["gradient_accumulation_steps"] == 2
    options = tf.config.optimizer.get_experimental_options()
    assert options["remapping"] is False


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ({}, None),
        ({"jit_compile": "true"}, True),
        ({"jit_compile": "false"}, False),
    ],
)
def test_make_trainer_passes_jit_compile_on(parse, monkeypatch, flag, value):
    monkeypatch.setattr(
        training_flags, "Trainer", lambda task, **arguments: arguments
    )
    parse(strategy="one_device", steps_per_loop="7", **flag)
    arguments = training_flags.make_trainer(ToyTask)
    assert arguments["jit_compile"] is value
    assert arguments["steps_per_loop"] == 7
