"""Two processes that train together, as two machines do."""

import signal
import time

import numpy as np
import pytest

from sos.training import main, strategies
from sos.training.trainer import Trainer
from tests.support import processes, techniques, toy_task, toy_train
from tests.support.processes import Program

pytestmark = pytest.mark.slow

# One without a technique, and what techniques of each kind hold and do: masks
# of weights, gates of their own, noise of activations.
TECHNIQUES = [
    "dense",
    "MagnitudePruning",
    "L0Regularization",
    "VariationalDropout",
]
STEPS = 20
# How soon a worker has to notice that another is gone. TensorFlow notices a
# closed connection at once, and silence after ten seconds.
PROMPT = 30.0


def start(workdir, *arguments, tasks, chief=None):
    """Starts the workers of a job that trains toy tasks.

    Args:
        workdir: Theirs.
        *arguments: Flags.
        tasks: What they train, one after the other.
        chief: Further options of the chief's `Program`.
    """
    return [
        Program(
            "tests.support.toy_train",
            "--strategy=multi_worker",
            "--deterministic",
            f"--techniques={','.join(tasks)}",
            f"--workdir={workdir}",
            f"--dump=worker-{index}",
            *arguments,
            log=f"{workdir}-{index}.log",
            environment={"TF_CONFIG": config},
            **((chief or {}) if index == 0 else {}),
        )
        for index, config in enumerate(processes.cluster(2))
    ]


def finish(workers):
    codes = [worker.wait() for worker in workers]
    assert codes == [0, 0], "\n".join(worker.output for worker in workers)


def final_values(workdir, task, index):
    with np.load(workdir / task / f"worker-{index}.npz") as values:
        return dict(values)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The work directory of a job that trained all of these."""
    workdir = tmp_path_factory.mktemp("job") / "all"
    finish(
        start(
            workdir,
            f"--train_steps={STEPS}",
            "--steps_per_eval=10",
            tasks=TECHNIQUES,
        )
    )
    return workdir


def make_trainer(task, strategy=None):
    """A trainer of one process for the same task."""
    strategy = strategy or strategies.make_strategy("one_device")
    return Trainer(toy_train.make_task(task), strategy=strategy)


def train(task, strategy=None):
    """What one process makes of the same task."""
    trainer = make_trainer(task, strategy)
    trainer.train(STEPS)
    return trainer


@pytest.mark.oldest
@pytest.mark.parametrize("task", TECHNIQUES)
def test_workers_hold_the_bits_and_values_of_replicas(job, task):
    found, other = (final_values(job, task, index) for index in range(2))
    assert processes.differences(found, other) == []
    # Those of the replicas of one process.
    expected = toy_task.values(train(task, techniques.two_replicas()))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value.dtype.kind == "f":
            np.testing.assert_allclose(
                found[name], value, rtol=1e-4, atol=1e-5, err_msg=name
            )
        else:
            # Masks, and the number of steps.
            np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("task", ["dense", "MagnitudePruning"])
def test_workers_compute_what_one_device_does(job, task):
    # Not so for noise, of which every replica has its own.
    found = final_values(job, task, 1)
    trainer = train(task)
    for name, value in toy_task.values(trainer).items():
        np.testing.assert_allclose(
            found[name], value, rtol=1e-4, atol=1e-5, err_msg=name
        )
    if task != "dense":
        # The schedule's end: 0.8 of each kernel, and not the empty comparison.
        masks = [v for name, v in found.items() if name.endswith("_mask")]
        assert [int(m.sum()) for m in masks] == [19, 10]


def test_workers_evaluating_count_every_example_once(job):
    trainer = train("dense")
    logged = processes.records(job / "dense")
    (last,) = [
        r["metrics"]
        for r in logged
        if (r["kind"], r["step"]) == ("eval", STEPS)
    ]
    assert last["accuracy"] == trainer.evaluate().metrics["accuracy"]
    assert last["loss"] == pytest.approx(
        trainer.evaluate().metrics["loss"], rel=1e-5
    )


def test_workers_that_are_not_the_chief_write_nothing(job):
    for task in TECHNIQUES:
        folder = job / task
        # A checkpoint comes before every evaluation, too.
        assert {path.name for path in (folder / "checkpoints").iterdir()} == {
            "step-00000010",
            "step-00000020",
        }
        assert len(list((folder / "train").iterdir())) == 1
        steps = [
            r["step"] for r in processes.records(folder) if r["kind"] == "train"
        ]
        assert steps == sorted(set(steps))
        assert steps[-1] == STEPS


TASK = "VariationalDropout"
LOOPS = (
    f"--train_steps={STEPS}",
    "--mode=train",
    "--save_checkpoints_steps=2",
    "--steps_per_loop=2",
)


def start_and_train(workdir, until, **options):
    """Starts the workers and waits for a checkpoint and some steps more."""
    workers = start(
        workdir, *LOOPS, "--step_seconds=0.4", tasks=[TASK], **options
    )
    workers[0].wait_until(
        lambda: until in processes.checkpoint_steps(workdir / TASK)
    )
    time.sleep(0.3)
    return workers


def check_lost(worker):
    """Checks that a worker notices soon that it has lost another."""
    begin = time.monotonic()
    assert worker.wait(PROMPT) == 1
    print(f"noticed after {time.monotonic() - begin:.1f} s")
    (error,) = [x for x in worker.output.splitlines() if x.startswith("FATAL")]
    assert "Another worker ended" in error
    assert "Start all workers again" in error
    assert "Traceback" not in worker.output


def fill_the_disk_of_the_chief(workdir):
    # Larger than what it logs until then, smaller than a checkpoint.
    chief, other = start(
        workdir, *LOOPS, tasks=[TASK], chief={"file_size": 6000}
    )
    assert chief.wait() == 1
    check_lost(other)
    assert "The checkpoint of step 2 could not be written" in chief.output
    assert chief.output.count("FATAL") == 1
    assert "Traceback" not in chief.output
    assert list((workdir / TASK / "checkpoints").iterdir()) == []


def lose(victim, signum, workdir, until):
    workers = start_and_train(workdir, until)
    workers[victim].stop(signum)
    check_lost(workers[1 - victim])
    workers[victim].kill()
    assert until <= processes.checkpoint_steps(workdir / TASK)[-1] < STEPS


def stop_one_worker(workdir, until):
    """Stops all workers by a signal to one; returns the step they saved."""
    workers = start_and_train(workdir, until)
    workers[1].stop(signal.SIGTERM)
    assert [worker.wait(60) for worker in workers] == [75, 75]
    step = processes.checkpoint_steps(workdir / TASK)[-1]
    for worker in workers:
        assert f"Stopped by SIGTERM at step {step}, saved." in worker.output
    return step


def test_workers_disturbed_in_every_way_end_with_the_same_bits(job, tmp_path):
    """One job, as each start of it imports TensorFlow twice."""
    workdir = tmp_path / "job"
    fill_the_disk_of_the_chief(workdir)
    lose(0, signal.SIGKILL, workdir, until=2)
    # One that is silent, on a machine that was cut off.
    lose(1, signal.SIGSTOP, workdir, until=6)
    step = stop_one_worker(workdir, until=10)
    workers = start(workdir, *LOOPS, tasks=[TASK])
    finish(workers)
    assert f"from the checkpoint of step {step}." in workers[0].output
    expected = final_values(job, TASK, 0)
    for index in range(2):
        values = final_values(workdir, TASK, index)
        assert processes.differences(values, expected) == []


def test_worker_waiting_for_the_others_says_so_and_can_be_interrupted(
    tmp_path,
):
    with Program(
        "tests.support.toy_train",
        "--strategy=multi_worker",
        f"--workdir={tmp_path}/job",
        log=tmp_path / "log",
        environment={"TF_CONFIG": processes.cluster(2)[0]},
    ) as worker:
        worker.wait_until(lambda: "Waiting for the workers" in worker.output)
        time.sleep(1)
        worker.stop(signal.SIGINT)
        assert worker.wait(PROMPT) == -signal.SIGINT


def test_workers_that_see_different_checkpoints_end_with_an_error(tmp_path):
    # Each has a directory of its own in place of one that they share, and one
    # of them has trained before.
    options = main.Options(
        mode="train", workdir=str(tmp_path / "first" / "dense"), train_steps=4
    )
    main.train(make_trainer("dense"), options)
    workers = [
        Program(
            "tests.support.toy_train",
            "--strategy=multi_worker",
            f"--workdir={tmp_path / name}",
            log=tmp_path / f"{name}.log",
            environment={"TF_CONFIG": config},
        )
        for name, config in zip(
            ("first", "second"), processes.cluster(2), strict=True
        )
    ]
    for worker in workers:
        assert worker.wait() == 1
        assert "must share the directory" in worker.output
