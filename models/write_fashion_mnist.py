r"""Writes Fashion-MNIST as JPEGs in the format of TensorFlow Datasets.

    python -m models.write_fashion_mnist --directory=data

All 60,000 training and 10,000 test images become grey JPEGs of 32 x 32 pixels,
with a black border of 2 pixels, so that the crop for evaluation, the central
7/8, is the whole original. They are found as by
`sos.datasets.fashion_mnist.load_full`. `sos.datasets.imagenet.TfdsImages`
reads them, for example:

    TfdsImages("fashion_mnist_jpeg", directory="data", ...)

A finished data set is kept, so that the command may be repeated. It takes about
half a minute. Exit codes: 0 for success; 1 for an error, whose message says
what to do.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from sos import startup

with startup.quiet():
    import tensorflow as tf

    # The first listing of devices warns about missing GPUs.
    tf.config.list_physical_devices()

import numpy as np
from absl import app, flags

from sos.datasets import fashion_mnist, write_images
from sos.errors import UsageError
from sos.training import main as training_main

NAME = "fashion_mnist_jpeg"
VERSION = "1.0.0"

_BORDER = 2

_DIRECTORY = flags.DEFINE_string(
    "directory",
    None,
    "Data directory, required. The files are written to "
    "fashion_mnist_jpeg/1.0.0 in it.",
)
_SHARDS = flags.DEFINE_integer(
    "shards", 16, "Number of files of each split.", lower_bound=1
)
_QUALITY = flags.DEFINE_integer(
    "quality", 95, "Quality of the JPEGs.", lower_bound=1, upper_bound=100
)


def main(argv: Sequence[str]) -> None:
    """Writes the data set.

    Args:
        argv: Arguments that are not flags.
    """
    training_main.end_process(
        training_main.exit_code_of(lambda: _run(argv[1:]))
    )


def _run(arguments: Sequence[str]) -> None:
    if arguments:
        raise UsageError(
            f"The program takes only flags. Received: {' '.join(arguments)}"
        )
    if not _DIRECTORY.value:
        raise UsageError(
            "--directory must be a directory, such as --directory=data. "
            f"Received: --directory={_DIRECTORY.value or ''}"
        )
    description = (
        "Fashion-MNIST (Xiao, Rasul and Vollgraf 2017, MIT licence) as grey "
        f"JPEGs of quality {_QUALITY.value}, with a border of {_BORDER} pixels."
    )
    target = Path(_DIRECTORY.value).expanduser() / NAME / VERSION
    if target.exists():
        if _written(target) != (description, _SHARDS.value):
            raise UsageError(
                f"{target} was written with other flags than "
                f"--quality={_QUALITY.value} --shards={_SHARDS.value}. Remove "
                "it, or choose another directory."
            )
        print(f"{target} is complete already.")
        return
    try:
        data = fashion_mnist.load_full()
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(str(error)) from error
    print(f"Writing {target}", file=sys.stderr, flush=True)
    write_images(
        _DIRECTORY.value,
        {
            "train": zip(_pixels(data.x_train), data.y_train, strict=True),
            "test": zip(_pixels(data.x_test), data.y_test, strict=True),
        },
        name=NAME,
        version=VERSION,
        class_names=data.class_names,
        shards=_SHARDS.value,
        quality=_QUALITY.value,
        channels=1,
        description=description,
    )
    print(f"Wrote {target}")


def _written(target: Path) -> tuple[str, int]:
    """Returns the description and the number of files of a written data set."""
    try:
        info = json.loads((target / "dataset_info.json").read_text())
        split = info["splits"][0]
        return info["description"], len(split["shardLengths"])
    except (OSError, ValueError, LookupError) as error:
        raise UsageError(
            f"{target} is not a data set of this program. Remove it, or choose "
            f"another directory. Cause: {type(error).__name__}: {error}"
        ) from error


def _pixels(images: np.ndarray) -> np.ndarray:
    """Converts float32 in [0, 1] back to uint8, and adds the border."""
    pixels = np.rint(images * 255).astype(np.uint8)
    return np.pad(
        pixels, ((0, 0), (_BORDER, _BORDER), (_BORDER, _BORDER), (0, 0))
    )


if __name__ == "__main__":
    app.run(main)
