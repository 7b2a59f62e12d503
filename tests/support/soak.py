"""Kills trainings of every technique and compares the weights in the end.

    python -m tests.support.soak [--kills=50] [--seed=0] [--workdir=DIRECTORY]

or `make soak`. Each technique is trained once without interruption, then killed
with SIGKILL at random moments (while it starts, trains, or writes a checkpoint)
and started again until it is done. The variables of the last checkpoint must be
the same, bit for bit. Takes about twenty minutes on two cores.
"""

import argparse
import collections
import os
import pathlib
import sys
import tempfile
import time

import numpy as np
import rich.console
import rich.progress

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from sos import startup

with startup.quiet():
    import tensorflow as tf

    from tests.support import killing, processes

    tf.config.list_physical_devices()

# How the kills are shared out. Most of the time goes into starting, and most
# of what could go wrong into saving.
MOMENTS = {"starting": 0.2, "training": 0.4, "saving": 0.4}


def soak(workdir, kills, seed, console):
    """Kills trainings.

    Returns:
        The `Kill`s, and the names of the techniques whose weights differ.
    """
    generator = np.random.default_rng(seed)
    jobs = killing.jobs()
    share = [len(part) for part in np.array_split(range(kills), len(jobs))]
    done, different = [], []
    with rich.progress.Progress(console=console) as progress:
        task = progress.add_task("kills", total=kills)

        def count(kill):
            done.append(kill)
            progress.advance(task)

        for job, number in zip(jobs, share, strict=True):
            progress.update(task, description=job.name)
            expected, seconds = killing.uninterrupted(
                job, workdir / job.name / "uninterrupted"
            )
            found = killing.killed(
                job,
                workdir / job.name / "killed",
                moments=generator.choice(
                    list(MOMENTS), number, p=list(MOMENTS.values())
                ),
                start_seconds=seconds,
                generator=generator,
                on_kill=count,
            )
            wrong = processes.differences(expected, found)
            saved = [k.saved for k in done[len(done) - number :]]
            console.print(
                f"{job.name}: {number} kills, the last checkpoints "
                f"{saved}: "
                + (f"DIFFERENT: {wrong}" if wrong else "the same bits"),
                soft_wrap=True,
            )
            if wrong:
                different.append(job.name)
    return done, different


def main():
    """Soaks, and exits with 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--workdir", type=pathlib.Path, help="by default a temporary one"
    )
    options = parser.parse_args()
    if options.kills < 1:
        parser.error(f"--kills must be at least 1. Received: {options.kills}")
    if options.workdir and any(options.workdir.glob("*")):
        parser.error(
            "--workdir must be empty, or not there yet. "
            f"Received: {options.workdir}"
        )
    console = rich.console.Console(highlight=False)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        workdir = options.workdir or pathlib.Path(temporary)
        kills, different = soak(workdir, options.kills, options.seed, console)
    minutes = (time.monotonic() - begin) / 60
    verdict = (
        f"weights differ: {', '.join(different)}"
        if different
        else "all weights bit-identical to those of uninterrupted runs"
    )
    moments = collections.Counter(kill.moment for kill in kills)
    unfinished = sum(kill.unfinished for kill in kills)
    console.print(
        f"{len(kills)} kills over {len(killing.jobs())} techniques "
        f"({moments['starting']} while starting, {moments['training']} while "
        f"training, {moments['saving']} while saving; {unfinished} left an "
        f"unfinished checkpoint) in {minutes:.1f} minutes: {verdict}.",
        soft_wrap=True,
    )
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
