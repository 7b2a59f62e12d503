import json

import numpy as np
import pytest

from sos.datasets import imagenet, write_images, writer
from sos.errors import StorageError, UsageError
from tests.support import photographs

tfds = pytest.importorskip("tensorflow_datasets")


def write(directory, splits, **options):
    return write_images(
        directory,
        splits,
        **{"name": "drawings", "class_names": list("abcdefghij"), **options},
    )


def drawings(count):
    return [(photographs.drawing(k % 10), k % 10) for k in range(count)]


def test_write_images_is_read_by_tfds(tmp_path):
    path = write(
        tmp_path,
        {"train": drawings(25), "validation": drawings(10)},
        shards=3,
        version="2.1.0",
        description="Bars.",
    )
    assert path == tmp_path / "drawings" / "2.1.0"
    assert len(list(path.iterdir())) == 2 * 3 + 3
    assert {file.name for file in path.glob("*train*")} == {
        f"drawings-train.tfrecord-0000{shard}-of-00003" for shard in range(3)
    }
    for builder in (
        tfds.builder("drawings", data_dir=tmp_path),
        tfds.builder_from_directory(path),
    ):
        info = builder.info
        assert info.full_name == "drawings/2.1.0"
        assert info.description == "Bars."
        assert info.features["label"].names == list("abcdefghij")
        assert sorted(info.splits["train"].shard_lengths) == [8, 8, 9]
        assert info.splits["validation"].num_examples == 10
        data = builder.as_dataset(split="train", shuffle_files=False)
        examples = list(tfds.as_numpy(data))
        labels = [int(example["label"]) for example in examples]
        assert sorted(labels) == sorted(label for _, label in drawings(25))
        for example in examples:
            expected = photographs.drawing(example["label"]).astype(float)
            assert np.abs(example["image"] - expected).mean() < 4


def test_write_images_shuffles_the_same_way_every_time(tmp_path):
    def write_sorted(folder):
        images = [(photographs.drawing(0), k // 50) for k in range(500)]
        path = write(folder, {"train": images}, shards=2)
        return [
            tuple(
                int(example["label"])
                for example in tfds.as_numpy(
                    tfds.builder_from_directory(path).as_dataset(
                        split=tfds.core.ReadInstruction(
                            "train", from_=shard * 250, to=(shard + 1) * 250
                        )
                    )
                )
            )
            for shard in range(2)
        ]

    first = write_sorted(tmp_path / "a")
    assert first == write_sorted(tmp_path / "b")
    for labels in first:
        # Every class is spread over the file, though they came in order.
        assert np.corrcoef(labels, np.arange(250))[0, 1] < 0.2
        assert len(set(labels[:60])) > 7


def test_write_images_with_little_memory_writes_the_same(tmp_path, monkeypatch):
    def contents(folder):
        path = write(folder, {"train": drawings(30)}, shards=4)
        return {file.name: file.read_bytes() for file in path.iterdir()}

    expected = contents(tmp_path / "a")
    monkeypatch.setattr(writer, "_BUFFER_BYTES", 5000)
    assert contents(tmp_path / "b") == expected


def test_write_images_keeps_files_as_they_are(tmp_path):
    pixels = photographs.photograph("coffee", 50, 40)
    png = tmp_path / "image.png"
    png.write_bytes(photographs.encode(pixels, "PNG"))
    jpeg = photographs.encode(pixels)
    path = write(
        tmp_path, {"train": [(jpeg, 0), (png, np.int64(1)), (str(png), 2)]}
    )
    records = tfds.builder_from_directory(path).as_dataset(
        split="train", decoders={"image": tfds.decode.SkipDecoding()}
    )
    stored = {int(x["label"]): x["image"] for x in tfds.as_numpy(records)}
    assert stored == {0: jpeg, 1: png.read_bytes(), 2: png.read_bytes()}


@pytest.mark.parametrize("shape", [(40, 50), (40, 50, 1)])
def test_write_images_stores_grey_pixels_as_grey_jpegs(tmp_path, shape):
    pixels = photographs.photograph("coffee", 50, 40).mean(-1).astype(np.uint8)
    path = write(tmp_path, {"train": [(pixels.reshape(shape), 0)]}, channels=1)
    data = tfds.builder_from_directory(path).as_dataset(split="train")
    (example,) = tfds.as_numpy(data)
    assert example["image"].shape == (40, 50, 1)
    difference = example["image"][..., 0] - pixels.astype(float)
    assert np.abs(difference).mean() < 3


def test_quality_determines_the_size(tmp_path):
    sizes = []
    for quality in (50, 95):
        path = write(
            tmp_path / str(quality),
            {"train": [(photographs.photograph("coffee"), 0)]},
            quality=quality,
        )
        info = json.loads((path / "dataset_info.json").read_text())
        sizes.append(int(info["splits"][0]["numBytes"]))
    assert 2 * sizes[0] < sizes[1]


def test_written_images_are_a_source(tmp_path):
    write(tmp_path, {"train": drawings(12), "test": drawings(4)})
    source = imagenet.TfdsImages(
        "drawings", directory=tmp_path, seed=0, batch_size=4
    )
    assert source.class_names == tuple("abcdefghij")
    assert (source.train_examples, source.eval_examples) == (12, 4)


def test_existing_data_set_is_kept(tmp_path):
    path = write(tmp_path, {"train": drawings(3)})
    content = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(UsageError, match="which exists"):
        write(tmp_path, {"train": drawings(5)})
    assert {f.name: f.read_bytes() for f in path.iterdir()} == content


def test_failure_leaves_nothing(tmp_path):
    def images():
        yield from drawings(3)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write(tmp_path, {"train": images()})
    assert not list((tmp_path / "drawings").iterdir())
    # What a killed process left is removed.
    (tmp_path / "drawings" / f".1.0.0.{'0' * 32}.new").mkdir()
    path = write(tmp_path, {"train": drawings(3)})
    assert list((tmp_path / "drawings").iterdir()) == [path]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "Drawings"}, "`name` must consist of"),
        ({"name": "mnist"}, "`name` must differ .* 'mnist'"),
        ({"version": "1.0"}, "`version` must be three numbers"),
        ({"shards": 0}, "`shards` must be at least 1"),
        ({"shards": 4}, "at most .* 4 shards for 3 images .* 'train'"),
        ({"quality": 0}, "`quality` must be from 1 to 100"),
        ({"channels": 2}, "`channels` must be 1 or 3"),
        ({"class_names": []}, "`class_names` must name at least one"),
        ({"class_names": "abc"}, "`class_names` must name at least one"),
        ({"class_names": ["a", "a"]}, "`class_names` must differ"),
        ({"class_names": ["a", "b"]}, "image 2 .* from 0 to 1.*Received: 2"),
        ({"directory": "gs://bucket"}, "must be a local path"),
        ({"splits": {}}, "`splits` must have at least one"),
        ({"splits": {"a-b": []}}, "name of a split .* 'a-b'"),
        ({"splits": {"train": []}}, "1 shards for 0 images"),
        ({"splits": {"train": [(b"text", 0)]}}, "must be a JPEG or PNG file"),
        (
            {"splits": {"train": [(np.zeros((2, 2, 3)), 0)]}},
            "uint8 pixels .* float64 of shape \\(2, 2, 3\\)",
        ),
        (
            {"splits": {"train": [(np.zeros((2, 2, 4), np.uint8), 0)]}},
            "Image 0 of the split 'train' .* of shape \\(2, 2, 4\\)",
        ),
        (
            {"splits": {"train": [(np.zeros((2, 2), np.uint8), 0.5)]}},
            "must be an integer .* 0.5",
        ),
    ],
)
def test_invalid_argument_raises(tmp_path, options, message):
    arguments = {"directory": tmp_path, "splits": {"train": drawings(3)}}
    with pytest.raises(UsageError, match=message) as error:
        write(**{**arguments, **options})
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*/*"))


def test_missing_image_raises(tmp_path):
    with pytest.raises(
        StorageError, match="Image 0 .* cannot be read"
    ) as error:
        write(tmp_path, {"train": [(tmp_path / "absent.jpg", 0)]})
    assert "absent.jpg" in str(error.value)
