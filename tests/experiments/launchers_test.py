import dataclasses
import multiprocessing
import os
import pathlib
import signal
import threading
import time

import pytest

from sos.errors import Stopped, UsageError
from sos.experiments import sweeps
from sos.experiments.config import run_name
from sos.experiments.launchers import LocalLauncher, TrainerCache
from sos.experiments.progress import SweepProgress
from sos.experiments.runs import read_result, run, run_directory
from sos.files import lock_directory
from tests.support import processes, toy_experiment


def values(config, workdir):
    return processes.checkpoint_values(
        run_directory(config, workdir), config.train_steps
    )


def launch(configs, workdir, *, workers=2, stop=None):
    progress = SweepProgress(quiet=True)
    for config in configs:
        progress.add(config)
    with progress:
        return LocalLauncher(workers).launch(
            configs, workdir, progress=progress, stop=stop
        )


# Sharing compiled steps.


def test_trainer_cache_shares_what_compiles_to_the_same(toy_configs):
    trainers = TrainerCache()
    made = [trainers(config) for config in toy_configs]
    assert len({id(trainer) for trainer in made}) == len(
        toy_experiment.TECHNIQUES
    )
    # Two seeds each.
    assert made[0] is made[1]


@pytest.mark.parametrize("technique", list(toy_experiment.TECHNIQUES))
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


# Worker processes.


def test_local_launcher_workers_train_all_runs(toy_configs, finished, tmp_path):
    assert launch(toy_configs, tmp_path) == {}
    for config in toy_configs:
        expected = read_result(run_directory(config, finished))
        result = read_result(run_directory(config, tmp_path))
        assert dataclasses.replace(result, seconds=0.0, metrics={}) == (
            dataclasses.replace(expected, seconds=0.0, metrics={})
        )
        assert result.metrics == pytest.approx(expected.metrics, rel=1e-4)


def test_local_launcher_failed_run_does_not_stop_the_others(tmp_path):
    failing, good = sweeps.expand(
        toy_experiment.CONFIG,
        [{"task": "tests.support.toy_experiment:Failing"}, {"seed": 1}],
    )
    with pytest.raises(sweeps.FailedRunsError, match="step 1") as error:
        sweeps.run_sweep([failing, good], tmp_path, launcher=LocalLauncher(1))
    assert len(error.value.failures) == 1
    assert read_result(run_directory(good, tmp_path)) is not None


def during_training(config, workdir, call):
    """Calls a function in a thread, once the run is being trained."""
    log = pathlib.Path(run_directory(config, workdir), "train.jsonl")

    def wait_and_call():
        while not log.exists() or not log.read_text():
            time.sleep(0.05)
        call()

    threading.Thread(target=wait_and_call, daemon=True).start()
    return log.parent


def send_to_workers(*signals):
    for worker in multiprocessing.active_children():
        for signum in signals:
            os.kill(worker.pid, signum)
            time.sleep(0.3)


@pytest.mark.parametrize("group", [False, True], ids=["parent", "group"])
def test_local_launcher_stop_saves_runs_in_progress(tmp_path, group):
    class Stop:
        requested = None

    stop = Stop()
    (config,) = sweeps.expand(
        toy_experiment.CONFIG, [{"train_steps": 1_000_000}]
    )

    def stop_all():
        if group:
            # The parent sends it once more.
            send_to_workers(signal.SIGTERM)
        stop.requested = signal.SIGINT

    directory = during_training(config, tmp_path, stop_all)
    with pytest.raises(Stopped, match=r"SIGINT, 1 of 1 runs .* saved"):
        launch([config], tmp_path, workers=1, stop=stop)
    assert processes.checkpoint_steps(directory)[-1] > 0


def test_local_launcher_killed_worker_fails_its_run_only(tmp_path):
    long, good = sweeps.expand(
        toy_experiment.CONFIG, [{"train_steps": 1_000_000}, {"seed": 1}]
    )
    during_training(long, tmp_path, lambda: send_to_workers(signal.SIGKILL))
    failures = launch([long, good], tmp_path, workers=1)
    assert list(failures) == [run_name(long)]
    assert "was killed" in failures[run_name(long)]
    assert read_result(run_directory(good, tmp_path)) is not None


def test_local_launcher_worker_asked_to_stop_is_replaced(tmp_path):
    (config,) = sweeps.expand(toy_experiment.CONFIG, [{"train_steps": 5000}])
    directory = during_training(
        config, tmp_path, lambda: send_to_workers(signal.SIGTERM)
    )
    assert launch([config], tmp_path, workers=1) == {}
    assert read_result(str(directory)).step == 5000


def test_local_launcher_waits_for_runs_of_other_processes(tmp_path):
    (config,) = sweeps.expand(toy_experiment.CONFIG, [{}])
    directory = run_directory(config, tmp_path)
    os.makedirs(directory)
    released = threading.Event()

    def hold():
        with lock_directory(directory, "run"):
            released.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    threading.Timer(8, released.set).start()
    assert launch([config], tmp_path, workers=1) == {}
    assert released.is_set()
    assert read_result(directory) is not None
    thread.join()


def test_local_launcher_without_runs_starts_no_process(tmp_path):
    assert launch([], tmp_path) == {}


@pytest.mark.parametrize("workers", [0, -1])
def test_local_launcher_without_workers_raises(workers):
    with pytest.raises(UsageError, match=f"workers={workers}"):
        LocalLauncher(workers)


def test_local_launcher_bug_in_a_run_saves_the_others(tmp_path):
    broken, good = sweeps.expand(
        toy_experiment.CONFIG,
        [
            {"task": "tests.support.toy_experiment:Broken"},
            {"train_steps": 1_000_000},
        ],
    )
    with pytest.raises(RuntimeError, match="ZeroDivisionError: a bug"):
        launch([good, broken], tmp_path)
    log = pathlib.Path(run_directory(good, tmp_path), "train.jsonl")
    if log.exists() and log.read_text():
        assert processes.checkpoint_steps(log.parent)[-1] > 0
