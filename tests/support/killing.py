"""Trainings that are killed at random moments and started again."""

import dataclasses
import pathlib
import re
import shutil
import time

from tests.support import processes

STEPS = 240


@dataclasses.dataclass(frozen=True)
class Job:
    """A training program.

    Attributes:
        name: For people.
        module: As for `python -m`.
        arguments: Those that say what is trained.
        folder: Where in the work directory it writes; empty for the only run
            that is there.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    folder: str = ""

    def start(self, workdir, **options):
        """Starts it, or goes on."""
        return processes.Program(
            self.module,
            *self.arguments,
            f"--workdir={workdir}",
            "--deterministic",
            "--mode=train",
            "--strategy=one_device",
            "--save_checkpoints_steps=12",
            "--keep_checkpoint_max=3",
            "--steps_per_loop=7",
            log=pathlib.Path(workdir, "output.txt"),
            **options,
        )

    def directory(self, workdir):
        """Where the program writes: there may be nothing yet."""
        if self.folder:
            return pathlib.Path(workdir, self.folder)
        runs = [path.parent for path in workdir.glob("*/config.json")]
        return runs[0] if runs else pathlib.Path(workdir, "no run yet")

    def values(self, workdir):
        """The variables of the last step's checkpoint."""
        return processes.checkpoint_values(self.directory(workdir), STEPS)


def jobs():
    """A job for every technique, and one without."""
    studied = {
        "dense": "",
        "magnitude": ",sparsity=0.9",
        "random": ",sparsity=0.9",
        "variational_dropout": ",penalty_weight=1e-4",
        "l0": ",penalty_weight=5e-4",
    }
    return [
        *(
            Job(
                name,
                "models.train",
                (
                    f"--config=configs/fashion_mnist.py:{name}{values},"
                    f"train_steps={STEPS}",
                ),
            )
            for name, values in studied.items()
        ),
        Job(
            "fixed_mask",
            "tests.support.toy_train",
            ("--techniques=FixedMask", f"--train_steps={STEPS}"),
            folder="FixedMask",
        ),
    ]


@dataclasses.dataclass(frozen=True)
class Kill:
    """A kill of a training.

    Attributes:
        moment: "starting", "training" or "saving", as was aimed at.
        saved: The step of the newest checkpoint then, None if there was none.
        unfinished: Whether a checkpoint that was being written was left.
    """

    moment: str
    saved: int | None
    unfinished: bool


def uninterrupted(job, workdir):
    """Trains to the end.

    Returns:
        The values at the end, and how many seconds it took until the first
        step was done.
    """
    begin = time.monotonic()
    with job.start(workdir) as program:
        program.wait_until(lambda: printed_step(program))
        seconds = time.monotonic() - begin
        assert program.wait() == 0, program.output
    return job.values(workdir), seconds


def killed(
    job, workdir, *, moments, start_seconds, generator, on_kill=lambda kill: 0
):
    """Trains to the end, killed on the way.

    Args:
        job: What to train.
        workdir: Where.
        moments: For each kill when it is to fall: while the program starts,
            trains, or writes a checkpoint.
        start_seconds: How long it takes to start.
        generator: A NumPy random generator, of the rest.
        on_kill: Called with each `Kill`.

    Returns:
        The values at the end.
    """
    waiting = list(moments)
    while waiting:
        with job.start(workdir) as program:
            if waiting[0] == "starting":
                seconds = generator.uniform(0, start_seconds)
            else:
                # So far that all kills fall into one training, about.
                steps = generator.integers(1, 2 * STEPS // (len(moments) + 1))
                begun = _wait_for_steps(program, steps)
                seconds = generator.uniform(0, 0.05)
                if begun and waiting[0] == "saving":
                    begun = _wait_for_save(program, job, workdir)
                    seconds = generator.uniform(0, 0.01)
            time.sleep(seconds)
            if not program.running:
                # It was too late.
                assert program.wait() == 0, program.output
                _take_back(job.directory(workdir))
                continue
            program.kill()
        directory = job.directory(workdir)
        saved = processes.checkpoint_steps(directory)
        on_kill(
            Kill(
                moment=waiting.pop(0),
                saved=saved[-1] if saved else None,
                unfinished=bool(_unfinished(directory)),
            )
        )
    with job.start(workdir) as program:
        assert program.wait() == 0, program.output
    directory = job.directory(workdir)
    # Of an earlier save nothing may be left.
    assert not _unfinished(directory)
    steps = [record["step"] for record in processes.records(directory)]
    assert steps == sorted(set(steps)), steps
    assert steps[-1] == STEPS
    return job.values(workdir)


def printed_step(program):
    """The last step that a program has printed, 0 before the first."""
    steps = re.findall(r"^step ([\d,]+)/", program.output, re.MULTILINE)
    return int(steps[-1].replace(",", "")) if steps else 0


def _wait_for_steps(program, steps):
    """Waits until so many steps are made; False if the program ended before."""
    first = 0
    while program.running:
        step = printed_step(program)
        first = first or step
        if first and step >= min(first + steps, STEPS - 1):
            return True
        time.sleep(0.002)
    return False


def _wait_for_save(program, job, workdir):
    """Waits until a checkpoint is being written."""
    while program.running:
        if _unfinished(job.directory(workdir)):
            return True
        time.sleep(0.0005)
    return False


def _unfinished(directory):
    return list((directory / "checkpoints").glob(".writing-*"))


def _take_back(directory):
    """Removes the checkpoints but one, so that there is more to train."""
    (directory / "result.json").unlink(missing_ok=True)
    for step in processes.checkpoint_steps(directory)[1:]:
        shutil.rmtree(processes.checkpoint_path(directory, step))
