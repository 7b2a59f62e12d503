import json
import os
import re
import shutil
import signal
import unittest.mock

import keras
import numpy as np
import pytest
import tensorflow as tf

import sos
from sos import errors
from sos.files import lock_directory
from sos.training import main
from sos.training.checkpoints import Checkpoints
from sos.training.main import Options, end_process, exit_code_of, run
from sos.training.reporting import JsonLines
from sos.training.strategies import make_strategy
from sos.training.trainer import Trainer
from tests.support import processes, techniques, toy_task
from tests.support.toy_task import ToyTask

STEPS = 20
SCHEDULE = sos.schedules.PolynomialDecay(0.0, 0.8, 3, 15, frequency=3)


class Program:
    """A training program with a work directory, run in this process."""

    #: By `steps_per_loop`: a trainer that is reset is as good as a new one.
    trainers = {}

    def __init__(self, workdir, capfd=None):
        self.workdir = workdir
        self.capfd = capfd
        self.task = ToyTask("MagnitudePruning", schedule=SCHEDULE)
        self.trainer = None
        self.steps_per_loop = 4

    def make_trainer(self):
        trainer = self.trainers.get(self.steps_per_loop)
        if trainer is None:
            trainer = Trainer(
                self.task,
                strategy=make_strategy("one_device"),
                steps_per_loop=self.steps_per_loop,
            )
            self.trainers[self.steps_per_loop] = trainer
        else:
            trainer.reset(self.task)
        self.trainer = trainer
        return trainer

    def options(self, mode, **options):
        return Options(
            mode=mode,
            workdir=str(self.workdir),
            **{
                "train_steps": STEPS,
                "save_checkpoints_steps": 5,
                "steps_per_eval": 10,
                **options,
            },
        )

    def __call__(self, mode, stop_at=None, arrive=None, **options):
        """Runs a mode and returns the exit code."""
        options = self.options(mode, **options)
        if stop_at is None and arrive is None:
            code = run(options, self.make_trainer)
        else:
            call = main.evaluate_continuously if mode == "eval" else main.train
            trainer = self.make_trainer()
            stop = Stop(trainer, stop_at, arrive)
            code = exit_code_of(lambda: call(trainer, options, stop=stop))
        if self.capfd:
            self.out, self.err = self.capfd.readouterr()
        return code

    @property
    def saved(self):
        return processes.checkpoint_steps(self.workdir)

    def steps(self, log, kind):
        """The steps of the summaries of a kind in a log."""
        return [
            summary["step"]
            for summary in processes.records(self.workdir, log)
            if summary["kind"] == kind
        ]

    @property
    def error(self):
        """The one error on the standard error."""
        assert "Traceback" not in self.err
        (line,) = [x for x in self.err.splitlines() if x.startswith("FATAL")]
        return line


class Stop:
    """A `StopRequest` that asks to stop at a step of a trainer."""

    def __init__(self, trainer, step=None, arrive=None):
        self._trainer, self._step, self._arrive = trainer, step, arrive

    @property
    def requested(self):
        if self._step is None or self._trainer.step < self._step:
            return None
        return signal.SIGTERM

    def wait(self, seconds):
        self._arrive()
        return False


@pytest.fixture
def program(tmp_path, capfd):
    return Program(tmp_path / "work", capfd)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A program with all checkpoints of a training."""
    program = Program(tmp_path_factory.mktemp("trained"))
    assert program("train") == 0
    return program


@pytest.fixture
def copy(trained, program):
    """A program with a copy of that work directory."""
    shutil.copytree(trained.workdir, program.workdir)
    return program


def assert_same_values(first, second):
    """Compares the variables of the last step bit for bit."""
    values = [
        processes.checkpoint_values(program.workdir, STEPS)
        for program in (first, second)
    ]
    assert processes.differences(*values) == []


# Options.


def test_options_default_to_train_and_eval():
    options = Options(workdir="somewhere", train_steps=STEPS)
    assert options.mode == "train_and_eval"
    assert options.steps_per_eval is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "trian"}, "train, eval, train_and_eval, export.*'trian'"),
        ({"workdir": ""}, "`workdir`"),
        ({"train_steps": 0}, "`train_steps`"),
        ({"save_checkpoints_steps": 0}, "`save_checkpoints_steps`"),
        ({"keep_checkpoint_max": 0}, "`keep_checkpoint_max`.*=0"),
        (
            {"keep_checkpoint_every_n_steps": 0},
            "`keep_checkpoint_every_n_steps`.*=0",
        ),
        ({"steps_per_eval": -1}, "`steps_per_eval`.*=-1"),
        ({"eval_timeout": -1.0}, "`eval_timeout`.*-1.0"),
        (
            {"keep_checkpoint_every_n_steps": 1500},
            "keep_checkpoint_every_n_steps=1500, save_checkpoints_steps=1000",
        ),
        ({"keep_checkpoint_steps": (0, 21)}, r"=20.*=\[0, 21\]"),
        ({"keep_checkpoint_steps": (-1,)}, r"=20.*=\[-1\]"),
        ({"profile_steps": (5, 5)}, "`profile_steps`.*Received:.*=5,5"),
        ({"profile_steps": (0, 5)}, "`profile_steps`.*Received:.*=0,5"),
        ({"profile_steps": (5, 21)}, "`profile_steps`.*Received:.*=5,21"),
    ],
)
def test_options_invalid_raises(wrong, message):
    right = {"mode": "train", "workdir": "somewhere", "train_steps": STEPS}
    Options(**right)
    with pytest.raises(errors.UsageError, match=message):
        Options(**{**right, **wrong})


# Training.


def test_train_leaves_checkpoints_and_logs(trained):
    assert trained.saved == [5, 10, 15, 20]
    steps = trained.steps("train", "train")
    assert steps == [1, 2, 4, 5, 8, 10, 12, 15, 16, 20]
    assert list((trained.workdir / "train").glob("events.out.tfevents.*"))
    assert not (trained.workdir / "eval.jsonl").exists()
    # The end of the schedule.
    last = processes.records(trained.workdir)[-1]
    assert last["sparsity"] == pytest.approx(0.8, abs=0.01)


def test_train_of_a_finished_training_does_nothing(copy):
    before = (copy.workdir / "train.jsonl").read_bytes()
    assert copy("train") == 0
    assert "Training is complete: there is a checkpoint of step 20." in copy.err
    assert copy.out == ""
    assert (copy.workdir / "train.jsonl").read_bytes() == before
    assert copy.saved == [5, 10, 15, 20]


def test_train_keeps_the_newest_checkpoints_and_every_kth(program):
    code = program(
        "train",
        save_checkpoints_steps=2,
        keep_checkpoint_max=2,
        keep_checkpoint_every_n_steps=8,
    )
    assert code == 0
    assert program.saved == [8, 16, 18, 20]


def test_train_keeps_the_steps_asked_for(program, trained):
    options = {
        "save_checkpoints_steps": 2,
        "keep_checkpoint_max": 1,
        "keep_checkpoint_steps": (0, 7),
    }
    assert program("train", stop_at=2, **options) == 75
    assert program.saved == [0, 2]
    assert program("train", **options) == 0
    assert program.saved == [0, 7, 20]
    assert_same_values(program, trained)
    # Step 0 holds the initial weights.
    initial = processes.checkpoint_values(program.workdir, 0)
    (step,) = [v for name, v in initial.items() if "iteration" in name.lower()]
    assert step == 0
    fresh = toy_task.values(program.make_trainer())
    kernels = [v for v in initial.values() if v.ndim == 2 and v.any()]
    for value in fresh.values():
        if value.ndim == 2 and value.any():
            assert any(np.array_equal(value, kernel) for kernel in kernels)


def test_train_initialized_at_a_later_step_begins_there(tmp_path):
    program = Program(tmp_path)
    program.task.initialize = unittest.mock.Mock(
        side_effect=lambda model, optimizer: optimizer.iterations.assign(8)
    )
    for _ in range(2):
        assert program("train", keep_checkpoint_steps=(0, 8)) == 0
    program.task.initialize.assert_called_once()
    assert processes.checkpoint_steps(tmp_path) == [8, 10, 15, 20]
    assert min(line["step"] for line in processes.records(tmp_path)) > 8


def test_train_from_a_checkpoint_saves_no_step_0(copy):
    assert copy("train", keep_checkpoint_steps=(0,)) == 0
    assert copy.saved == [5, 10, 15, 20]


def test_train_initializes_unless_a_checkpoint_was_restored(copy, tmp_path):
    calls = []
    copy.task.initialize = lambda model, optimizer: calls.append(model)
    assert copy("train") == 0
    assert calls == []
    other = Program(tmp_path / "other")
    other.task = copy.task
    assert other("train", train_steps=1) == 0
    assert calls == [other.trainer.model]


def test_train_quiet_prints_nothing(copy):
    shutil.rmtree(processes.checkpoint_path(copy.workdir, STEPS))
    assert copy("train_and_eval", quiet=True) == 0
    assert (copy.out, copy.err) == ("", "")
    assert copy.steps("train", "train")[-1] == STEPS


def test_train_after_a_stop_goes_on_to_the_same_bits(program, trained):
    assert program("train", stop_at=12) == 75
    assert "Stopped by SIGTERM at step 12, saved. Run the same" in program.err
    assert program.saved == [5, 10, 12]
    assert program("train") == 0
    assert "Continuing from the checkpoint of step 12." in program.err
    assert_same_values(program, trained)


def test_train_after_a_kill_logs_every_step_once(copy):
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


def test_train_after_a_kill_in_a_save_removes_its_rest(copy):
    folder = copy.workdir / "checkpoints"
    shutil.rmtree(processes.checkpoint_path(copy.workdir, STEPS))
    (folder / ".writing-00000020").mkdir()
    (folder / ".writing-00000020" / "variables.index").write_bytes(b"half")
    assert copy("train") == 0
    assert {path.name for path in folder.iterdir()} == {
        f"step-{step:08d}" for step in (5, 10, 15, 20)
    }


# Evaluation.


def test_train_and_eval_evaluates_and_changes_no_bit(program, trained):
    assert program("train_and_eval", steps_per_eval=8) == 0
    assert program.steps("train", "eval") == [8, 16, 20]
    assert "eval  step 20/20" in program.out
    # Evaluations change nothing of the training.
    assert_same_values(program, trained)


def test_train_and_eval_without_steps_per_eval_evaluates_the_last_step(copy):
    shutil.rmtree(processes.checkpoint_path(copy.workdir, STEPS))
    assert copy("train_and_eval", steps_per_eval=None) == 0
    assert copy.steps("train", "eval") == [STEPS]


def test_train_and_eval_stopped_within_an_evaluation_repeats_it(copy):
    # At the end, where training itself does not stop any more.
    shutil.rmtree(processes.checkpoint_path(copy.workdir, STEPS))
    copy.steps_per_loop = 2
    assert copy("train_and_eval", stop_at=STEPS) == 75
    assert "at step 20, after 1 of 3 batches of its evaluation" in copy.err
    assert copy.saved[-1] == STEPS
    assert copy.steps("train", "eval") == []
    # It is made up for, and may be stopped again.
    assert copy("train_and_eval", stop_at=STEPS) == 75
    assert copy("train_and_eval") == 0
    assert copy.steps("train", "eval") == [20]


@pytest.mark.parametrize(
    ("until", "missed"), [(10, [10]), (15, []), (20, [20])]
)
def test_train_and_eval_after_a_kill_makes_up_for_an_evaluation(
    copy, until, missed
):
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


def test_train_returns_the_evaluation_of_the_last_step(copy):
    options = copy.options("train_and_eval", quiet=True)
    calls = []
    first = main.train(copy.make_trainer(), options, on_summary=[calls.append])
    assert (first.kind, first.step) == ("eval", STEPS)
    assert calls == [first]
    # After a restart it is read, and not computed again.
    again = main.train(copy.make_trainer(), options, on_summary=[calls.append])
    assert again == first
    assert calls == [first]
    assert main.train(copy.trainer, copy.options("train")) is None


def test_eval_evaluates_every_checkpoint_once(copy):
    assert copy("eval") == 0
    assert copy.steps("eval", "eval") == [5, 10, 15, 20]
    assert "already evaluated" not in copy.err
    before = (copy.workdir / "eval.jsonl").read_bytes()
    # Again, as after a restart.
    assert copy("eval") == 0
    assert "The checkpoint of the last step is already evaluated." in copy.err
    assert (copy.workdir / "eval.jsonl").read_bytes() == before
    # What a restarted evaluator has not seen yet.
    lines = before.splitlines(keepends=True)
    (copy.workdir / "eval.jsonl").write_bytes(b"".join(lines[:2]))
    options = copy.options("eval", quiet=True)
    summary = main.evaluate_continuously(copy.trainer, options)
    assert copy.steps("eval", "eval") == [5, 10, 15, 20]
    assert list((copy.workdir / "eval").glob("events.out.tfevents.*"))
    # What is returned is the last step's, evaluated now or before.
    assert (summary.kind, summary.step) == ("eval", STEPS)
    assert main.evaluate_continuously(copy.trainer, options) == summary


def test_eval_evaluated_before_holds_the_last_checkpoint(copy):
    assert copy("eval") == 0
    seconds = copy.trainer.seconds
    assert seconds > 0.0
    assert copy("eval") == 0
    assert (copy.trainer.step, copy.trainer.seconds) == (STEPS, seconds)


def test_eval_and_train_and_eval_find_the_same(copy, program, tmp_path):
    assert copy("eval") == 0
    other = Program(tmp_path / "other")
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


def test_eval_and_train_and_eval_average_the_same_checkpoints(tmp_path):
    class Averaged(ToyTask):
        def evaluators(self, checkpoints):
            def average(model):
                with checkpoints.average(model, last=2) as steps:
                    kernel = model.get_layer("a").kernel
                    total = np.sum(keras.ops.convert_to_numpy(kernel))
                return {"total": total, "averaged": f"{steps}"}

            return {"average": average}

    first, second = (Program(tmp_path / name) for name in "ab")
    options = {"steps_per_eval": 5, "quiet": True}
    first.task = second.task = Averaged("MagnitudePruning")
    assert first("train_and_eval", **options) == 0
    assert second("train", **options) == 0
    assert second("eval", **options) == 0
    found, other = (
        [r for r in processes.records(program.workdir, log) if "texts" in r]
        for program, log in ((first, "train"), (second, "eval"))
    )
    assert [r["texts"]["averaged"] for r in found] == [
        "(5,)",
        "(5, 10)",
        "(10, 15)",
        "(15, 20)",
    ]
    assert [(r["texts"], r["metrics"]) for r in found] == [
        (r["texts"], r["metrics"]) for r in other
    ]


def test_eval_follows_a_training(program, trained):
    source = trained.workdir / "checkpoints"
    target = program.workdir / "checkpoints"
    arrivals = [[], [5], [10, 15], [], [20]]

    def arrive():
        for step in arrivals.pop(0):
            name = f"step-{step:08d}"
            shutil.copytree(source / name, target / name)

    assert program("eval", arrive=arrive, eval_timeout=60) == 0
    assert arrivals == []
    assert program.steps("eval", "eval") == [5, 10, 15, 20]
    assert program.err.count("Waiting for checkpoints in") == 1


def test_eval_without_new_checkpoints_gives_up(program):
    assert program("eval", eval_timeout=0.1) == 1
    assert "Waiting for checkpoints" in program.err
    assert "No new checkpoint appeared in" in program.error
    assert "within 0.1 seconds" in program.error


def test_eval_stops_within_an_evaluation(copy):
    copy.steps_per_loop = 2
    assert copy("eval", stop_at=10) == 75
    assert "at step 10, after 2 of 3 batches of its evaluation." in copy.err
    assert copy.steps("eval", "eval") == [5]
    assert copy("eval") == 0
    assert copy.steps("eval", "eval") == [5, 10, 15, 20]


def test_eval_of_a_damaged_checkpoint_passes_over_it(copy, caplog):
    path = processes.checkpoint_path(copy.workdir, 10)
    (path / "variables.index").unlink()
    assert copy("eval") == 0
    assert copy.steps("eval", "eval") == [5, 15, 20]
    warnings = [
        record.getMessage()
        for record in caplog.records
        if record.levelname == "WARNING"
    ]
    assert sum("step 10 is damaged" in warning for warning in warnings) == 1


class OtherTask(ToyTask):
    """The same network with another configuration."""

    def configuration(self):
        return {**super().configuration(), "other": True}


@pytest.mark.parametrize("mode", main.MODES)
def test_run_of_another_configuration_ends_with_an_error(copy, mode):
    copy.task = OtherTask("MagnitudePruning", schedule=SCHEDULE)
    assert copy(mode) == 1
    assert "is of another configuration" in copy.error
    assert "other: not saved, True now" in copy.err


def test_eval_of_evaluated_checkpoints_refuses_another_configuration(copy):
    assert copy("eval") == 0
    copy.task = OtherTask("MagnitudePruning", schedule=SCHEDULE)
    assert copy("eval") == 1
    assert "is of another configuration" in copy.error
    # A damaged one says nothing about its configuration.
    path = processes.checkpoint_path(copy.workdir, STEPS)
    (path / "metadata.json").unlink()
    assert copy("eval") == 0


def test_eval_of_an_unreadable_checkpoint_ends_with_an_error(copy, monkeypatch):
    def fail(self, step):
        raise tf.errors.PermissionDeniedError(None, None, "not now")

    monkeypatch.setattr(Checkpoints, "_read_metadata", fail)
    assert copy("eval") == 1
    assert "cannot be read now: not now. Run the same" in copy.error


# Export.


def test_export_writes_the_last_checkpoint_with_its_zeros(copy):
    assert copy("export") == 0
    path = copy.workdir / "export" / "20"
    assert copy.out == f"Wrote {path}\n"
    served = tf.saved_model.load(str(path))
    points = copy.task.points
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
    assert main.export(copy.trainer, copy.options("export")) == str(path)


def test_export_without_a_checkpoint_ends_with_an_error(program):
    assert program("export") == 1
    assert "There is no checkpoint to export in" in program.error


def test_export_that_cannot_be_written_is_a_storage_error(copy):
    (copy.workdir / "export").write_text("in the way")
    assert copy("export") == 1
    assert f"{copy.workdir / 'export' / '20'}: " in copy.error


# Profiles.


def profiles(program):
    return list((program.workdir / "profile").rglob("*.xplane.pb"))


def test_train_with_profile_steps_profiles_them(program, trained):
    window = {"profile_steps": (6, 14)}
    assert program("train", stop_at=8, **window) == 75
    assert len(profiles(program)) == 1
    # What is left of the window.
    assert program("train", **window) == 0
    assert len(profiles(program)) == 2
    names = [path.name for path in (program.workdir / "profile").iterdir()]
    assert sorted(names) == ["step-00000006", "step-00000008"]
    assert {6, 14} <= set(program.steps("train", "train"))
    assert_same_values(program, trained)
    # And nothing when it is over.
    assert program("train", **window) == 0
    assert len(profiles(program)) == 2


# What goes wrong.


def test_run_in_a_directory_in_use_ends_with_an_error(copy):
    with lock_directory(copy.workdir):
        assert copy("train") == 1
        assert "Another process (train) is working in" in copy.error
        # These may look on.
        assert copy("eval") == 0
        assert copy("export") == 0
    with lock_directory(copy.workdir, "eval"):
        assert copy("eval") == 1
        assert "Another process (eval) is working in" in copy.error
        assert copy("train") == 0


@pytest.mark.parametrize("mode", ["eval", "train_and_eval"])
def test_run_without_evaluation_data_ends_with_an_error(
    program, mode, monkeypatch
):
    monkeypatch.setattr(ToyTask, "has_evaluation", False)
    assert program(mode) == 1
    assert f"The mode {mode} needs evaluation data" in program.error
    assert "ToyTask has none" in program.error
    # Before anything is computed.
    assert program.trainer.step == 0


@pytest.mark.parametrize("mode", main.MODES)
def test_run_in_a_directory_that_cannot_be_made_ends_with_an_error(
    program, mode
):
    program.workdir.write_text("in the way")
    assert program(mode) == 1
    assert "cannot be written to" in program.error
    # Before the model is made.
    assert program.trainer is None


def test_run_of_a_mistake_prints_one_line(program, monkeypatch):
    monkeypatch.setattr(
        program, "make_trainer", lambda: make_strategy("everywhere")
    )
    assert program("train") == 1
    assert program.error.startswith("FATAL `strategy` must be one of")


def test_run_of_a_mistake_found_by_keras_raises(program, monkeypatch):
    def build_model(self):
        return keras.Sequential([keras.Input((2,)), keras.layers.Dense(-1)])

    monkeypatch.setattr(ToyTask, "build_model", build_model)
    with pytest.raises(ValueError, match="expected a positive integer"):
        program("train")


@pytest.mark.parametrize("name", ["train", "train.jsonl"])
def test_train_with_a_log_that_cannot_be_written_ends_with_an_error(copy, name):
    shutil.rmtree(processes.checkpoint_path(copy.workdir, STEPS))
    path = copy.workdir / name
    shutil.move(path, copy.workdir / "away")
    path.write_text("in the way") if name == "train" else path.mkdir()
    assert copy("train") == 1
    assert f"{copy.workdir}" in copy.error
    assert re.search("could not be (written|opened)", copy.error)
    assert "Free disk space" in copy.error
    assert copy.saved == [5, 10, 15]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")
def test_train_with_a_log_on_a_full_disk_prints_one_line(program, monkeypatch):
    def full(self, path, **kwargs):
        # Closing it raises, too.
        self._file = open("/dev/full", "a", encoding="utf-8")

    monkeypatch.setattr(JsonLines, "__init__", full)
    assert program("train") == 1
    assert "No space left on device" in program.error


def test_train_of_a_loss_that_is_not_finite_saves_finite_weights(
    program, monkeypatch
):
    monkeypatch.setattr(
        ToyTask,
        "build_optimizer",
        lambda self, model: keras.optimizers.SGD(1e30),
    )
    assert program("train", save_checkpoints_steps=1) == 1
    assert re.search(r"(in|by) step \d+", program.error)
    for step in program.saved:
        values = processes.checkpoint_values(program.workdir, step)
        assert all(np.isfinite(value).all() for value in values.values())


@pytest.mark.parametrize("mode", ["eval", "export"])
def test_eval_and_export_in_several_processes_raise(mode, program):
    trainer = unittest.mock.Mock(
        strategy=unittest.mock.Mock(tf.distribute.MultiWorkerMirroredStrategy)
    )
    call = {"eval": main.evaluate_continuously, "export": main.export}[mode]
    with pytest.raises(errors.UsageError, match=f"mode {mode}"):
        call(trainer, program.options(mode))


# Exit codes.


def raising(error):
    def call():
        raise error

    return call


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (errors.StorageError("it is full"), 1, "FATAL it is full"),
        (errors.TaskError("no loss"), 1, "FATAL no loss"),
        (
            errors.Stopped(signal.SIGTERM, 3, "saved"),
            75,
            "Stopped by SIGTERM at step 3, saved. Run the same command again "
            "to continue.",
        ),
        (
            errors.Stopped(signal.SIGINT, 3, "saved"),
            130,
            "Stopped by SIGINT at step 3, saved. Run the same command again to "
            "continue.",
        ),
        (KeyboardInterrupt(), 130, "Stopped by SIGINT."),
    ],
    ids=repr,
)
@pytest.mark.parametrize("several_workers", [False, True])
def test_exit_code_of_reported_errors_prints_one_line(
    error, code, line, several_workers, capfd
):
    call = raising(error)
    assert exit_code_of(call, several_workers=several_workers) == code
    assert capfd.readouterr() == ("", f"{line}\n")


@pytest.mark.parametrize(
    ("value", "code"), [(None, 0), (0, 0), (75, 75), ("text", 0), (True, 0)]
)
def test_exit_code_of_success_is_zero_or_the_code_returned(value, code, capfd):
    assert exit_code_of(lambda: value) == code
    assert capfd.readouterr() == ("", "")


# What TensorFlow raises for a lost worker, and for other reasons too.
LOST = tf.errors.UnavailableError(
    None,
    None,
    "Graph execution error:\n\nDetected at node x (most recent call last):\n"
    "Collective ops is aborted by: Socket closed\nAdditional GRPC error",
)
BUGS = [
    ValueError("a bug"),
    OSError("no file of this package"),
    tf.errors.InvalidArgumentError(None, None, "wrong shape"),
    tf.errors.FailedPreconditionError(None, None, "no such table"),
]


@pytest.mark.parametrize("error", [*BUGS, LOST], ids=repr)
def test_exit_code_of_a_bug_raises(error):
    with pytest.raises(type(error)) as raised:
        exit_code_of(raising(error))
    assert raised.value is error


@pytest.mark.parametrize("error", BUGS, ids=repr)
def test_exit_code_of_a_bug_of_several_workers_prints_the_traceback(
    error, capfd
):
    assert exit_code_of(raising(error), several_workers=True) == 1
    err = capfd.readouterr().err
    assert err.startswith("Traceback")
    assert str(error) in err
    assert "worker" not in err


def test_exit_code_of_a_lost_worker_prints_one_line(capfd):
    assert exit_code_of(raising(LOST), several_workers=True) == 1
    assert capfd.readouterr().err == (
        "FATAL Another worker ended or cannot be reached: Socket closed. "
        "Start all workers again to continue from the last checkpoint.\n"
    )


def test_run_of_several_workers_reports_a_lost_one(program, monkeypatch, capfd):
    monkeypatch.setenv("TF_CONFIG", processes.cluster(2)[0])
    monkeypatch.setattr(program, "make_trainer", raising(LOST))
    assert program("train") == 1
    assert "Another worker ended" in program.error


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("code", [0, 1, 75, 130])
def test_end_process_of_several_workers_ends_at_once_after_errors(
    code, workers, monkeypatch
):
    ends = []

    def end_at_once(code):
        ends.append(code)
        raise SystemExit(code)

    monkeypatch.setenv("TF_CONFIG", processes.cluster(workers)[0])
    monkeypatch.setattr(main.os, "_exit", end_at_once)
    with pytest.raises(SystemExit) as end:
        end_process(code)
    assert end.value.code == code
    assert ends == ([code] if workers == 2 and code in (1, 130) else [])
