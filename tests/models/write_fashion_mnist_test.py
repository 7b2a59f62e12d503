import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from models import write_fashion_mnist
from sos.datasets import fashion_mnist, imagenet
from sos.errors import UsageError
from tests.support import processes

tfds = pytest.importorskip("tensorflow_datasets")


@pytest.fixture
def run(monkeypatch):
    """Runs the program in this process on the embedded images."""

    def call(**values):
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        with flagsaver.flagsaver(**values):
            write_fashion_mnist._run([])

    data = fashion_mnist.load()
    small = fashion_mnist.FashionMnist(
        x_train=data.x_train[:40],
        y_train=data.y_train[:40],
        x_test=data.x_test[:20],
        y_test=data.y_test[:20],
    )
    monkeypatch.setattr(fashion_mnist, "load_full", lambda: small)
    return call


def test_write_fashion_mnist_writes_grey_jpegs_once(run, tmp_path, capsys):
    run(directory=str(tmp_path), shards=2)
    path = tmp_path / "fashion_mnist_jpeg" / "1.0.0"
    assert f"Wrote {path}" in capsys.readouterr().out
    builder = tfds.builder("fashion_mnist_jpeg", data_dir=tmp_path)
    assert "quality 95" in builder.info.description
    data = fashion_mnist.load()
    for split, images, labels in (
        ("train", data.x_train[:40], data.y_train[:40]),
        ("test", data.x_test[:20], data.y_test[:20]),
    ):
        assert len(builder.info.splits[split].filepaths) == 2
        examples = list(tfds.as_numpy(builder.as_dataset(split=split)))
        found = [int(example["label"]) for example in examples]
        assert sorted(found) == sorted(labels.tolist())
        for example in examples:
            assert example["image"].shape == (32, 32, 1)
            # Each is close to one of its class, in a black frame.
            same = 255 * images[labels == example["label"]]
            inside = example["image"][2:-2, 2:-2].astype(np.float32)
            errors = np.abs(same - inside).mean(axis=(1, 2, 3))
            assert errors.min() < 4
            assert example["image"][0].max() < 100
    written = {file: file.stat().st_mtime_ns for file in path.iterdir()}
    run(directory=str(tmp_path), shards=2)
    assert "is complete already" in capsys.readouterr().out
    assert {f: f.stat().st_mtime_ns for f in path.iterdir()} == written


@pytest.mark.parametrize("changed", [{"shards": 3}, {"quality": 50}])
def test_write_fashion_mnist_with_other_flags_raises(run, tmp_path, changed):
    run(directory=str(tmp_path), shards=2)
    with pytest.raises(UsageError, match="was written with other flags"):
        run(**{"directory": str(tmp_path), "shards": 2, **changed})


@pytest.mark.parametrize("directory", [None, ""])
def test_write_fashion_mnist_without_directory_raises(run, directory):
    with pytest.raises(UsageError, match="--directory must be a directory"):
        run(directory=directory)


def test_write_fashion_mnist_keeps_a_foreign_directory(run, tmp_path):
    path = tmp_path / "fashion_mnist_jpeg" / "1.0.0"
    path.mkdir(parents=True)
    (path / "notes.txt").write_text("keep")
    with pytest.raises(UsageError, match="is not a data set of this program"):
        run(directory=str(tmp_path))
    assert (path / "notes.txt").read_text() == "keep"


def test_written_fashion_mnist_is_a_source(run, tmp_path):
    run(directory=str(tmp_path), shards=1)
    source = imagenet.TfdsImages(
        write_fashion_mnist.NAME, directory=tmp_path, seed=0, batch_size=4
    )
    assert source.class_names == fashion_mnist.CLASS_NAMES
    assert (source.train_examples, source.eval_examples) == (40, 20)


@pytest.mark.slow
def test_write_fashion_mnist_without_images_ends_in_one_line(tmp_path):
    program = processes.Program(
        "models.write_fashion_mnist",
        f"--directory={tmp_path / 'data'}",
        log=tmp_path / "log",
        environment={"SOS_FASHION_MNIST_DIR": str(tmp_path)},
    )
    assert program.process.wait(processes.PATIENCE) == 1
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert "train-images-idx3-ubyte.gz" in line
    assert not (tmp_path / "data").exists()
