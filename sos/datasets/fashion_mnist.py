"""Fashion-MNIST: a part that is embedded in the package, and the full data set.

The embedded part has 6,000 training and 4,000 test images, the first of each
split of Fashion-MNIST (Xiao, Rasul and Vollgraf 2017, arXiv 1708.07747), which
has 60,000 and 10,000. It suffices to compare techniques within minutes on a
laptop, without a network; accuracies are below those of the full data set.
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
from collections.abc import Mapping
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

#: Environment variable of the directory with the files of the full data set.
DIRECTORY_VARIABLE = "SOS_FASHION_MNIST_DIR"
#: Directory of the files in Debian's package `dataset-fashion-mnist`.
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

    Attributes:
        x_train: Training images, float32 in [0, 1], of shape [n, 28, 28, 1].
        y_train: Training labels, int32 in [0, 10), of shape [n].
        x_test: Test images, float32 in [0, 1], of shape [m, 28, 28, 1].
        y_test: Test labels, int32 in [0, 10), of shape [m].
        class_names: Names of the ten classes, by label.

    Example:
    >>> from sos.datasets import fashion_mnist
    >>> data = fashion_mnist.load()
    >>> data.x_train.shape, data.class_names[data.y_train[0]]
    ((6000, 28, 28, 1), 'Ankle boot')
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    class_names: tuple[str, ...] = CLASS_NAMES


def load() -> FashionMnist:
    """Reads the embedded images and labels.

    Every call returns new arrays.

    Returns:
        6,000 training and 4,000 test examples.

    Raises:
        FileNotFoundError: If the installation lacks the data file.
        ValueError: If the data file is damaged.

    Example:
    >>> from sos.datasets import fashion_mnist
    >>> fashion_mnist.load().x_test.shape
    (4000, 28, 28, 1)
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
    """Reads the full data set, which is not part of this package.

    Nothing is downloaded. Without `directory`, the data set is read from the
    first of these that exists:

    - the directory in the environment variable `SOS_FASHION_MNIST_DIR`;
    - the directory of Debian's package `dataset-fashion-mnist`;
    - the prepared data of tensorflow-datasets, which has another order.

    Args:
        directory: Directory of the four published IDX files, with or without
            the suffix `.gz`.

    Returns:
        60,000 training and 10,000 test examples.

    Raises:
        FileNotFoundError: If the data set is in none of these places, or not in
            `directory`.
        ValueError: If a file is damaged or not of this data set.

    Example:
    >>> from sos.datasets import fashion_mnist
    >>> try:
    ...     data = fashion_mnist.load_full()
    ... except FileNotFoundError:
    ...     data = fashion_mnist.load()
    >>> data.x_train.shape[1:]
    (28, 28, 1)
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


def _find(directory: Path, name: str) -> Path:
    """Returns the path of a file that may be compressed."""
    for path in (directory / f"{name}.gz", directory / name):
        if path.exists():
            return path
    raise FileNotFoundError(
        f"The directory {directory} must hold the files "
        f"{', '.join(f'{file}.gz' for file in _FULL_FILES.values())} of "
        f"Fashion-MNIST. Missing: {name}.gz"
    )


def _read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Reads a uint8 array from an IDX file and checks its shape.

    The format: two zero bytes, the type (8 is uint8), the rank, each dimension
    as a big-endian 32-bit number, and the elements.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}). Download "
            "it again."
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
            f"Received: {len(content) - len(header)}. Download it again."
        )
    array = np.frombuffer(content, np.uint8, offset=len(header)).reshape(shape)
    if len(shape) == 1 and array.max() >= len(CLASS_NAMES):
        raise ValueError(
            f"The labels in {path} must be below {len(CLASS_NAMES)}. "
            f"Received: {array.max()}"
        )
    return array


def _read_tfds() -> dict[str, np.ndarray]:
    """Reads the arrays from the prepared data of tensorflow-datasets."""
    reason = "tensorflow-datasets is not installed"
    # Imported by name, because it is not a dependency.
    if importlib.util.find_spec("tensorflow_datasets") is not None:
        tfds = importlib.import_module("tensorflow_datasets")
        builder = tfds.builder("fashion_mnist")
        if builder.is_prepared():
            arrays = {}
            for split in ("train", "test"):
                examples = tfds.as_numpy(
                    builder.as_dataset(split=split, batch_size=-1)
                )
                arrays[f"x_{split}"] = examples["image"][..., 0]
                arrays[f"y_{split}"] = examples["label"]
            return arrays
        reason = f"{builder.data_dir} has no data"
    raise FileNotFoundError(
        "The full Fashion-MNIST was not found. Install Debian's package "
        f"dataset-fashion-mnist ({DEBIAN_DIRECTORY} does not exist); or set "
        f"the environment variable {DIRECTORY_VARIABLE} (not set) to a "
        "directory with the published files, such as "
        f"{_FULL_FILES['x_train']}.gz; or install tensorflow-datasets and call "
        f"tfds.load('fashion_mnist') once ({reason}). A part is embedded in "
        "the package: load(), or --config.data.name=fashion_mnist in the "
        "study."
    )


def _from_arrays(arrays: Mapping[str, np.ndarray]) -> FashionMnist:
    """Converts uint8 images and integer labels by name."""
    return FashionMnist(
        x_train=_to_images(arrays["x_train"]),
        y_train=arrays["y_train"].astype(np.int32),
        x_test=_to_images(arrays["x_test"]),
        y_test=arrays["y_test"].astype(np.int32),
    )


def _decode(content: bytes) -> dict[str, np.ndarray]:
    """Decodes the embedded file to validated uint8 arrays by name."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in _SHAPES}
    # NumPy's error depends on where the damage is.
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
        raise _damaged_file_error(f"{type(error).__name__}: {error}") from error
    for name, shape in _SHAPES.items():
        array = arrays[name]
        if array.shape != shape or array.dtype != np.uint8:
            raise _damaged_file_error(
                f"{name} must be uint8 of shape {shape}. "
                f"Received: {array.dtype} of shape {array.shape}"
            )
        if name.startswith("y_") and array.max() >= len(CLASS_NAMES):
            raise _damaged_file_error(
                f"{name} must be below {len(CLASS_NAMES)}. "
                f"Received: {array.max()}"
            )
    return arrays


def _to_images(pixels: np.ndarray) -> np.ndarray:
    """Scales uint8 images to float32 in [0, 1] and adds a channel axis."""
    return pixels[..., np.newaxis].astype(np.float32) / np.float32(255)


def _damaged_file_error(reason: str) -> ValueError:
    return ValueError(
        f"The embedded data set {_FILE.name} is damaged: install "
        f"`state-of-sparsity` again. Cause: {reason}"
    )
