"""Launchers: where the runs of a sweep are trained.

There is one for this machine. Measured on two cores, worker processes of one
thread each, which share compiled steps among their runs, are faster than one
process (`python -m benchmarks.launchers`).
"""

import contextlib
import dataclasses
import math
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Sequence
from multiprocessing import connection, resource_tracker
from typing import Any, Protocol

import ml_collections
import tensorflow as tf

from sos import startup
from sos.errors import (
    DirectoryInUseError,
    ReportedError,
    Stopped,
    UsageError,
)
from sos.experiments.config import resolve, run_name
from sos.experiments.progress import SweepProgress
from sos.experiments.runs import Result, last_step, run, run_directory
from sos.experiments.task import make_task
from sos.files import lock_directory
from sos.training.signals import StopRequest, StopSource
from sos.training.strategies import make_strategy
from sos.training.trainer import Trainer

# Seconds between two looks at a signal.
_POLL = 0.2
# Seconds between two attempts at a run that another program trains.
_RETRY = 2.0


class Launcher(Protocol):
    """Trains runs somewhere."""

    def launch(
        self,
        configs: Sequence[ml_collections.ConfigDict],
        workdir: str | os.PathLike,
        *,
        progress: SweepProgress,
        stop: StopSource | None = None,
        **options: Any,
    ) -> dict[str, str]:
        """Trains runs and returns when all are finished or failed.

        Args:
            configs: Resolved configs.
            workdir: Directory of the runs.
            progress: Shows steps and results.
            stop: Stops all runs; those in progress are saved.
            **options: As for `sos.experiments.run`.

        Returns:
            By the name of each run that failed, the reason.

        Raises:
            RuntimeError: If a run raised an exception that is not a
                `ReportedError`; its traceback is the message.
            Stopped: If `stop` asked for it.
        """


class LocalLauncher:
    """Trains runs in worker processes on this machine.

    A worker builds and traces once what its runs share, so runs of one compile
    signature go to one worker as long as there are others for the rest.

    Workers import the program's main module again, so start a sweep under
    `if __name__ == "__main__":`.

    Args:
        workers: Number of processes; by default one for each GPU or, without
            one, for each core, but not more than eight.

    Raises:
        UsageError: If `workers` is below 1.
    """

    def __init__(self, workers: int | None = None) -> None:
        if workers is not None and workers < 1:
            raise UsageError(
                f"`workers` must be at least 1. Received: workers={workers}"
            )
        gpus = len(tf.config.list_physical_devices("GPU"))
        # Not on every system.
        affinity = getattr(os, "sched_getaffinity", None)
        cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        self.workers = workers or gpus or min(cores, 8)
        # All cores together, where there is no GPU to do the work.
        self._threads = max(1, cores // self.workers)

    def launch(
        self,
        configs: Sequence[ml_collections.ConfigDict],
        workdir: str | os.PathLike,
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
                if stop is not None and stop.requested:
                    pool.stop(stop.requested)
                pool.step()
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
    """Hands jobs to workers and receives their results."""

    def __init__(
        self,
        jobs: Sequence[_Job],
        workdir: str,
        progress: SweepProgress,
        options: dict[str, Any],
    ) -> None:
        self.failures: dict[str, str] = {}
        self._pending = list(jobs)
        # Runs that another program trains, and when to try again.
        self._elsewhere: list[_Job] = []
        self._retry_at = 0.0
        self._workdir = workdir
        self._progress = progress
        self._options = options
        self._workers: dict[int, _Worker] = {}
        self._stopping = False
        # Names of runs that were stopped and saved, and have not gone on.
        self._stopped: set[str] = set()

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
        # It unblocks signals when it is started.
        resource_tracker.ensure_running()
        # The terminal sends Ctrl-C to all processes; this one stops the others.
        # They inherit the mask, and here the signal waits.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()
        self._workers[index] = _Worker(process, pipe, threads)

    def step(self) -> None:
        """Hands out jobs, and waits a moment for messages."""
        if self._elsewhere and time.monotonic() > self._retry_at:
            self._pending += self._elsewhere
            self._elsewhere = []
        for worker in self._workers.values():
            if worker.job is None and self._pending:
                self._assign(worker)
        self._receive()

    def stop(self, signum: signal.Signals) -> None:
        """Stops all workers once they have saved.

        Raises:
            Stopped: Always.
        """
        running = {w.job.name for w in self._workers.values() if w.job}
        # One signal for all processes may have stopped workers already.
        running |= self._stopped
        self._stop_workers()
        raise Stopped(
            signum,
            None,
            f"{len(self._stopped)} of {len(running)} runs in progress saved",
        )

    def _stop_workers(self) -> None:
        """Lets all workers save their runs and end."""
        self._stopping = True
        for worker in self._workers.values():
            worker.process.terminate()
        # A worker whose pipe is full could not end if nobody read it.
        while self._workers:
            self._receive()

    def close(self) -> None:
        """Ends all workers."""
        for worker in self._workers.values():
            worker.process.kill()
        for worker in self._workers.values():
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
        directory = run_directory(job.config, self._workdir)
        self._progress.begin(job.name, last_step(directory))
        # If the worker has ended, the end of its pipe is what comes next.
        with contextlib.suppress(OSError):
            worker.pipe.send(
                (job.config.to_dict(), self._workdir, self._options)
            )

    def _receive(self) -> None:
        """Waits a moment for messages of workers, and handles them."""
        pipes = {worker.pipe: index for index, worker in self._workers.items()}
        for pipe in connection.wait(list(pipes), timeout=_POLL):
            index = pipes[pipe]
            try:
                kind, content = pipe.recv()
            # The latter where it ended within a message.
            except (EOFError, OSError):
                self._replace(index)
            else:
                self._handle(index, kind, content)

    def _handle(self, index: int, kind: str, content: Any) -> None:
        worker = self._workers[index]
        job = worker.job
        if kind == "summary":
            self._stopped.discard(job.name)
            self._progress.update(job.name, content)
            return
        worker.job = None
        if kind == "finished":
            self._stopped.discard(job.name)
            self._progress.finish(job.name, content)
        elif kind == "elsewhere":
            self._elsewhere.append(job)
            self._retry_at = time.monotonic() + _RETRY
            self._progress.wait(job.name)
        elif kind == "stopped":
            self._stopped.add(job.name)
            self._pending.append(job)
        elif kind == "ended":
            # It has not read a job that was sent meanwhile.
            self._pending += [job] if job else []
            self._replace(index)
        elif kind == "failed" or self._stopping:
            self._fail(job, content)
        else:
            # A bug, which other runs are likely to meet: show it at once, but
            # lose nothing of them.
            self._stop_workers()
            raise RuntimeError(f"The run {job.name} failed:\n{content}")

    def _fail(self, job: _Job, reason: str) -> None:
        self.failures[job.name] = reason
        self._progress.fail(job.name, reason)

    def _replace(self, index: int) -> None:
        """Starts another worker in place of one that ended."""
        worker = self._workers.pop(index)
        worker.process.join()
        worker.pipe.close()
        code = worker.process.exitcode
        if worker.job is not None:
            if code == -signal.SIGTERM:
                # It was asked to stop before it had begun.
                self._pending.append(worker.job)
            elif code == -signal.SIGKILL:
                self._fail(
                    worker.job,
                    "its process was killed, perhaps for lack of memory. Try "
                    "fewer workers.",
                )
            else:
                self._fail(
                    worker.job, f"its process ended with the code {code}."
                )
        if not self._stopping:
            self.start(index, worker.threads)


def _work(pipe: connection.Connection, index: int, threads: int) -> None:
    """Trains one run after another, in a process of its own."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _configure_tensorflow(index, threads)
    trainers = TrainerCache()
    # A signal to all processes of a group comes twice: the parent passes it on.
    with StopRequest(announce=False, echo_seconds=math.inf) as stop:
        while not stop.requested:
            if pipe.poll(_POLL):
                pipe.send(_train(*pipe.recv(), trainers, pipe, stop))
        pipe.send(("ended", None))


def _train(
    config: dict[str, Any],
    workdir: str,
    options: dict[str, Any],
    trainers: TrainerCache,
    pipe: connection.Connection,
    stop: StopSource,
) -> tuple[str, Result | str | None]:
    """Trains a run; returns a message to the parent."""
    try:
        # Before a trainer is made for nothing.
        with lock_directory(run_directory(resolve(config), workdir), "run"):
            pass
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
    except Stopped:
        return "stopped", None
    except ReportedError as error:
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
        gpu = gpus[index % len(gpus)]
        tf.config.set_visible_devices(gpu, "GPU")
        # Otherwise the first of several workers takes all of its memory.
        tf.config.experimental.set_memory_growth(gpu, True)
    else:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
    # The same run gives the same bits.
    tf.config.experimental.enable_op_determinism()
    # Several kinds of runs are traced, of which TensorFlow warns.
    tf.get_logger().setLevel("ERROR")
