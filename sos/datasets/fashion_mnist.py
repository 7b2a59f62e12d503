"""Fashion-MNIST, a part of it embedded, and the whole where a machine has it.

Embedded are 6,000 training and 4,000 test images: the first ones of each split
of Fashion-MNIST (Xiao, Rasul and Vollgraf 2017, arXiv 1708.07747), which has
60,000 and 10,000. That is enough to compare techniques within minutes on a
laptop and without a network; accuracies are below those of the whole data set.
Copyright 2017 Zalando SE, MIT licence (see
`data/fashion_mnist_10k.NOTICE.txt`).
"""

import dataclasses
import gzip
import importlib
import importlib.resources
import importlib.util
import io
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

_FILE = importlib.resources.files("sos.datasets").joinpath(
    "data", "fashion_mnist_10k.npz"
)
_SHAPES = {
    "x_train": (6000, 28, 28),
    "y_train": (6000,),
    "x_test": (4000, 28, 28),
    "y_test": (4000,),
}

#: Names a directory with the files of the whole data set.
DIRECTORY_VARIABLE = "SOS_FASHION_MNIST_DIR"
#: Where Debian's package `dataset-fashion-mnist` puts them.
DEBIAN_DIRECTORY = Path("/usr/share/datasets/fashion-mnist")
_FULL_FILES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}
_FULL_SHAPES = {
    "x_train": (60000, 28, 28),
    "y_train": (60000,),
    "x_test": (10000, 28, 28),
    "y_test": (10000,),
}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FashionMnist:
    """Images and labels, in the order of the original data set.

    The images have a channel axis, so that they fit convolutions as they are.

    Attributes:
        x_train: Training images, float32 in [0, 1], of shape (n, 28, 28, 1);
            6,000 embedded ones or all 60,000.
        y_train: Training labels, int32 in [0, 10), of shape (n,).
        x_test: Test images, float32 in [0, 1], of shape (m, 28, 28, 1); 4,000
            embedded ones or all 10,000.
        y_test: Test labels, int32 in [0, 10), of shape (m,).
        class_names: The ten names that the labels index.
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    class_names: tuple[str, ...] = CLASS_NAMES


def load() -> FashionMnist:
    """Reads the embedded images and labels.

    Every call returns new arrays, so that changing them is safe.

    Returns:
        The data, images as float32 in [0, 1] and labels as int32.

    Raises:
        FileNotFoundError: If the data file is not part of the installation.
        ValueError: If the data file is damaged.
    """
    try:
        content = _FILE.read_bytes()
    except OSError as error:
        raise FileNotFoundError(
            f"The embedded data set {_FILE.name} cannot be read. It is part "
            "of the package: install `state-of-sparsity` again. "
            f"Received: path={str(_FILE)!r}"
        ) from error
    return _from_arrays(_decode(content))


def load_full(directory: str | os.PathLike | None = None) -> FashionMnist:
    """Reads all 60,000 training and 10,000 test images.

    They are not part of this package. Without a directory they are looked for
    in that of the environment variable `SOS_FASHION_MNIST_DIR` if it is set;
    else where Debian's package `dataset-fashion-mnist` puts them; else among
    the prepared data of tensorflow-datasets, if that is installed, which has
    them in another order. Nothing is downloaded.

    Args:
        directory: Where the four IDX files of the data set are, as published,
            with or without their ending `.gz`.

    Returns:
        The data, images as float32 in [0, 1] and labels as int32.

    Raises:
        FileNotFoundError: If the data set is in none of these places, or not
            in the directory that was named.
        ValueError: If a file is damaged or not of this data set.
    """
    directory = directory or os.environ.get(DIRECTORY_VARIABLE)
    if directory is None or directory == "":
        if not DEBIAN_DIRECTORY.is_dir():
            return _from_arrays(_read_tfds())
        directory = DEBIAN_DIRECTORY
    directory = Path(directory).expanduser()
    return _from_arrays(
        {
            name: _read_idx(_find(directory, file), _FULL_SHAPES[name])
            for name, file in _FULL_FILES.items()
        }
    )


def _find(directory, name):
    """Returns the path of a file that may be compressed."""
    for path in (directory / f"{name}.gz", directory / name):
        if path.exists():
            return path
    raise FileNotFoundError(
        f"The directory {directory} must hold the files "
        f"{', '.join(f'{file}.gz' for file in _FULL_FILES.values())} of "
        f"Fashion-MNIST. Missing: {name}.gz"
    )


def _read_idx(path, shape):
    """Returns the uint8 array of an IDX file, checked to have a shape.

    The format: two zero bytes, the type (8 is uint8), the rank, each dimension
    as a big-endian 32-bit number, and the elements.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}). Get it "
            "again."
        ) from error
    header = struct.pack(f">4B{len(shape)}I", 0, 0, 8, len(shape), *shape)
    if not content.startswith(header):
        raise ValueError(
            f"{path} must be an IDX file of uint8 of shape {shape}, which "
            f"begins with the bytes {header.hex(' ', 4)}. Received: "
            f"{content[: len(header)].hex(' ', 4)}"
        )
    size = int(np.prod(shape))
    if len(content) != len(header) + size:
        raise ValueError(
            f"{path} is damaged: it must hold {size} elements. "
            f"Received: {len(content) - len(header)}. Get it again."
        )
    array = np.frombuffer(content, np.uint8, offset=len(header)).reshape(shape)
    if len(shape) == 1 and array.max() >= len(CLASS_NAMES):
        raise ValueError(
            f"The labels in {path} must be below {len(CLASS_NAMES)}. "
            f"Received: {array.max()}"
        )
    return array


def _read_tfds():
    """Returns the arrays from what tensorflow-datasets has prepared."""
    reason = "tensorflow-datasets is not installed"
    # By its name, as it is no dependency: whoever has it may use it.
    if importlib.util.find_spec("tensorflow_datasets") is not None:
        tfds = importlib.import_module("tensorflow_datasets")
        builder = tfds.builder("fashion_mnist")
        if builder.is_prepared():
            arrays = {}
            for split in ("train", "test"):
                found = tfds.as_numpy(
                    builder.as_dataset(split=split, batch_size=-1)
                )
                arrays[f"x_{split}"] = found["image"][..., 0]
                arrays[f"y_{split}"] = found["label"]
            return arrays
        reason = f"there is nothing in {builder.data_dir}"
    raise FileNotFoundError(
        "The whole Fashion-MNIST was not found. There are three ways to have "
        "it: install Debian's package dataset-fashion-mnist (sought in "
        f"{DEBIAN_DIRECTORY}); or put the published files, such as "
        f"{_FULL_FILES['x_train']}.gz, into a directory and name it in the "
        f"environment variable {DIRECTORY_VARIABLE} (not set); or install "
        "tensorflow-datasets and call tfds.load('fashion_mnist') once "
        f"({reason}). A part of it is embedded and needs nothing: load(), or "
        "--config.dataset=fashion_mnist in the study."
    )


def _from_arrays(arrays):
    """Returns the data of uint8 images and integer labels by name."""
    return FashionMnist(
        x_train=_to_images(arrays["x_train"]),
        y_train=arrays["y_train"].astype(np.int32),
        x_test=_to_images(arrays["x_test"]),
        y_test=arrays["y_test"].astype(np.int32),
    )


def _decode(content):
    """Returns the checked uint8 arrays of the file's bytes, by name."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in _SHAPES}
    # What NumPy raises depends on where the damage is.
    except (
        AttributeError,
        EOFError,
        KeyError,
        NotImplementedError,
        OSError,
        TypeError,
        ValueError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise _damaged(f"{type(error).__name__}: {error}") from error
    for name, shape in _SHAPES.items():
        array = arrays[name]
        if array.shape != shape or array.dtype != np.uint8:
            raise _damaged(
                f"{name} must be uint8 of shape {shape}. "
                f"Received: {array.dtype} of shape {array.shape}"
            )
        if name.startswith("y_") and array.max() >= len(CLASS_NAMES):
            raise _damaged(
                f"{name} must be below {len(CLASS_NAMES)}. "
                f"Received: {array.max()}"
            )
    return arrays


def _to_images(pixels):
    """Scales uint8 images to float32 in [0, 1] and adds a channel axis."""
    return pixels[..., np.newaxis].astype(np.float32) / np.float32(255)


def _damaged(reason):
    return ValueError(
        f"The embedded data set {_FILE.name} is damaged: install "
        f"`state-of-sparsity` again. Cause: {reason}"
    )
