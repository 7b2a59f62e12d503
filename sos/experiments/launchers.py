"""Launchers, which train the runs of a sweep.

`LocalLauncher` trains them on this machine. On two cores, worker processes of
one thread each, which share compiled steps among their runs, are faster than
one process (`python -m benchmarks.launchers`).
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
from sos.experiments import runs as runs_lib
from sos.experiments.config import first_step, parent_name, resolve, run_name
from sos.experiments.machine import cores
from sos.experiments.progress import SweepProgress
from sos.experiments.runs import Result, last_step, run_directory
from sos.experiments.task import make_task
from sos.files import lock_directory
from sos.training.signals import StopRequest, StopSource
from sos.training.strategies import make_strategy
from sos.training.trainer import Trainer

# Seconds between two checks of a signal.
_POLL = 0.2
# Seconds between two attempts at a run that another process trains.
_RETRY = 2.0


class Launcher(Protocol):
    """Protocol of objects that train the runs of a sweep."""

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

        A run is trained when its parent is finished. If the parent fails, so
        does the run.

        Args:
            configs: Resolved configs, each after its parent if that is one of
                them. Other parents are finished.
            workdir: Directory of the runs.
            progress: Shows steps and results.
            stop: Requests a stop; runs in progress are saved.
            **options: As for `sos.experiments.run`.

        Returns:
            Error messages of the failed runs, by name.

        Raises:
            RuntimeError: If a run raised an exception other than a
                `ReportedError`. The message is its traceback.
            Stopped: If `stop` requested it.
        """


class LocalLauncher:
    """Trains runs in worker processes on this machine.

    A worker builds and traces what its runs share once, so runs of one compile
    signature preferably go to the same worker.

    Workers import the program's main module, so start a sweep under
    `if __name__ == "__main__":`.

    Args:
        workers: Number of processes. Default: one for each GPU or, without a
            GPU, for each core, at most eight.

    Raises:
        UsageError: If `workers` is below 1.
    """

    def __init__(self, workers: int | None = None) -> None:
        if workers is not None and workers < 1:
            raise UsageError(
                f"`workers` must be at least 1. Received: workers={workers}"
            )
        gpus = len(tf.config.list_physical_devices("GPU"))
        self.workers = workers or gpus or min(cores(), 8)
        # All workers together use all cores.
        self._threads = max(1, cores() // self.workers)

    def launch(
        self,
        configs: Sequence[ml_collections.ConfigDict],
        workdir: str | os.PathLike,
        *,
        progress: SweepProgress,
        stop: StopSource | None = None,
        **options: Any,
    ) -> dict[str, str]:
        """Trains runs; see `Launcher.launch`."""
        runs = [
            _Run(config, make_task(config).compile_signature())
            for config in configs
        ]
        pool = _Pool(runs, os.fspath(workdir), progress, options)
        try:
            for index in range(min(self.workers, len(runs))):
                pool.start(index, self._threads)
            while pool.busy:
                if stop is not None and stop.requested:
                    pool.stop(stop.requested)
                pool.step()
            return pool.failures
        finally:
            pool.close()


class TrainerCache:
    """Makes trainers; reuses the last one if the compile signature is equal.

    An instance is the argument `make_trainer` of `sos.experiments.run`.
    """

    def __init__(self) -> None:
        self._signature: str | None = None
        self._trainer: Trainer | None = None

    def __call__(self, config: ml_collections.ConfigDict) -> Trainer:
        """Returns a trainer in its initial state.

        Args:
            config: Resolved config.
        """
        strategy = make_strategy("one_device")
        with strategy.scope():
            task = make_task(config)
        signature = task.compile_signature()
        if signature == self._signature:
            self._trainer.reset(task)
        else:
            # Frees the memory of the old trainer first.
            self._trainer = self._signature = None
            self._trainer = Trainer(
                task,
                strategy=strategy,
                gradient_accumulation_steps=config.gradient_accumulation_steps,
            )
            self._signature = signature
        return self._trainer


@dataclasses.dataclass
class _Run:
    """A run and its compile signature."""

    config: ml_collections.ConfigDict
    signature: str

    @property
    def name(self) -> str:
        return run_name(self.config)

    @property
    def parent(self) -> str | None:
        return parent_name(self.config)


@dataclasses.dataclass
class _Worker:
    """A worker process, from the parent's view."""

    process: multiprocessing.Process
    pipe: connection.Connection
    threads: int
    run: _Run | None = None
    signature: str | None = None


class _Pool:
    """Sends runs to workers and receives their results."""

    def __init__(
        self,
        runs: Sequence[_Run],
        workdir: str,
        progress: SweepProgress,
        options: dict[str, Any],
    ) -> None:
        self.failures: dict[str, str] = {}
        self._pending: list[_Run] = []
        # By the name of their parent, runs that cannot begin before it is
        # finished.
        self._blocked: dict[str, list[_Run]] = {}
        names = {run.name for run in runs}
        for run in runs:
            if run.parent in names:
                self._blocked.setdefault(run.parent, []).append(run)
            else:
                self._pending.append(run)
        # Runs that another process trains, and when to try them again.
        self._runs_in_use: list[_Run] = []
        self._retry_at = 0.0
        self._workdir = workdir
        self._progress = progress
        self._options = options
        self._workers: dict[int, _Worker] = {}
        self._stopping = False
        # Names of runs that were stopped and saved, and have not resumed.
        self._stopped: set[str] = set()
        self._finished: set[str] = set()

    @property
    def busy(self) -> bool:
        """Whether runs are left."""
        # A blocked run has a parent among the others.
        running = any(worker.run for worker in self._workers.values())
        return bool(running or self._pending or self._runs_in_use)

    def start(self, index: int, threads: int) -> None:
        """Starts a worker process."""
        context = multiprocessing.get_context("spawn")
        pipe, child_pipe = context.Pipe()
        process = context.Process(
            target=_work, args=(child_pipe, index, threads), daemon=True
        )
        # Started here, because its start unblocks signals.
        resource_tracker.ensure_running()
        # The terminal sends Ctrl-C to all processes, but this one stops the
        # workers. They inherit the mask; here the signal waits.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        child_pipe.close()
        self._workers[index] = _Worker(process, pipe, threads)

    def step(self) -> None:
        """Sends out runs and waits briefly for messages."""
        if self._runs_in_use and time.monotonic() > self._retry_at:
            self._pending += self._runs_in_use
            self._runs_in_use = []
        for worker in self._workers.values():
            if worker.run is None and self._pending:
                self._assign(worker)
        self._receive()

    def stop(self, signum: signal.Signals) -> None:
        """Stops all workers after they have saved.

        Args:
            signum: The signal that requested it.

        Raises:
            Stopped: Always.
        """
        running = {w.run.name for w in self._workers.values() if w.run}
        # A signal to all processes may have stopped workers already.
        running |= self._stopped
        self._stop_workers()
        unfinished = running - self._finished
        if running and not unfinished:
            message = "the runs in progress finished"
        else:
            message = (
                f"{len(self._stopped)} of {len(unfinished)} runs in progress "
                "saved"
            )
        raise Stopped(signum, None, message)

    def _stop_workers(self) -> None:
        """Lets all workers save their runs and end."""
        self._stopping = True
        for worker in self._workers.values():
            worker.process.terminate()
        # A worker whose pipe is full could not end unless it is read.
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
        other_signatures = {
            other.signature
            for other in self._workers.values()
            if other is not worker
        }
        # First a signature that this worker traced, then one that no worker
        # traced.
        run = min(
            self._pending,
            key=lambda run: (
                run.signature != worker.signature,
                run.signature in other_signatures,
            ),
        )
        self._pending.remove(run)
        worker.run, worker.signature = run, run.signature
        directory = run_directory(run.config, self._workdir)
        step = last_step(directory) or first_step(run.config)
        self._progress.begin(run.name, step)
        # If the worker has ended, `_receive` meets the end of its pipe.
        with contextlib.suppress(OSError):
            worker.pipe.send(
                (run.config.to_dict(), self._workdir, self._options)
            )

    def _receive(self) -> None:
        """Waits briefly for messages of workers and handles them."""
        pipes = {worker.pipe: index for index, worker in self._workers.items()}
        for pipe in connection.wait(list(pipes), timeout=_POLL):
            index = pipes[pipe]
            try:
                kind, content = pipe.recv()
            # An OSError if it ended within a message.
            except (EOFError, OSError):
                self._replace(index)
            else:
                self._handle(index, kind, content)

    def _handle(self, index: int, kind: str, content: Any) -> None:
        worker = self._workers[index]
        run = worker.run
        if kind == "summary":
            self._stopped.discard(run.name)
            self._progress.update(run.name, content)
            return
        worker.run = None
        if kind == "finished":
            self._stopped.discard(run.name)
            self._finished.add(run.name)
            self._pending += self._blocked.pop(run.name, [])
            self._progress.finish(run.name, content)
        elif kind == "in_use":
            self._runs_in_use.append(run)
            self._retry_at = time.monotonic() + _RETRY
            self._progress.wait(run.name)
        elif kind == "stopped":
            self._stopped.add(run.name)
            self._pending.append(run)
        elif kind == "ended":
            # It did not read a run that was sent in the meantime.
            self._pending += [run] if run else []
            self._replace(index)
        elif kind == "failed" or self._stopping:
            self._fail(run, content)
        else:
            # A bug, which other runs are likely to hit: save them and show it.
            self._stop_workers()
            raise RuntimeError(f"The run {run.name} failed:\n{content}")

    def _fail(self, run: _Run, reason: str) -> None:
        self.failures[run.name] = reason
        self._progress.fail(run.name, reason)
        for branch in self._blocked.pop(run.name, []):
            self._fail(branch, f"its parent {run.name} failed.")

    def _replace(self, index: int) -> None:
        """Replaces a worker that ended."""
        worker = self._workers.pop(index)
        worker.process.join()
        worker.pipe.close()
        code = worker.process.exitcode
        if worker.run is not None:
            if code == -signal.SIGTERM:
                # It was stopped before it began.
                self._pending.append(worker.run)
            elif code == -signal.SIGKILL:
                self._fail(
                    worker.run,
                    "its process was killed, perhaps because memory ran out. "
                    "Try fewer workers.",
                )
            else:
                self._fail(
                    worker.run, f"its process ended with exit code {code}."
                )
        if not self._stopping:
            self.start(index, worker.threads)


def _work(pipe: connection.Connection, index: int, threads: int) -> None:
    """Trains one run after another; the main function of a worker."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _configure_tensorflow(index, threads)
    trainers = TrainerCache()
    # A signal to the process group arrives twice: the parent forwards it.
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
        # Checks the lock before making a trainer.
        with lock_directory(run_directory(resolve(config), workdir), "run"):
            pass
        result = runs_lib.run(
            config,
            workdir,
            make_trainer=trainers,
            on_summary=[lambda summary: pipe.send(("summary", summary))],
            stop=stop,
            quiet=True,
            **options,
        )
    except DirectoryInUseError:
        return "in_use", None
    except Stopped:
        return "stopped", None
    except ReportedError as error:
        return "failed", str(error)
    except Exception:
        return "bug", traceback.format_exc()
    return "finished", result


def _end_with_parent() -> None:
    """Ends the process when its parent has ended, even if it was killed."""
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _configure_tensorflow(index: int, threads: int) -> None:
    with startup.quiet():
        gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        gpu = gpus[index % len(gpus)]
        tf.config.set_visible_devices(gpu, "GPU")
        # Otherwise the first of several workers takes all memory.
        tf.config.experimental.set_memory_growth(gpu, True)
    else:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
    # Makes runs bit-exact.
    tf.config.experimental.enable_op_determinism()
    # Hides warnings about retracing: workers trace several signatures.
    tf.get_logger().setLevel("ERROR")
