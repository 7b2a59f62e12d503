import dataclasses
import itertools
import multiprocessing
import os
import pathlib
import re
import signal
import threading
import time

import pytest

from sos.errors import Stopped, UsageError
from sos.experiments import branch, launchers, sweeps
from sos.experiments.config import run_name
from sos.experiments.launchers import LocalLauncher, TrainerCache
from sos.experiments.progress import SweepProgress
from sos.experiments.runs import read_result, run, run_directory
from sos.files import lock_directory
from tests.support import processes, toy_experiment

SLOW = "tests.support.toy_experiment:Slow"


class Progress(SweepProgress):
    """Keeps the reasons of the runs that failed."""

    def __init__(self, configs):
        super().__init__(quiet=True)
        self.failures = {}
        for config in configs:
            self.add(config)

    def fail(self, name, reason):
        self.failures[name] = reason
        super().fail(name, reason)


def launch(configs, workdir, *, workers=2, stop=None):
    """Launches runs; returns what is raised at the end, and the failures."""
    progress = Progress(configs)
    with progress, pytest.raises(Exception) as error:
        LocalLauncher(workers).launch(
            configs, workdir, progress=progress, stop=stop
        )
    return error.value, progress.failures


# Sharing compiled steps.


def test_trainer_cache_shares_what_compiles_to_the_same(toy_configs):
    trainers = TrainerCache()
    made = [trainers(config) for config in toy_configs]
    assert len({id(trainer) for trainer in made}) == len(toy_experiment.TRAINED)
    # Two seeds each.
    assert made[0] is made[1]


# One that has masks, one with noise and a penalty.
@pytest.mark.parametrize("technique", ["magnitude", "variational_dropout"])
def test_trainer_cache_shared_run_has_the_bits_of_one_alone(
    technique, finished, tmp_path
):
    # In `finished` the second seed's run shared the trainer of the first.
    config = toy_experiment.config(technique, seed=1)
    run(config, tmp_path, make_trainer=TrainerCache(), quiet=True)
    (directory,) = tmp_path.iterdir()
    expected = processes.checkpoint_values(finished / directory.name, 12)
    found = processes.checkpoint_values(directory, 12)
    assert processes.differences(found, expected) == []


@pytest.mark.parametrize(
    ("names", "hyperparameters"),
    [
        (("lottery_ticket", "augmented_init", "random_mask"), {}),
        (("transferred_profile",), toy_experiment.MAGNITUDE),
    ],
)
def test_trainer_cache_branches_share_what_compiles_to_the_same(
    names, hyperparameters, toy_configs, finished, tmp_path
):
    # Of different techniques.
    trunks = [run_directory(toy_configs[i], finished) for i in (2, 5)]
    branches = [
        branch(trunk, name, **hyperparameters)
        for name in names
        for trunk in trunks
    ]
    trainers = TrainerCache()
    compiled = []

    def make_trainer(config):
        trainer = trainers(config)
        compiled.append(trainer.steps)
        return trainer

    for config in branches:
        run(config, tmp_path / "one", make_trainer=make_trainer, quiet=True)
    assert len(compiled) == len(branches)
    assert len(set(map(id, compiled))) == 1
    # The last one has the bits of one alone.
    run(branches[-1], tmp_path / "two", make_trainer=TrainerCache(), quiet=True)
    (directory,) = (tmp_path / "two").iterdir()
    expected = processes.checkpoint_values(directory, 12)
    found = processes.checkpoint_values(tmp_path / "one" / directory.name, 12)
    assert processes.differences(found, expected) == []


# The order of runs, with workers that are threads and train nothing.


class FakeProcess:
    """A process that has ended."""

    exitcode = -signal.SIGKILL

    def kill(self):
        pass

    terminate = join = kill


@pytest.fixture
def fake_workers(monkeypatch):
    """Replaces worker processes by threads.

    Returns a list of the names that workers received and sent back as they
    were, and a dictionary with the messages they answer, by name; `None` ends
    the worker.
    """
    received, answers = [], {}

    def serve(pipe):
        while True:
            try:
                config, _, _ = pipe.recv()
            except (EOFError, OSError):
                return
            name = run_name(config)
            received.append(name)
            messages = answers.get(name, [])
            message = messages.pop(0) if messages else ("finished", None)
            if message is None:
                pipe.close()
                return
            # Before, because the next run may begin at once.
            received.append(name)
            pipe.send(message)

    def start(pool, index, threads):
        pipe, other = multiprocessing.Pipe()
        threading.Thread(target=serve, args=(other,), daemon=True).start()
        pool._workers[index] = launchers._Worker(FakeProcess(), pipe, threads)

    monkeypatch.setattr(launchers._Pool, "start", start)
    # No test waits for a run that another process trains.
    monkeypatch.setattr(launchers, "_RETRY", 0.0)
    monkeypatch.setattr(Progress, "finish", lambda *_: None)
    return received, answers


@pytest.fixture
def family():
    """Two trunks, two branches of the first, and one of its first branch."""
    trunks = sweeps.expand(
        toy_experiment.config("magnitude"), [{"seed": 0}, {"seed": 1}]
    )
    names = ("lottery_ticket", "random_mask")
    branches = sweeps.expand({}, [branch(trunks[0], name) for name in names])
    last = sweeps.expand({}, [branch(branches[0], "scratch")])
    return [*trunks, *branches, *last]


@pytest.mark.parametrize("workers", [1, 2])
def test_local_launcher_branches_begin_when_their_parent_is_finished(
    workers, family, fake_workers, tmp_path
):
    names = [run_name(config) for config in family]
    received, answers = fake_workers
    # As if another process trained the trunk.
    answers[names[0]] = 3 * [("in_use", None)]
    assert failures_of(family, tmp_path, workers) == {}
    assert received.count(names[0]) == 2 * 4
    last = {name: len(received) - received[::-1].index(name) for name in names}
    for config, name in zip(family, names, strict=True):
        if config.parent is not None:
            assert received.index(name) >= last[config.parent]
            assert received.count(name) == 2


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(("failed", "no luck"), "no luck"), (None, "was killed")],
)
def test_local_launcher_parent_fails_its_branches_fail(
    answer, reason, family, fake_workers, tmp_path
):
    names = [run_name(config) for config in family]
    received, answers = fake_workers
    answers[names[0]] = [answer]
    failures = failures_of(family, tmp_path, workers=2)
    assert set(failures) == {*names[0:1], *names[2:]}
    assert reason in failures[names[0]]
    for name, parent in ((2, 0), (3, 0), (4, 2)):
        assert f"parent {names[parent]} failed" in failures[names[name]]
    assert set(received) == set(names[:2])


def test_local_launcher_finished_parent_is_not_waited_for(
    family, fake_workers, tmp_path
):
    received, _ = fake_workers
    assert failures_of(family[2:4], tmp_path, workers=1) == {}
    assert len(set(received)) == 2


def failures_of(configs, workdir, workers):
    progress = Progress(configs)
    with progress:
        failures = LocalLauncher(workers).launch(
            configs, workdir, progress=progress
        )
    assert failures == progress.failures
    return failures


# Worker processes, each of which imports TensorFlow: two jobs show everything.


@pytest.mark.slow
def test_local_launcher_two_workers_train_all_runs_until_a_bug(
    toy_configs, finished, tmp_path, monkeypatch
):
    failing, long, broken = sweeps.expand(
        toy_experiment.CONFIG,
        [
            {"task": "tests.support.toy_experiment:Failing"},
            {"task": SLOW, "train_steps": 1_000_000},
            {"task": "tests.support.toy_experiment:Broken"},
        ],
    )
    log = log_of(long, tmp_path)
    # The bug shows itself when all others are finished and one is trained.
    awaited = [run_directory(config, tmp_path) for config in toy_configs]
    awaited = [os.path.join(path, "result.json") for path in awaited]
    monkeypatch.setenv(
        toy_experiment.BROKEN_AFTER, os.pathsep.join([*awaited, str(log)])
    )
    error, failures = launch([failing, *toy_configs, long, broken], tmp_path)
    # Runs have the results that they have in one process.
    assert_same_results(toy_configs, tmp_path, finished)
    # A run that fails stops no other.
    assert list(failures) == [run_name(failing)]
    assert "step 1" in failures[run_name(failing)]
    # A bug stops all of them, and loses nothing of the one in progress.
    assert type(error) is RuntimeError
    assert "ZeroDivisionError: a bug" in str(error)
    assert processes.checkpoint_steps(log.parent)[-1] > 0


def assert_same_results(configs, workdir, other):
    for config in configs:
        expected = read_result(run_directory(config, other))
        result = read_result(run_directory(config, workdir))
        assert dataclasses.replace(result, seconds=0.0, metrics={}) == (
            dataclasses.replace(expected, seconds=0.0, metrics={})
        )
        # With other numbers of threads, sums have another order.
        assert result.metrics == pytest.approx(expected.metrics, rel=1e-4)


def log_of(config, workdir):
    return pathlib.Path(run_directory(config, workdir), "train.jsonl")


def last_step(config, workdir):
    """The last step in a run's log, 0 without one."""
    records = processes.records(run_directory(config, workdir))
    return records[-1]["step"] if records else 0


def wait_until(condition):
    deadline = time.monotonic() + processes.PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def send_to_workers(signum):
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signum)


class Stop:
    requested = None


@pytest.mark.slow
def test_local_launcher_worker_killed_stopped_and_stopped_with_its_parent(
    tmp_path,
):
    killed, held, good, stopped = sweeps.expand(
        toy_experiment.CONFIG,
        [
            {"task": SLOW, "train_steps": 1_000_000},
            {"seed": 1},
            {"seed": 2},
            {"task": SLOW, "train_steps": 2_000_000},
        ],
    )
    stop = Stop()
    steps = []

    def disturb():
        try:
            with lock_directory(run_directory(held, tmp_path), "run"):
                wait_until(lambda: last_step(killed, tmp_path))
                send_to_workers(signal.SIGKILL)
                wait_until(lambda: finished_step(good))
            # The worker that takes its place trains `held`, unless that was
            # found in use a moment ago; otherwise it goes on with `stopped`.
            while not finished_step(held):
                step = last_step(stopped, tmp_path)
                wait_until(
                    lambda step=step: (
                        last_step(stopped, tmp_path) > step
                        or finished_step(held)
                    )
                )
                send_to_workers(signal.SIGTERM)
            steps.append(last_step(stopped, tmp_path))
            wait_until(lambda: last_step(stopped, tmp_path) > steps[0])
            # As Ctrl-C does, which reaches all processes of a group.
            send_to_workers(signal.SIGTERM)
        finally:
            stop.requested = signal.SIGINT

    def finished_step(config):
        result = read_result(run_directory(config, tmp_path))
        return result and result.step

    os.makedirs(run_directory(held, tmp_path))
    thread = threading.Thread(target=disturb)
    thread.start()
    error, failures = launch(
        [killed, held, good, stopped], tmp_path, workers=1, stop=stop
    )
    thread.join()
    # A worker that is killed fails its run only.
    assert list(failures) == [run_name(killed)]
    assert "was killed" in failures[run_name(killed)]
    # The run of another process is waited for.
    assert finished_step(good) == finished_step(held) == 12
    # A stop saves what is trained, which goes on where it was.
    assert isinstance(error, Stopped)
    assert re.search(r"SIGINT, 1 of 1 runs .* saved", str(error))
    directory = run_directory(stopped, tmp_path)
    assert processes.checkpoint_steps(directory)[-1] > steps[0] > 0
    logged = [record["step"] for record in processes.records(directory)]
    assert logged == sorted(set(logged))


@pytest.mark.slow
def test_local_launcher_trunk_and_branches_equal_runs_in_one_process(tmp_path):
    def trunk_of(task, **overrides):
        config = toy_experiment.config("magnitude", task=task, **overrides)
        return sweeps.expand(config, [{}])

    def branch_of(trunk, name, **options):
        return sweeps.expand({}, [branch(trunk[0], name, **options)])

    trunk = trunk_of(toy_experiment.CONFIG["task"])
    branches = branch_of(trunk, "scratch") + branch_of(trunk, "lottery_ticket")
    failing = trunk_of("tests.support.toy_experiment:Failing")
    lost = branch_of(failing, "scratch")
    lost += branch_of(lost, "random_mask")
    slow = trunk_of(SLOW, train_steps=100)
    # 4 seconds.
    (stopped,) = branch_of(slow, "scratch", multiplier=4)
    configs = [*lost, stopped, *branches, *failing, *slow, *trunk]
    stop = Stop()

    def press_ctrl_c():
        try:
            wait_until(lambda: last_step(stopped, tmp_path))
        finally:
            stop.requested = signal.SIGINT

    thread = threading.Thread(target=press_ctrl_c)
    thread.start()
    with pytest.raises(Stopped):
        sweeps.run_sweep(
            configs, tmp_path, launcher=LocalLauncher(2), stop=stop
        )
    thread.join()
    assert read_result(run_directory(stopped, tmp_path)) is None
    with pytest.raises(sweeps.FailedRunsError) as error:
        sweeps.run_sweep(configs, tmp_path, launcher=LocalLauncher(2))
    failed = [run_name(config) for config in (*failing, *lost)]
    assert set(error.value.failures) == set(failed)
    assert "step 1" in error.value.failures[failed[0]]
    for parent, name in itertools.pairwise(failed):
        assert f"parent {parent} failed" in error.value.failures[name]
        # It did not begin.
        assert not (tmp_path / name).exists()
    # The branch went on where it was.
    logged = [
        r["step"] for r in processes.records(tmp_path / run_name(stopped))
    ]
    assert logged == [*sorted(set(logged)), 400]

    serial = tmp_path / "serial"
    sweeps.run_sweep(
        [*branches, *trunk], serial, launcher=toy_experiment.SerialLauncher()
    )
    assert_same_results([*trunk, *branches], tmp_path, serial)


def test_local_launcher_without_runs_starts_no_process(tmp_path):
    progress = Progress([])
    assert LocalLauncher(2).launch([], tmp_path, progress=progress) == {}


@pytest.mark.parametrize("workers", [0, -1])
def test_local_launcher_without_workers_raises(workers):
    with pytest.raises(UsageError, match=f"workers={workers}"):
        LocalLauncher(workers)
