"""Reads the finished runs that a command is given."""

import os
from typing import TYPE_CHECKING

import tensorflow as tf

from sos.errors import UsageError

if TYPE_CHECKING:
    from sos.experiments.results import FinishedRun


def finished_runs(*workdirs: str) -> "list[FinishedRun]":
    """Returns the finished runs in work directories.

    Args:
        *workdirs: The directories; may be `gs://` paths.

    Raises:
        UsageError: If one is not a directory, or there are no finished runs.
        StorageError: If a run cannot be read.
    """
    from sos.experiments import collect

    for path in workdirs:
        if not tf.io.gfile.isdir(os.path.expanduser(path)):
            raise UsageError(
                "DIR must be the work directory of a study, which has a "
                f"directory for each run. There is no directory {path}"
            )
    runs = collect(workdirs)
    if not runs:
        raise UsageError(
            "DIR must be the work directory of a study, which has a directory "
            "for each run. There are no finished runs in "
            f"{', '.join(workdirs)}"
        )
    return runs
