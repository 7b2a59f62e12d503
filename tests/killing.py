"""Trainings that are killed at random moments and started again."""

import dataclasses
import pathlib
import shutil
import time

from tests import processes

STEPS = 240
# Of the kills, those while the program still starts.
_WHILE_STARTING = 0.15


@dataclasses.dataclass(frozen=True)
class Job:
    """A training program.

    Attributes:
        name: For people.
        module: As for `python -m`.
        arguments: Those that say what is trained.
        folder: Where in the work directory it writes.
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
        return pathlib.Path(workdir, self.folder)

    def values(self, workdir):
        """The variables of the last step's checkpoint."""
        return processes.checkpoint_values(self.directory(workdir), STEPS)


def jobs():
    """A job for every technique, and one without."""
    studied = {
        "dense": "dense_seed-0",
        "magnitude": "magnitude_sparsity-0.9_seed-0",
        "random": "random_sparsity-0.9_seed-0",
        "variational_dropout": "variational_dropout_penalty-0.6_seed-0",
        "l0": "l0_penalty-3_seed-0",
    }
    return [
        *(
            Job(
                name,
                "models.train",
                (
                    "--config=configs/fashion_mnist.py",
                    f"--run={run}",
                    f"--config.techniques={name}",
                    f"--config.steps={STEPS}",
                ),
            )
            for name, run in studied.items()
        ),
        Job(
            "fixed_mask",
            "tests.training.toy_train",
            ("--techniques=FixedMask", f"--train_steps={STEPS}"),
            folder="FixedMask",
        ),
    ]


def uninterrupted(job, workdir):
    """Trains to the end.

    Returns:
        The values at the end, and how many seconds the training itself took.
    """
    with job.start(workdir) as program:
        program.wait_until(lambda: "step 1/" in program.output)
        begin = time.monotonic()
        code = program.wait()
        seconds = time.monotonic() - begin
        assert code == 0, program.output
    return job.values(workdir), seconds


def killed(job, workdir, *, kills, seconds, generator, on_kill=None):
    """Trains to the end, killed on the way.

    Args:
        job: What to train.
        workdir: Where.
        kills: How often to kill it. A training that ends before is repeated
            from its last checkpoint but one.
        seconds: How long the training takes without.
        generator: A NumPy random generator.
        on_kill: Called with the last saved step, None for none, after a kill.

    Returns:
        The values at the end.
    """
    done = 0
    while done < kills:
        with job.start(workdir) as program:
            if generator.random() < _WHILE_STARTING:
                time.sleep(generator.uniform(0, 4))
            else:
                program.wait_until(
                    lambda p=program: " step" in f" {p.output}" or not p.running
                )
                # Several kills are to fall into one training.
                share = generator.uniform(0, 2 / (kills + 1))
                time.sleep(share * seconds)
            if not program.running:
                assert program.wait() == 0, program.output
                _take_back(job.directory(workdir))
                continue
            program.kill()
            done += 1
            if on_kill is not None:
                steps = processes.checkpoint_steps(job.directory(workdir))
                on_kill(steps[-1] if steps else None)
    with job.start(workdir) as program:
        assert program.wait() == 0, program.output
    return job.values(workdir)


def _take_back(directory):
    """Removes the checkpoints but one, so that there is more to train."""
    for step in processes.checkpoint_steps(directory)[1:]:
        shutil.rmtree(processes.checkpoint_path(directory, step))
