"""Launchers: where the runs of a sweep are trained.

There is one for this machine. Measured on two cores, worker processes of one
thread each, which share compiled steps among their runs, are faster than one
process (`python -m benchmarks.launchers`).
"""

import dataclasses
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any, Protocol

import ml_collections
import tensorflow as tf

from sos import startup
from sos.errors import (
    DirectoryInUseError,
    ReportedError,
    Stopped,
)
from sos.experiments.config import run_name
from sos.experiments.progress import SweepProgress
from sos.experiments.runs import Result, last_step, run, run_directory
from sos.experiments.task import make_task
from sos.training.signals import StopRequest, StopSource
from sos.training.strategies import make_strategy
from sos.training.trainer import Trainer

# Seconds between two looks at a signal, and at runs of other processes.
_POLL = 0.2
_RETRY = 2.0


class Launcher(Protocol):
    """Trains runs somewhere."""

    def launch(
        self,
        configs: Sequence[ml_collections.ConfigDict],
        workdir: Path,
        *,
        progress: SweepProgress,
        stop: StopSource | None = None,
        **options: Any,
    ) -> dict[str, str]:
        """Trains runs and returns when all are finished or failed.

        Args:
            configs: Resolved configs.
            workdir: Directory of the runs.
            progress: Hears of steps and results.
            stop: Stops all runs; those in progress are saved.
            **options: As for `sos.experiments.run`.

        Returns:
            By the name of each run that failed, the reason.

        Raises:
            Stopped: If `stop` asked for it.
        """


class LocalLauncher:
    """Trains runs in worker processes on this machine.

    A worker builds and traces once what its runs share, so runs of one compile
    signature go to one worker as long as there are others for the rest.

    Args:
        workers: Number of processes; by default one for each GPU or, without
            one, for each core, but not more than eight.

    Raises:
        ValueError: If `workers` is below 1.
    """

    def __init__(self, workers: int | None = None) -> None:
        if workers is not None and workers < 1:
            raise ValueError(
                f"`workers` must be at least 1. Received: workers={workers}"
            )
        gpus = len(tf.config.list_physical_devices("GPU"))
        cores = len(os.sched_getaffinity(0))
        self.workers = workers or gpus or min(cores, 8)
        # All cores together, where there is no GPU to do the work.
        self._threads = max(1, cores // self.workers)

    def launch(
        self,
        configs: Sequence[ml_collections.ConfigDict],
        workdir: Path,
        *,
        progress: SweepProgress,
        stop: StopSource | None = None,
        **options: Any,
    ) -> dict[str, str]:
        """Trains runs: see `Launcher.launch`."""
        jobs = [
            _Job(config, make_task(config).compile_signature())
            for config in configs
        ]
        pool = _Pool(jobs, os.fspath(workdir), progress, options)
        try:
            for index in range(min(self.workers, len(jobs))):
                pool.start(index, self._threads)
            while pool.busy:
                pool.step()
                if stop is not None and stop.requested:
                    pool.stop(stop.requested)
            return pool.failures
        finally:
            pool.close()


class TrainerCache:
    """Makes trainers, and uses the last one again where it can.

    Call it with a resolved config, as `make_trainer` of `sos.experiments.run`.
    """

    def __init__(self) -> None:
        self._signature: str | None = None
        self._trainer: Trainer | None = None

    def __call__(self, config: ml_collections.ConfigDict) -> Trainer:
        """Returns a trainer whose state is that of a new one."""
        strategy = make_strategy("one_device")
        with strategy.scope():
            task = make_task(config)
        signature = task.compile_signature()
        if signature == self._signature:
            self._trainer.reset(task)
        else:
            # Before the new one is made, for its memory.
            self._trainer = self._signature = None
            self._trainer = Trainer(
                task,
                strategy=strategy,
                gradient_accumulation_steps=config.gradient_accumulation_steps,
            )
            self._signature = signature
        return self._trainer


@dataclasses.dataclass
class _Job:
    """A run, and what it shares with others."""

    config: ml_collections.ConfigDict
    signature: str

    @property
    def name(self) -> str:
        return run_name(self.config)


@dataclasses.dataclass
class _Worker:
    """A worker process as its parent sees it."""

    process: multiprocessing.Process
    pipe: connection.Connection
    threads: int
    job: _Job | None = None
    signature: str | None = None


class _Pool:
    """Hands jobs to workers and hears of them."""

    def __init__(
        self,
        jobs: Sequence[_Job],
        workdir: str,
        progress: SweepProgress,
        options: dict[str, Any],
    ) -> None:
        self.failures: dict[str, str] = {}
        self._pending = list(jobs)
        # Runs that another program trains, and when to look again.
        self._elsewhere: list[_Job] = []
        self._retry_at = 0.0
        self._workdir = workdir
        self._progress = progress
        self._options = options
        self._workers: dict[int, _Worker] = {}

    @property
    def busy(self) -> bool:
        """Whether there is anything left to do."""
        running = any(worker.job for worker in self._workers.values())
        return bool(running or self._pending or self._elsewhere)

    def start(self, index: int, threads: int) -> None:
        """Starts a worker process."""
        context = multiprocessing.get_context("spawn")
        pipe, theirs = context.Pipe()
        process = context.Process(
            target=_work, args=(theirs, index, threads), daemon=True
        )
        # The terminal sends Ctrl-C to all processes; this one tells the others.
        handler = None
        if threading.current_thread() is threading.main_thread():
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            process.start()
        finally:
            if handler is not None:
                signal.signal(signal.SIGINT, handler)
        theirs.close()
        self._workers[index] = _Worker(process, pipe, threads)

    def step(self) -> None:
        """Hands out jobs, and waits a moment for news."""
        if self._elsewhere and time.monotonic() > self._retry_at:
            self._pending += self._elsewhere
            self._elsewhere = []
        for worker in self._workers.values():
            if worker.job is None and self._pending:
                self._assign(worker)
        pipes = {worker.pipe: index for index, worker in self._workers.items()}
        for pipe in connection.wait(list(pipes), timeout=_POLL):
            self._hear(pipes[pipe])

    def stop(self, signum: signal.Signals) -> None:
        """Stops all workers once they have saved.

        Raises:
            Stopped: Always.
        """
        running = [w for w in self._workers.values() if w.job]
        for worker in running:
            worker.process.terminate()
        for worker in running:
            worker.process.join()
        raise Stopped(
            signum,
            0,
            f"with {len(running)} runs in progress, which are saved",
        )

    def close(self) -> None:
        """Ends all workers."""
        for worker in self._workers.values():
            worker.process.kill()
            worker.process.join()
            worker.pipe.close()

    def _assign(self, worker: _Worker) -> None:
        taken = {
            other.signature
            for other in self._workers.values()
            if other is not worker
        }
        # What is traced already, then what nobody traced, then the rest.
        job = min(
            self._pending,
            key=lambda job: (
                job.signature != worker.signature,
                job.signature in taken,
            ),
        )
        self._pending.remove(job)
        worker.job, worker.signature = job, job.signature
        self._progress.begin(job.name, last_step(self._directory(job)))
        worker.pipe.send((job.config.to_dict(), self._workdir, self._options))

    def _directory(self, job: _Job) -> str:
        return run_directory(job.config, self._workdir)

    def _hear(self, index: int) -> None:
        worker = self._workers[index]
        job = worker.job
        try:
            kind, content = worker.pipe.recv()
        except (EOFError, ConnectionResetError):
            self._replace(index)
            return
        if kind == "summary":
            self._progress.update(job.name, content)
            return
        worker.job = None
        if kind == "finished":
            self._progress.finish(job.name, content)
        elif kind == "elsewhere":
            self._elsewhere.append(job)
            self._retry_at = time.monotonic() + _RETRY
            self._progress.wait(job.name)
        elif kind == "failed":
            self.failures[job.name] = content
            self._progress.fail(job.name, content)
        else:
            raise RuntimeError(f"The run {job.name} failed:\n{content}")

    def _replace(self, index: int) -> None:
        """Starts another worker in place of one that ended by itself."""
        worker = self._workers[index]
        worker.process.join()
        worker.pipe.close()
        reason = (
            f"its process ended with the code {worker.process.exitcode}; it "
            "may have been out of memory"
        )
        if worker.job is not None:
            self.failures[worker.job.name] = reason
            self._progress.fail(worker.job.name, reason)
        self.start(index, worker.threads)


def _work(pipe: connection.Connection, index: int, threads: int) -> None:
    """Trains one run after another, in a process of its own."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _configure_tensorflow(index, threads)
    trainers = TrainerCache()
    with StopRequest(announce=False) as stop:
        while not stop.requested:
            if not pipe.poll(_POLL):
                continue
            pipe.send(_train(*pipe.recv(), trainers, pipe, stop))


def _train(
    config: dict[str, Any],
    workdir: str,
    options: dict[str, Any],
    trainers: TrainerCache,
    pipe: connection.Connection,
    stop: StopSource,
) -> tuple[str, Result | str | None]:
    """Trains a run and returns what becomes of it, for the parent."""
    try:
        result = run(
            config,
            workdir,
            make_trainer=trainers,
            on_summary=[lambda summary: pipe.send(("summary", summary))],
            stop=stop,
            quiet=True,
            **options,
        )
    except DirectoryInUseError:
        return "elsewhere", None
    except (ReportedError, Stopped) as error:
        return "failed", str(error)
    except Exception:
        return "bug", traceback.format_exc()
    return "finished", result


def _end_with_parent() -> None:
    """Ends the process when its parent is gone, however that ended."""
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _configure_tensorflow(index: int, threads: int) -> None:
    with startup.quiet():
        gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        tf.config.set_visible_devices(gpus[index % len(gpus)], "GPU")
    else:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
    # The same run gives the same bits.
    tf.config.experimental.enable_op_determinism()
    # This graph rewriter fails on noise between a bias and its activation, with
    # an error message and no other effect.
    tf.config.optimizer.set_experimental_options({"remapping": False})
    # Several kinds of runs are traced, of which TensorFlow warns.
    tf.get_logger().setLevel("ERROR")
