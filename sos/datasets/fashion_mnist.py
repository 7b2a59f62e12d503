"""Fashion-MNIST, embedded: 6,000 training and 4,000 test images.

They are the first images of each split of Fashion-MNIST (Xiao, Rasul and
Vollgraf 2017, arXiv 1708.07747), which has 60,000 and 10,000. That is enough
to compare techniques within minutes on a laptop and without a network;
accuracies are below those of the full data set. Copyright 2017 Zalando SE,
MIT licence (see `data/fashion_mnist_10k.NOTICE.txt`).
"""

import dataclasses
import importlib.resources
import io
import zipfile
import zlib

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


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FashionMnist:
    """Images and labels, in the order of the original data set.

    The images have a channel axis, so that they fit convolutions as they are.

    Attributes:
        x_train: Training images, float32 in [0, 1], of shape
            (6000, 28, 28, 1).
        y_train: Training labels, int32 in [0, 10), of shape (6000,).
        x_test: Test images, float32 in [0, 1], of shape (4000, 28, 28, 1).
        y_test: Test labels, int32 in [0, 10), of shape (4000,).
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
    arrays = _decode(content)
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
