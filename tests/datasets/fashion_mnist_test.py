import dataclasses
import io
import pathlib

import numpy as np
import pytest

from sos.datasets import fashion_mnist


@pytest.fixture(scope="module")
def data():
    return fashion_mnist.load()


@pytest.fixture
def damaged(tmp_path, monkeypatch):
    """Puts the given bytes in place of the embedded file."""

    def put(content):
        path = tmp_path / "fashion_mnist_10k.npz"
        path.write_bytes(content)
        monkeypatch.setattr(fashion_mnist, "_FILE", path)

    return put


def _archive(**changes):
    arrays = {
        name: np.zeros(shape, np.uint8)
        for name, shape in fashion_mnist._SHAPES.items()
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **(arrays | changes))
    return buffer.getvalue()


@pytest.mark.parametrize(("split", "count"), [("train", 6000), ("test", 4000)])
def test_shapes_and_dtypes(data, split, count):
    images = getattr(data, f"x_{split}")
    labels = getattr(data, f"y_{split}")
    assert images.shape == (count, 28, 28, 1)
    assert images.dtype == np.float32
    assert images.min() == 0.0
    assert images.max() == 1.0
    assert labels.shape == (count,)
    assert labels.dtype == np.int32


@pytest.mark.parametrize("labels", ["y_train", "y_test"])
def test_every_class_is_well_represented(data, labels):
    labels = getattr(data, labels)
    counts = np.bincount(labels, minlength=10)
    assert len(counts) == len(data.class_names) == 10
    assert counts.min() > 0.08 * len(labels)


def test_images_carry_their_labels(data):
    # The nearest class mean alone gets two thirds of the test images right;
    # shuffled labels would get a tenth.
    train = data.x_train.reshape(len(data.x_train), -1)
    test = data.x_test.reshape(len(data.x_test), -1)
    means = np.stack([train[data.y_train == c].mean(0) for c in range(10)])
    distances = (means**2).sum(1) - 2 * test @ means.T
    accuracy = (distances.argmin(1) == data.y_test).mean()
    assert 0.6 < accuracy < 0.75


def test_splits_are_disjoint(data):
    train = {image.tobytes() for image in data.x_train}
    assert not any(image.tobytes() in train for image in data.x_test)


def test_result_is_frozen_but_its_arrays_are_the_callers(data):
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.x_train = None
    other = fashion_mnist.load()
    other.x_train[:] = 0
    assert data.x_train.max() == 1.0


def test_missing_file(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "_FILE", tmp_path / "nowhere.npz")
    with pytest.raises(FileNotFoundError, match="install .* again.*nowhere"):
        fashion_mnist.load()


def test_truncated_file(damaged):
    content = pathlib.Path(str(fashion_mnist._FILE)).read_bytes()
    for length in (0, 1, 1000, len(content) // 2, len(content) - 1):
        damaged(content[:length])
        with pytest.raises(ValueError, match="is damaged"):
            fashion_mnist.load()


def test_flipped_bytes(damaged):
    content = pathlib.Path(str(fashion_mnist._FILE)).read_bytes()
    # Inside the compressed pixels, where the archive's checksum notices.
    for position in np.linspace(200, 0.8 * len(content), 7, dtype=int):
        changed = bytearray(content)
        changed[position] ^= 0xFF
        damaged(bytes(changed))
        with pytest.raises(ValueError, match="is damaged"):
            fashion_mnist.load()


def test_other_bytes(damaged):
    damaged(b"<html>Not found</html>")
    with pytest.raises(ValueError, match="is damaged"):
        fashion_mnist.load()


def test_missing_array(damaged):
    buffer = io.BytesIO()
    np.savez(buffer, x_train=np.zeros((6000, 28, 28), np.uint8))
    damaged(buffer.getvalue())
    with pytest.raises(ValueError, match="is damaged.*KeyError.*y_train"):
        fashion_mnist.load()


@pytest.mark.parametrize(
    "array",
    [np.zeros((6000, 28, 28), np.float32), np.zeros((10, 28, 28), np.uint8)],
)
def test_wrong_array(damaged, array):
    damaged(_archive(x_train=array))
    with pytest.raises(ValueError, match="x_train must be uint8 of shape"):
        fashion_mnist.load()


def test_label_out_of_range(damaged):
    damaged(_archive(y_test=np.full(4000, 10, np.uint8)))
    with pytest.raises(ValueError, match="y_test must be below 10"):
        fashion_mnist.load()
