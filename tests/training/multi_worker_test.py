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

TECHNIQUES = ["dense", *techniques.NAMES]
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
    """The work directory of a job that trained every technique."""
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


@pytest.mark.parametrize("task", TECHNIQUES)
def test_all_workers_hold_the_same_bits(job, task):
    first, second = (final_values(job, task, index) for index in range(2))
    assert processes.differences(first, second) == []


@pytest.mark.parametrize("task", TECHNIQUES)
def test_workers_compute_what_the_replicas_of_one_process_do(job, task):
    found = final_values(job, task, 0)
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


def test_evaluation_counts_every_example_once(job):
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


def test_the_chief_alone_writes(job):
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


SLOW = (
    "--train_steps=40",
    "--mode=train",
    "--save_checkpoints_steps=4",
    "--steps_per_loop=4",
)
TASK = "VariationalDropout"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("job") / "uninterrupted"
    finish(start(workdir, *SLOW, tasks=[TASK]))
    return final_values(workdir, TASK, 0)


def start_and_train(workdir, until):
    """Starts the workers and waits for a checkpoint and some steps more."""
    workers = start(workdir, *SLOW, "--step_seconds=0.2", tasks=[TASK])
    workers[0].wait_until(
        lambda: until in processes.checkpoint_steps(workdir / TASK)
    )
    time.sleep(0.3)
    return workers


@pytest.mark.parametrize(
    ("victim", "signum"),
    [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)],
)
def test_a_lost_worker_ends_the_job_which_can_go_on(
    tmp_path, uninterrupted, victim, signum
):
    workdir = tmp_path / "job"
    workers = start_and_train(workdir, until=8)
    workers[victim].stop(signum)
    other = workers[1 - victim]
    begin = time.monotonic()
    assert other.wait(PROMPT) == 1
    print(f"noticed after {time.monotonic() - begin:.1f} s")
    errors = [x for x in other.output.splitlines() if x.startswith("FATAL")]
    assert len(errors) == 1
    assert "Another worker ended" in errors[0]
    assert "Start all workers again" in errors[0]
    assert "Traceback" not in other.output
    workers[victim].kill()
    saved = processes.checkpoint_steps(workdir / TASK)[-1]
    assert 8 <= saved < 40

    again = start(workdir, *SLOW, tasks=[TASK])
    finish(again)
    assert f"from the checkpoint of step {saved}." in again[0].output
    for index in range(2):
        values = final_values(workdir, TASK, index)
        assert processes.differences(values, uninterrupted) == []


def test_a_full_disk_of_the_chief_ends_the_job_which_can_go_on(
    tmp_path, uninterrupted
):
    workdir = tmp_path / "job"
    # Larger than what it logs until then, smaller than a checkpoint.
    chief, other = start(
        workdir, *SLOW, tasks=[TASK], chief={"file_size": 6000}
    )
    assert chief.wait() == 1
    begin = time.monotonic()
    assert other.wait(PROMPT) == 1
    print(f"noticed after {time.monotonic() - begin:.1f} s")
    assert "The checkpoint of step 4 could not be written" in chief.output
    assert "Another worker ended" in other.output
    for worker in (chief, other):
        assert worker.output.count("FATAL") == 1
        assert "Traceback" not in worker.output
    assert list((workdir / TASK / "checkpoints").iterdir()) == []
    again = start(workdir, *SLOW, tasks=[TASK])
    finish(again)
    assert (
        processes.differences(final_values(workdir, TASK, 0), uninterrupted)
        == []
    )


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)]
)
def test_a_signal_to_one_worker_stops_all_at_one_step(
    tmp_path, uninterrupted, signum, code
):
    workdir = tmp_path / "job"
    workers = start_and_train(workdir, until=8)
    workers[1].stop(signum)
    assert [worker.wait(60) for worker in workers] == [code, code]
    saved = processes.checkpoint_steps(workdir / TASK)[-1]
    for worker in workers:
        assert (
            f"Stopped by {signum.name} at step {saved}, saved." in worker.output
        )
    finish(start(workdir, *SLOW, tasks=[TASK]))
    values = final_values(workdir, TASK, 0)
    assert processes.differences(values, uninterrupted) == []


def test_a_worker_that_waits_for_the_others_says_so_and_can_be_interrupted(
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


def test_workers_that_see_different_checkpoints(tmp_path):
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
