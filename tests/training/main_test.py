import json
import re
import shutil
import signal
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from sos.training.modes import Settings, run

import sos
from sos.files import only_process
from sos.training import follower, modes, pace
from sos.training.reporting import Summary
from sos.training.strategies import make_strategy
from sos.training.trainer import Trainer
from tests.support import processes, techniques, toy_task
from tests.support.toy_task import ToyTask

STEPS = 20
SCHEDULE = sos.PolynomialDecay(0.0, 0.8, 3, 15, frequency=3)


class Program:
    """A training binary with a work directory, run in this process."""

    def __init__(self, workdir, capfd):
        self.workdir = workdir
        self._capfd = capfd
        self.trainer = None
        self.steps_per_loop = 4

    def make_trainer(self):
        strategy = make_strategy("one_device")
        with strategy.scope():
            task = ToyTask("MagnitudePruning", schedule=SCHEDULE)
        self.trainer = Trainer(
            task, strategy=strategy, steps_per_loop=self.steps_per_loop
        )
        return self.trainer

    def __call__(self, mode, **settings):
        """Runs a mode and returns the exit code."""
        self.settings = Settings(
            mode=mode,
            workdir=str(self.workdir),
            **{
                "train_steps": STEPS,
                "save_checkpoints_steps": 5,
                "steps_per_eval": 10,
                **settings,
            },
        )
        code = run(self.settings, self.make_trainer)
        self.out, self.err = self._capfd.readouterr()
        return code

    @property
    def saved(self):
        return processes.checkpoint_steps(self.workdir)

    def steps(self, log, kind):
        """The steps of the records of a kind in a log."""
        return [
            record["step"]
            for record in processes.records(self.workdir, log)
            if record["kind"] == kind
        ]

    @property
    def error(self):
        """The one error on the standard error."""
        assert "Traceback" not in self.err
        (line,) = [x for x in self.err.splitlines() if x.startswith("FATAL")]
        return line


@pytest.fixture
def program(tmp_path, capfd):
    return Program(tmp_path / "work", capfd)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A work directory with all checkpoints of a training."""

    class NothingToRead:
        def readouterr(self):
            return "", ""

    program = Program(tmp_path_factory.mktemp("trained"), NothingToRead())
    assert program("train") == 0
    return program


@pytest.fixture
def copy(trained, program):
    """The program, with a copy of that work directory."""
    shutil.copytree(trained.workdir, program.workdir)
    return program


class Stop:
    """Stands for `StopRequest`: asks to stop at a step of the trainer."""

    def __init__(self, program, step=None, arrive=None):
        self._program, self._step, self._arrive = program, step, arrive

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    @property
    def requested(self):
        if self._step is None or self._program.trainer.step < self._step:
            return None
        return signal.SIGTERM

    def wait(self, seconds):
        self._arrive()
        return False


@pytest.fixture
def stopping(monkeypatch):
    """Lets a program run with a `Stop`."""

    def run_with(program, mode, settings=None, **stop):
        with monkeypatch.context() as patch:
            patch.setattr(modes, "StopRequest", lambda: Stop(program, **stop))
            return program(mode, **(settings or {}))

    return run_with


# Settings.


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "trian"}, "train, eval, train_and_eval, export.*'trian'"),
        ({"workdir": ""}, "`workdir` must name a directory"),
        ({"train_steps": 0}, "`train_steps` must be an integer of at least 1"),
        ({"save_checkpoints_steps": 0}, "`save_checkpoints_steps`"),
        ({"steps_per_eval": -1}, "`steps_per_eval`.*=-1"),
        ({"profile_steps": (5, 5)}, "`profile_steps`.*Received: 5,5"),
        ({"profile_steps": (0, 5)}, "`profile_steps`.*Received: 0,5"),
        ({"profile_steps": (5, 21)}, "`profile_steps`.*Received: 5,21"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    right = {"mode": "train", "workdir": "somewhere", "train_steps": STEPS}
    Settings(**right)
    with pytest.raises(ValueError, match=message):
        Settings(**{**right, **wrong})


# Training.


def test_training_leaves_checkpoints_and_logs(trained):
    assert trained.saved == [5, 10, 15, 20]
    steps = trained.steps("train", "train")
    assert steps == [1, 2, 4, 5, 8, 10, 12, 15, 16, 20]
    assert list((trained.workdir / "train").glob("events.out.tfevents.*"))
    assert not (trained.workdir / "eval.jsonl").exists()
    # The schedule's end.
    last = processes.records(trained.workdir)[-1]
    assert last["sparsity"] == pytest.approx(0.8, abs=0.01)


def test_a_finished_training_is_left_alone(copy):
    before = (copy.workdir / "train.jsonl").read_bytes()
    assert copy("train") == 0
    assert "Training is done: there is a checkpoint of step 20." in copy.err
    assert copy.out == ""
    assert (copy.workdir / "train.jsonl").read_bytes() == before
    assert copy.saved == [5, 10, 15, 20]


def test_the_newest_checkpoints_are_kept_and_every_kth(program):
    code = program(
        "train",
        save_checkpoints_steps=2,
        keep_checkpoint_max=2,
        keep_checkpoint_every_n_steps=8,
    )
    assert code == 0
    assert program.saved == [8, 16, 18, 20]


def test_a_stopped_training_goes_on(program, trained, stopping):
    assert stopping(program, "train", step=12) == 75
    assert "Stopped by SIGTERM at step 12, saved. Run the same" in program.err
    assert program.saved == [5, 10, 12]
    assert program("train") == 0
    assert "Going on from the checkpoint of step 12." in program.err
    assert (
        processes.differences(
            processes.checkpoint_values(program.workdir, STEPS),
            processes.checkpoint_values(trained.workdir, STEPS),
        )
        == []
    )


def test_the_log_of_a_killed_training_holds_every_step_once(copy):
    # Killed after the loop of step 12, whose checkpoint was never written.
    for step in (15, 20):
        shutil.rmtree(processes.checkpoint_path(copy.workdir, step))
    path = copy.workdir / "train.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    until_12 = [x for x in lines if json.loads(x)["step"] <= 12]
    path.write_bytes(b"".join(until_12) + lines[-1][:30])
    assert copy("train") == 0
    steps = copy.steps("train", "train")
    assert steps == sorted(set(steps))
    assert steps[-1] == STEPS
    # Loops end where they did, but for the first one, which is measured.
    assert {5, 8, 10, 12, 15, 16} <= set(steps)


def test_the_process_may_be_killed_while_it_writes(copy):
    folder = copy.workdir / "checkpoints"
    shutil.rmtree(processes.checkpoint_path(copy.workdir, STEPS))
    (folder / ".writing-00000020").mkdir()
    (folder / ".writing-00000020" / "variables.index").write_bytes(b"half")
    assert copy("train") == 0
    assert {path.name for path in folder.iterdir()} == {
        f"step-{step:08d}" for step in (5, 10, 15, 20)
    }


# Evaluation.


def test_train_and_eval(program, trained):
    assert program("train_and_eval", steps_per_eval=8) == 0
    assert program.steps("train", "eval") == [8, 16, 20]
    assert "eval  step 20/20" in program.out
    # Evaluations change nothing of the training.
    assert (
        processes.differences(
            processes.checkpoint_values(program.workdir, STEPS),
            processes.checkpoint_values(trained.workdir, STEPS),
        )
        == []
    )


def test_a_stop_within_an_evaluation_loses_nothing(program, stopping):
    # At the end, where training itself does not stop any more.
    program.steps_per_loop = 2
    assert stopping(program, "train_and_eval", step=STEPS) == 75
    assert "at step 20, after 2 of 3 batches of its evaluation" in program.err
    assert program.saved[-1] == STEPS
    assert program.steps("train", "eval") == [10]
    # It is made up for, and may be stopped again.
    assert stopping(program, "train_and_eval", step=STEPS) == 75
    assert program("train_and_eval") == 0
    assert program.steps("train", "eval") == [10, 20]


@pytest.mark.parametrize(
    ("until", "missed"), [(10, [10]), (15, []), (20, [20])]
)
def test_an_evaluation_that_was_missed_is_made_up_for(copy, until, missed):
    # The process was killed between the save and the evaluation.
    for step in copy.saved:
        if step > until:
            shutil.rmtree(processes.checkpoint_path(copy.workdir, step))
    assert copy("train_and_eval") == 0
    expected = [*missed, *(step for step in (10, 20) if step > until)]
    assert copy.steps("train", "eval") == expected
    # Once.
    assert copy("train_and_eval") == 0
    assert copy.steps("train", "eval") == expected


def test_eval_evaluates_every_checkpoint_once(copy):
    assert copy("eval") == 0
    assert copy.steps("eval", "eval") == [5, 10, 15, 20]
    before = (copy.workdir / "eval.jsonl").read_bytes()
    # Again, as after a restart.
    assert copy("eval") == 0
    assert (copy.workdir / "eval.jsonl").read_bytes() == before
    # What a restarted evaluator has not seen yet.
    lines = before.splitlines(keepends=True)
    (copy.workdir / "eval.jsonl").write_bytes(b"".join(lines[:2]))
    assert copy("eval") == 0
    assert copy.steps("eval", "eval") == [5, 10, 15, 20]
    assert list((copy.workdir / "eval").glob("events.out.tfevents.*"))


def test_eval_and_train_and_eval_find_the_same(copy, program, tmp_path):
    assert copy("eval") == 0
    other = Program(tmp_path / "other", copy._capfd)
    assert other("train_and_eval", steps_per_eval=5) == 0
    followed, found = (
        [
            (r["step"], r["metrics"], r["sparsity"])
            for r in processes.records(path, log)
            if r["kind"] == "eval"
        ]
        for path, log in ((copy.workdir, "eval"), (other.workdir, "train"))
    )
    assert followed == found


def test_eval_follows_a_training(program, trained, stopping):
    source = trained.workdir / "checkpoints"
    target = program.workdir / "checkpoints"
    arrivals = [[], [5], [10, 15], [], [20]]

    def arrive():
        for step in arrivals.pop(0):
            name = f"step-{step:08d}"
            shutil.copytree(source / name, target / name)

    code = stopping(program, "eval", {"eval_timeout": 60}, arrive=arrive)
    assert code == 0
    assert arrivals == []
    assert program.steps("eval", "eval") == [5, 10, 15, 20]
    assert program.err.count("Waiting for checkpoints in") == 1


@pytest.mark.parametrize("poll", [0.02, 5.0])
def test_eval_gives_up(program, monkeypatch, poll):
    monkeypatch.setattr(follower, "_POLL_SECONDS", poll)
    begin = time.monotonic()
    assert program("eval", eval_timeout=0.1) == 1
    assert time.monotonic() - begin >= 0.1
    assert "Waiting for checkpoints" in program.err
    assert "No new checkpoint in" in program.error
    assert "for 0.1 seconds" in program.error
    assert "Is the training running?" in program.error


def test_eval_stops_within_an_evaluation(copy, stopping):
    copy.steps_per_loop = 2
    assert stopping(copy, "eval", step=10) == 75
    assert "at step 10, after 2 of 3 batches of its evaluation." in copy.err
    assert copy.steps("eval", "eval") == [5]
    assert copy("eval") == 0
    assert copy.steps("eval", "eval") == [5, 10, 15, 20]


def test_eval_stops_between_two_checkpoints(copy, stopping, monkeypatch):
    # Too quick to be stopped within.
    monkeypatch.setattr(
        Trainer,
        "evaluate",
        lambda self, total_steps, stop: Summary(
            step=self.step,
            total_steps=total_steps,
            kind="eval",
            metrics={"loss": 1.0},
            seconds=0.1,
        ),
    )
    assert stopping(copy, "eval", step=10) == 75
    assert "Stopped by SIGTERM at step 10, evaluated." in copy.err
    assert copy.steps("eval", "eval") == [5, 10]
    assert copy("eval") == 0
    assert copy.steps("eval", "eval") == [5, 10, 15, 20]


def warnings_of(caplog, text):
    """How many warnings hold a text."""
    return sum(
        record.levelname == "WARNING" and text in record.getMessage()
        for record in caplog.records
    )


def test_eval_passes_over_what_was_removed(copy, monkeypatch, caplog):
    # Between the look at the directory and the evaluation.
    there = modes.Checkpoints.steps
    monkeypatch.setattr(
        modes.Checkpoints, "steps", lambda self: sorted([*there(self), 7])
    )
    assert copy("eval") == 0
    assert copy.steps("eval", "eval") == [5, 10, 15, 20]
    assert warnings_of(caplog, "step 7 ") == 1


def test_eval_passes_over_what_is_damaged(copy, caplog):
    path = processes.checkpoint_path(copy.workdir, 10)
    (path / "variables.index").unlink()
    assert copy("eval") == 0
    assert copy.steps("eval", "eval") == [5, 15, 20]
    assert warnings_of(caplog, "step 10 ") == 1


@pytest.fixture
def other_task(monkeypatch):
    monkeypatch.setattr(
        ToyTask,
        "configuration",
        lambda self: {"batch_size": self.batch_size, "other": True},
    )


@pytest.mark.parametrize("mode", modes.MODES)
def test_another_configuration_is_refused(copy, mode, other_task):
    assert copy(mode) == 1
    assert "is of another configuration" in copy.error
    assert "other: absent there, True now" in copy.err


def test_eval_refuses_another_configuration_of_what_is_evaluated(
    copy, monkeypatch
):
    assert copy("eval") == 0
    monkeypatch.setattr(
        ToyTask, "configuration", lambda self: {"batch_size": 1}
    )
    assert copy("eval") == 1
    assert "is of another configuration" in copy.error
    # Of what is damaged nobody knows.
    path = processes.checkpoint_path(copy.workdir, STEPS)
    (path / "metadata.json").unlink()
    assert copy("eval") == 0


def test_a_request_after_the_last_evaluation_comes_too_late(
    copy, stopping, monkeypatch
):
    # So that evaluations are done in one loop.
    monkeypatch.setattr(
        pace.LoopLength, "loop_end", lambda self, step: step + 100
    )
    assert stopping(copy, "eval", step=STEPS) == 0
    assert copy.steps("eval", "eval") == [5, 10, 15, 20]


def test_a_checkpoint_that_cannot_be_read_now_is_told(copy, monkeypatch):
    def fail(self, step):
        raise tf.errors.PermissionDeniedError(None, None, "not now")

    monkeypatch.setattr(modes.Checkpoints, "_read_metadata", fail)
    assert copy("eval") == 1
    assert "cannot be read now: not now. Run the same" in copy.error


def test_two_evaluations_in_one_work_directory(copy):
    with only_process(copy.workdir, "eval"):
        assert copy("eval") == 1
        assert "Another process (eval) is at work in" in copy.error
        assert copy("train") == 0


def test_what_is_done_is_said(copy):
    assert copy("train") == 0
    assert "Training is done: there is a checkpoint of step 20." in copy.err
    assert copy("eval") == 0
    assert "evaluated already" not in copy.err
    assert copy("eval") == 0
    assert "The checkpoint of the last step is evaluated already." in copy.err


# Export.


def test_export(copy):
    assert copy("export") == 0
    path = copy.workdir / "export" / "20"
    assert copy.out == f"Wrote {path}\n"
    served = tf.saved_model.load(str(path))
    points = copy.trainer.task.points
    np.testing.assert_allclose(
        served(tf.constant(points)),
        copy.trainer.model(points, training=False),
        rtol=1e-5,
        atol=1e-6,
    )
    # Of all that is stored, not only of what is computed with it.
    reader = tf.train.load_checkpoint(str(path / "variables" / "variables"))
    shapes = reader.get_variable_to_shape_map()
    kernels = [
        reader.get_tensor(name)
        for name, shape in shapes.items()
        if len(shape) == 2
    ]
    masks = [
        value
        for name, value in techniques.sparse_state(copy.trainer.model).items()
        if name.endswith(":mask")
    ]
    assert len(kernels) == len(masks) == 2
    for mask in masks:
        (kernel,) = [k for k in kernels if k.shape == mask.shape]
        np.testing.assert_array_equal(kernel != 0, mask == 1)
        assert (mask == 0).mean() == pytest.approx(0.8, abs=0.02)
    # Again, over what is there.
    assert copy("export") == 0


def test_there_is_nothing_to_export(program):
    assert program("export") == 1
    assert "There is no checkpoint to export in" in program.error


# Profiles.


def profiles(program):
    return list((program.workdir / "profile").rglob("*.xplane.pb"))


def test_a_profile_is_taken_of_the_steps_asked_for(program, trained):
    assert program("train", profile_steps=(6, 9)) == 0
    assert len(profiles(program)) == 1
    steps = program.steps("train", "train")
    assert {6, 9} <= set(steps)
    assert (
        processes.differences(
            processes.checkpoint_values(program.workdir, STEPS),
            processes.checkpoint_values(trained.workdir, STEPS),
        )
        == []
    )


def test_a_training_that_stops_within_the_window(program, stopping):
    window = {"profile_steps": (6, 14)}
    assert stopping(program, "train", window, step=8) == 75
    assert len(profiles(program)) == 1
    # What is left of the window.
    assert program("train", **window) == 0
    assert len(profiles(program)) == 2
    names = [path.name for path in (program.workdir / "profile").iterdir()]
    assert sorted(names) == ["step-00000006", "step-00000008"]
    # And nothing when it is over.
    assert program("train", **window) == 0
    assert len(profiles(program)) == 2


# What goes wrong.


def test_two_trainings_in_one_work_directory(copy):
    with only_process(copy.workdir):
        assert copy("train") == 1
        assert "Another process (train) is at work in" in copy.error
        # These may look on.
        assert copy("eval") == 0
        assert copy("export") == 0
    assert copy("train") == 0


@pytest.mark.parametrize("mode", ["eval", "train_and_eval"])
def test_a_task_without_evaluation_data(program, mode, monkeypatch):
    make_trainer = program.make_trainer

    def without():
        trainer = make_trainer()
        trainer.task.eval_batches = 0
        return trainer

    monkeypatch.setattr(program, "make_trainer", without)
    assert program(mode) == 1
    assert f"The mode {mode} needs evaluation data" in program.error
    # Before anything is computed.
    assert program.trainer.step == 0
    assert program("train") == 0


@pytest.mark.parametrize("mode", modes.MODES)
def test_a_work_directory_that_cannot_be_made(program, mode):
    program.workdir.write_text("in the way")
    assert program(mode) == 1
    assert "cannot be written to" in program.error
    # Before the model is made.
    assert program.trainer is None


def test_what_the_package_refuses_is_told_in_a_line(program, monkeypatch):
    monkeypatch.setattr(
        program, "make_trainer", lambda: make_strategy("everywhere")
    )
    assert program("train") == 1
    assert program.error.startswith("FATAL `strategy` must be one of")


def test_mistakes_found_by_keras_keep_their_traceback(program, monkeypatch):
    def build_model(self):
        return keras.Sequential([keras.Input((2,)), keras.layers.Dense(-1)])

    monkeypatch.setattr(ToyTask, "build_model", build_model)
    with pytest.raises(ValueError, match="expected a positive integer"):
        program("train")


def test_a_log_that_cannot_be_written(program):
    class Failing:
        def __init__(self, *args, **kwargs):
            pass

        def __call__(self, record):
            raise tf.errors.ResourceExhaustedError(None, None, "it is full")

        def close(self):
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modes, "TensorBoard", Failing)
        assert program("train") == 1
    assert "The record of step 1 could not be written to" in program.error
    assert "it is full. Make room" in program.error
    assert program("train") == 0
    assert program.steps("train", "train")[0] == 1


def test_what_tensorflow_fails_with_is_not_hidden(program, monkeypatch):
    def fail():
        raise tf.errors.InvalidArgumentError(None, None, "wrong shape")

    monkeypatch.setattr(program, "make_trainer", fail)
    with pytest.raises(tf.errors.InvalidArgumentError, match="wrong shape"):
        program("train")


class Exited(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def in_a_job(monkeypatch):
    """As if other processes took part."""

    def exit_process(code):
        raise Exited(code)

    monkeypatch.setattr(modes, "several_processes", lambda strategy: True)
    monkeypatch.setattr(modes.os, "_exit", exit_process)


@pytest.mark.parametrize("mode", ["eval", "export"])
def test_modes_for_one_process(copy, mode, in_a_job, capfd):
    with pytest.raises(Exited, match="1"):
        copy(mode)
    assert f"The mode {mode} is for one process" in capfd.readouterr().err


LOST = (
    "Graph execution error:\n\nDetected at node x defined at (most recent call "
    "last):\nCollective ops is aborted by: Socket closed\nAdditional GRPC error"
)


def test_a_lost_worker_is_told_in_a_line(program, in_a_job, monkeypatch, capfd):
    def fail(trainer, *args, **kwargs):
        raise tf.errors.UnavailableError(None, None, LOST)

    monkeypatch.setattr(Trainer, "train", fail)
    with pytest.raises(Exited, match="1"):
        program("train")
    (line,) = capfd.readouterr().err.splitlines()
    assert line == (
        "FATAL A worker of this job is gone, or cannot be reached: Socket "
        "closed. Start all workers again to continue from the last checkpoint."
    )


def test_mistakes_are_not_taken_for_a_lost_worker(
    program, in_a_job, monkeypatch, capfd
):
    def fail(trainer, *args, **kwargs):
        raise tf.errors.FailedPreconditionError(None, None, "no such table")

    monkeypatch.setattr(Trainer, "train", fail)
    with pytest.raises(Exited, match="1"):
        program("train")
    err = capfd.readouterr().err
    assert "no such table" in err
    assert "gone" not in err


def test_other_errors_of_a_worker_are_shown(
    program, in_a_job, monkeypatch, capfd
):
    def fail(trainer, *args, **kwargs):
        raise tf.errors.InvalidArgumentError(None, None, "wrong shape")

    monkeypatch.setattr(Trainer, "train", fail)
    with pytest.raises(Exited, match="1"):
        program("train")
    err = capfd.readouterr().err
    assert "wrong shape" in err
    assert "Traceback" in err
    assert "gone" not in err


def test_ctrl_c_before_training(program, in_a_job, monkeypatch, capfd):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "make_trainer", interrupt)
    with pytest.raises(Exited, match="130"):
        program("train")
    assert "before training began" in capfd.readouterr().err


def test_a_loss_that_is_not_finite(program, monkeypatch):
    monkeypatch.setattr(
        toy_task.ToyTask,
        "build_optimizer",
        lambda self, model: keras.optimizers.SGD(1e30),
    )
    assert program("train", save_checkpoints_steps=1) == 1
    assert re.search(r"(in|by) step \d+", program.error)
    for step in program.saved:
        values = processes.checkpoint_values(program.workdir, step)
        assert all(np.isfinite(value).all() for value in values.values())
