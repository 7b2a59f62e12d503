import dataclasses
import gzip
import io
import pathlib
import struct
import sys
import types

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
def test_load_returns_images_and_labels(data, split, count):
    images = getattr(data, f"x_{split}")
    labels = getattr(data, f"y_{split}")
    assert images.shape == (count, 28, 28, 1)
    assert images.dtype == np.float32
    assert images.min() == 0.0
    assert images.max() == 1.0
    assert labels.shape == (count,)
    assert labels.dtype == np.int32


@pytest.mark.parametrize("labels", ["y_train", "y_test"])
def test_load_has_enough_of_every_class(data, labels):
    labels = getattr(data, labels)
    counts = np.bincount(labels, minlength=10)
    assert len(counts) == len(data.class_names) == 10
    assert counts.min() > 0.08 * len(labels)


def test_load_images_carry_their_labels(data):
    # The nearest class mean alone gets two thirds of the test images right;
    # shuffled labels would get a tenth.
    train = data.x_train.reshape(len(data.x_train), -1)
    test = data.x_test.reshape(len(data.x_test), -1)
    means = np.stack([train[data.y_train == c].mean(0) for c in range(10)])
    distances = (means**2).sum(1) - 2 * test @ means.T
    accuracy = (distances.argmin(1) == data.y_test).mean()
    assert 0.6 < accuracy < 0.75


def test_load_splits_are_disjoint(data):
    train = {image.tobytes() for image in data.x_train}
    assert not any(image.tobytes() in train for image in data.x_test)


def test_load_result_is_frozen_with_arrays_of_the_caller(data):
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.x_train = None
    other = fashion_mnist.load()
    other.x_train[:] = 0
    assert data.x_train.max() == 1.0


def test_load_without_its_file_raises(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "_FILE", tmp_path / "nowhere.npz")
    with pytest.raises(FileNotFoundError, match="install .* again.*nowhere"):
        fashion_mnist.load()


def test_load_of_a_truncated_file_raises(damaged):
    content = pathlib.Path(str(fashion_mnist._FILE)).read_bytes()
    for length in (0, 1, 1000, len(content) // 2, len(content) - 1):
        damaged(content[:length])
        with pytest.raises(ValueError, match="is damaged"):
            fashion_mnist.load()


def test_load_of_flipped_bytes_raises(damaged):
    content = pathlib.Path(str(fashion_mnist._FILE)).read_bytes()
    # Inside the compressed pixels, where the archive's checksum notices.
    for position in np.linspace(200, 0.8 * len(content), 7, dtype=int):
        changed = bytearray(content)
        changed[position] ^= 0xFF
        damaged(bytes(changed))
        with pytest.raises(ValueError, match="is damaged"):
            fashion_mnist.load()


def test_load_of_other_bytes_raises(damaged):
    damaged(b"<html>Not found</html>")
    with pytest.raises(ValueError, match="is damaged"):
        fashion_mnist.load()


def test_load_without_an_array_raises(damaged):
    buffer = io.BytesIO()
    np.savez(buffer, x_train=np.zeros((6000, 28, 28), np.uint8))
    damaged(buffer.getvalue())
    with pytest.raises(ValueError, match="is damaged.*KeyError.*y_train"):
        fashion_mnist.load()


@pytest.mark.parametrize(
    "array",
    [np.zeros((6000, 28, 28), np.float32), np.zeros((10, 28, 28), np.uint8)],
)
def test_load_of_a_wrong_array_raises(damaged, array):
    damaged(_archive(x_train=array))
    with pytest.raises(ValueError, match="x_train must be uint8 of shape"):
        fashion_mnist.load()


def test_load_of_a_label_out_of_range_raises(damaged):
    damaged(_archive(y_test=np.full(4000, 10, np.uint8)))
    with pytest.raises(ValueError, match="y_test must be below 10"):
        fashion_mnist.load()


def _pack(content):
    # Without the time, so that all processes make the same of it.
    return gzip.compress(content, mtime=0)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A directory with the four files, of 30 and 20 images of 28 x 28."""
    monkeypatch.delenv(fashion_mnist.DIRECTORY_VARIABLE, raising=False)
    monkeypatch.setattr(fashion_mnist, "DEBIAN_DIRECTORY", tmp_path / "none")
    directory = tmp_path / "published"
    directory.mkdir()
    generator = np.random.default_rng(0)
    for name, file in fashion_mnist._FULL_FILES.items():
        count = 30 if "train" in name else 20
        shape = (count, 28, 28) if name.startswith("x") else (count,)
        array = generator.integers(
            256 if name.startswith("x") else 10, size=shape
        )
        monkeypatch.setitem(fashion_mnist._FULL_SHAPES, name, shape)
        content = _pack(_idx(array))
        (directory / f"{file}.gz").write_bytes(content)
    return directory


def _idx(array, magic=None):
    """An IDX file as its format is published, independently of the reader."""
    if magic is None:
        magic = 0x0800 + array.ndim
    header = struct.pack(">I", magic)
    for dimension in array.shape:
        header += struct.pack(">I", dimension)
    return header + bytes(int(value) for value in array.ravel())


def _pixels(directory, file):
    content = gzip.decompress((directory / file).read_bytes())
    return np.array(list(content[16:])).reshape(-1, 28, 28)


def test_load_full_has_60_000_and_10_000_images():
    counts = {n: s[0] for n, s in fashion_mnist._FULL_SHAPES.items()}
    assert counts["x_train"] == counts["y_train"] == 60_000
    assert counts["x_test"] == counts["y_test"] == 10_000


def test_load_full_reads_published_files(published):
    data = fashion_mnist.load_full(published)
    assert data.x_train.shape == (30, 28, 28, 1)
    assert data.x_test.shape == (20, 28, 28, 1)
    assert data.x_train.dtype == np.float32
    assert data.y_train.dtype == np.int32
    pixels = _pixels(published, "train-images-idx3-ubyte.gz")
    np.testing.assert_allclose(255 * data.x_train[..., 0], pixels, rtol=1e-6)
    labels = gzip.decompress(
        (published / "t10k-labels-idx1-ubyte.gz").read_bytes()
    )
    assert data.y_test.tolist() == list(labels[8:])


def test_load_full_reads_uncompressed_files(published):
    expected = fashion_mnist.load_full(published)
    for path in list(published.iterdir()):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    found = fashion_mnist.load_full(str(published))
    np.testing.assert_array_equal(found.x_test, expected.x_test)


def test_load_full_looks_where_the_variable_says_then_in_debians_place(
    published, monkeypatch
):
    monkeypatch.setattr(fashion_mnist, "DEBIAN_DIRECTORY", published)
    assert len(fashion_mnist.load_full().x_train) == 30
    nowhere = published / "nowhere"
    monkeypatch.setenv(fashion_mnist.DIRECTORY_VARIABLE, str(nowhere))
    # A place that was named is not passed over in silence.
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fashion_mnist.load_full()
    monkeypatch.setenv(fashion_mnist.DIRECTORY_VARIABLE, "")
    assert len(fashion_mnist.load_full().x_train) == 30
    # An argument goes before the variable.
    monkeypatch.setenv(fashion_mnist.DIRECTORY_VARIABLE, str(nowhere))
    assert len(fashion_mnist.load_full(published).x_train) == 30


class _Builder:
    data_dir = "/data/of/tfds"

    def __init__(self, arrays):
        self._arrays = arrays

    def is_prepared(self):
        return self._arrays is not None

    def as_dataset(self, *, split, batch_size):
        assert batch_size == -1
        return self._arrays[split]


@pytest.fixture
def tfds(monkeypatch):
    """Puts a stand-in for tensorflow-datasets in place."""

    def put(arrays):
        module = types.ModuleType("tensorflow_datasets")
        module.__spec__ = types.SimpleNamespace(name=module.__name__)
        module.builder = {"fashion_mnist": _Builder(arrays)}.__getitem__
        module.as_numpy = lambda dataset: dataset
        monkeypatch.setitem(sys.modules, module.__name__, module)

    return put


def test_load_full_reads_what_tfds_has_prepared(published, tfds):
    generator = np.random.default_rng(1)
    arrays = {
        split: {
            "image": generator.integers(
                256, size=(count, 28, 28, 1), dtype=np.uint8
            ),
            "label": generator.integers(10, size=count),
        }
        for split, count in (("train", 5), ("test", 3))
    }
    tfds(arrays)
    data = fashion_mnist.load_full()
    np.testing.assert_allclose(255 * data.x_train, arrays["train"]["image"])
    np.testing.assert_array_equal(data.y_test, arrays["test"]["label"])
    assert data.y_test.dtype == np.int32


def test_load_full_without_files_lists_all_ways(published, tfds):
    tfds(None)
    with pytest.raises(FileNotFoundError) as error:
        fashion_mnist.load_full()
    for part in (
        "dataset-fashion-mnist",
        fashion_mnist.DIRECTORY_VARIABLE,
        "tensorflow-datasets",
        "/data/of/tfds",
        "--config.data.name=fashion_mnist",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_load_full_without_a_file_names_it(published):
    (published / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match="Missing: t10k-labels"):
        fashion_mnist.load_full(published)


IMAGES = np.zeros((30, 28, 28), int)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"<html>Not found</html>", "BadGzipFile"),
        (_pack(_idx(IMAGES))[:-9], "EOFError"),
        (_pack(_idx(IMAGES)[:-1]), "must hold 23520 elements"),
        (_pack(_idx(IMAGES) + b"x"), "Received: 23521"),
        (_pack(_idx(IMAGES, magic=0x0D03)), "IDX file of uint8"),
        (_pack(_idx(IMAGES[:29])), r"of shape \(30, 28, 28\)"),
        (_pack(b""), "IDX file"),
    ],
    ids=["page", "cut", "short", "long", "type", "shape", "empty"],
)
def test_load_full_of_damaged_files_names_them(published, content, text):
    path = published / "train-images-idx3-ubyte.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=text) as error:
        fashion_mnist.load_full(published)
    assert str(path) in str(error.value)


def test_load_full_of_labels_out_of_range_raises(published):
    path = published / "train-labels-idx1-ubyte.gz"
    path.write_bytes(_pack(_idx(np.full(30, 10))))
    with pytest.raises(ValueError, match="must be below 10"):
        fashion_mnist.load_full(published)


@pytest.mark.skipif(
    not fashion_mnist.DEBIAN_DIRECTORY.is_dir(),
    reason="needs Debian's package dataset-fashion-mnist",
)
def test_load_full_begins_with_the_embedded_images(data):
    whole = fashion_mnist.load_full(fashion_mnist.DEBIAN_DIRECTORY)
    for name in ("x_train", "y_train", "x_test", "y_test"):
        part = getattr(data, name)
        np.testing.assert_array_equal(getattr(whole, name)[: len(part)], part)
