import functools
import importlib.util
import io
import re

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from sos.datasets import imagenet
from sos.errors import MissingPackageError, ReportedError, UsageError
from sos.training import inputs
from tests.support import photographs

tfds = pytest.importorskip("tensorflow_datasets")

# Mean and standard deviation of ImageNet's pixels, of 255.
MEAN = 255 * np.array([0.485, 0.456, 0.406])
DEVIATION = 255 * np.array([0.229, 0.224, 0.225])


def context(hosts=1, host=0, replicas=1):
    return tf.distribute.InputContext(hosts, host, hosts * replicas)


def keys_kernel(x):
    """The cubic convolution kernel of Keys (1981), with a = -1/2."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def resize_matrix(size, length):
    """Weights of bicubic interpolation without antialiasing."""
    centers = (np.arange(size) + 0.5) * length / size - 0.5
    weights = keys_kernel(centers[:, np.newaxis] - np.arange(length))
    # Neighbours outside of the image do not count.
    return weights / weights.sum(axis=1, keepdims=True)


def bicubic(pixels, size):
    """Resizes to float64 of shape [size, size, 3]."""
    rows = resize_matrix(size, pixels.shape[0])
    columns = resize_matrix(size, pixels.shape[1])
    return np.einsum("yh,hwc,xw->yxc", rows, pixels, columns, optimize=True)


def center(pixels):
    """The centre square of 224/256 of the shorter side."""
    height, width = pixels.shape[:2]
    size = max(1, int(min(height, width) * 224 / 256))
    top, left = (height - size + 1) // 2, (width - size + 1) // 2
    return pixels[top : top + size, left : left + size]


def to_uint8(values):
    return np.clip(np.floor(values + 0.5), 0, 255)


def gradient(height, width):
    """Pixels whose red is the column and whose green is the row."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns, rows, 0 * rows], -1).astype(np.uint8)


def crop_of(image):
    """Finds the crop that became a square of a `gradient`.

    Returns:
        Left, top, width and height in pixels of the gradient, each within about
        one, and whether it was flipped.
    """
    size = len(image)
    inner = slice(size // 4, 3 * size // 4)
    result = []
    for values in (image[size // 2, :, 0], image[:, size // 2, 1]):
        slope, offset = np.polyfit(
            np.arange(size)[inner] + 0.5, values[inner].astype(float) + 0.5, 1
        )
        flipped = slope < 0
        result.append((offset + size * slope if flipped else offset, slope))
        if len(result) == 1:
            mirrored = flipped
    (left, horizontal), (top, vertical) = result
    return left, top, abs(horizontal) * size, vertical * size, mirrored


@functools.cache
def many_crops(height=200, width=250, count=600, min_area=0.08):
    content = tf.constant(photographs.encode(gradient(height, width), "PNG"))
    decode = tf.function(
        lambda seed: imagenet.decode_train(content, seed, 64, min_area)
    )
    seeds = np.random.default_rng(0).integers(-(2**31), 2**31, (count, 2))
    return [
        crop_of(decode(tf.constant(seed, tf.int32)).numpy()) for seed in seeds
    ]


@pytest.mark.parametrize("size", [224, 64])
@pytest.mark.parametrize("name", photographs.NAMES)
def test_decode_eval_is_center_crop_and_bicubic(name, size):
    content = photographs.encode(photographs.photograph(name))
    result = imagenet.decode_eval(tf.constant(content), size).numpy()
    assert result.dtype == np.uint8
    # TensorFlow's decoder is fast rather than exact.
    pixels = tf.io.decode_jpeg(content, channels=3).numpy()
    expected = to_uint8(bicubic(center(pixels), size))
    difference = np.abs(result - expected)
    # The decoder sees no colours beyond the crop, and the kernel is tabulated.
    assert difference.mean() < 0.02
    assert (difference[2:-2, 2:-2] <= 1).all()
    exact = to_uint8(bicubic(center(photographs.decode(content)), size))
    # It also truncates.
    assert np.abs(result - exact).mean() < 2.0
    assert -1.0 < (result - exact).mean() <= 0.0


def test_decode_eval_of_small_image_equals_pillow():
    # PIL averages when it makes images smaller; otherwise it is the same.
    pixels = photographs.photograph("coffee", 60, 48)
    content = tf.constant(photographs.encode(pixels, "PNG"))
    result = imagenet.decode_eval(content, 224).numpy().astype(int)
    square = Image.fromarray(center(pixels))
    expected = np.asarray(square.resize((224, 224), Image.BICUBIC), int)
    difference = np.abs(result - expected)
    # PIL rounds and clips between the two directions.
    assert difference.mean() < 0.3
    assert (difference <= 1).mean() > 0.99


@pytest.mark.parametrize(
    "shape",
    [(1, 1), (2, 3), (1, 400), (400, 1), (8, 9), (40, 700), (223, 225)],
)
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_images_of_any_size_are_decoded(shape, format):
    pixels = photographs.photograph("chelsea", shape[1], shape[0])
    content = photographs.encode(pixels, format)
    stored = tf.io.decode_image(content, channels=3).numpy()
    expected = to_uint8(bicubic(center(stored), 32))
    result = imagenet.decode_eval(tf.constant(content), 32).numpy()
    assert np.abs(result - expected).mean() < (0.05 if format == "PNG" else 2)
    for seed in range(3):
        image = imagenet.decode_train(tf.constant(content), [seed, 1], 32)
        assert image.shape == (32, 32, 3)
    if max(shape) > 100 * min(shape):
        # No crop has the aspect, so that it is the centre.
        flipped = [np.abs(image - x).mean() for x in (result, result[:, ::-1])]
        assert min(flipped) == 0.0


@pytest.mark.parametrize(
    ("format", "mode", "tolerance"),
    [
        ("JPEG", "RGB", 2.0),
        ("JPEG", "L", 2.0),
        ("JPEG", "CMYK", 2.0),
        ("PNG", "RGB", 0.02),
        ("PNG", "L", 0.02),
        ("PNG", "P", 0.02),
        ("BMP", "RGB", 0.02),
        ("GIF", "P", 0.02),
    ],
)
def test_every_format_gives_right_colours(format, mode, tolerance):
    pixels = photographs.photograph("astronaut", 200, 160)
    content = photographs.encode(pixels, format, mode)
    expected = to_uint8(bicubic(center(photographs.decode(content)), 64))
    result = imagenet.decode_eval(tf.constant(content), 64).numpy()
    assert np.abs(result - expected).mean() < tolerance
    if mode == "L":
        assert (result[..., :1] == result).all()
    crop = imagenet.decode_train(tf.constant(content), [3, 4], 64)
    assert crop.shape == (64, 64, 3)


def test_gif_gives_its_first_frame():
    frames = [
        Image.fromarray(photographs.photograph(name, 60, 40))
        for name in ("coffee", "flower")
    ]
    output = io.BytesIO()
    frames[0].save(output, "GIF", save_all=True, append_images=frames[1:])
    first = photographs.decode(output.getvalue())
    result = imagenet.decode_eval(tf.constant(output.getvalue()), 32).numpy()
    expected = to_uint8(bicubic(center(first), 32))
    assert np.abs(result - expected).mean() < 0.02


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_exif_orientation_is_ignored(orientation):
    pixels = photographs.photograph("china", 90, 60)
    exif = Image.Exif()
    exif[0x0112] = orientation
    rotated = photographs.encode(pixels, exif=exif)
    # A viewer would show another image.
    shown = np.asarray(Image.open(io.BytesIO(rotated)))
    assert shown.shape == pixels.shape
    plain = imagenet.decode_eval(tf.constant(photographs.encode(pixels)), 32)
    result = imagenet.decode_eval(tf.constant(rotated), 32)
    np.testing.assert_array_equal(result, plain)


def test_crops_have_areas_and_aspects_in_range():
    crops = np.array([crop[:4] for crop in many_crops()])
    left, top, width, height = crops.T
    assert left.min() > -1.5 and top.min() > -1.5
    assert (left + width).max() < 251.5 and (top + height).max() < 201.5
    area = width * height / (200 * 250)
    aspect = width / height
    assert 0.075 < area.min() < 0.12
    assert 0.85 < area.max() <= 1.02
    assert 0.72 < aspect.min() < 0.78
    assert 1.28 < aspect.max() < 1.4
    # The height is uniform for an aspect, so that small areas are frequent.
    assert 0.25 < np.median(area) < 0.45


def test_crops_respect_min_area():
    areas = [
        width * height / (200 * 250)
        for _, _, width, height, _ in many_crops(count=100, min_area=0.7)
    ]
    assert min(areas) > 0.68


def test_half_of_crops_are_flipped_whatever_their_box():
    crops = many_crops()
    flips = np.array([crop[4] for crop in crops], float)
    assert abs(flips.mean() - 0.5) < 4 * 0.5 / len(crops) ** 0.5
    for values in np.array([crop[:4] for crop in crops]).T:
        assert abs(np.corrcoef(flips, values)[0, 1]) < 4 / len(crops) ** 0.5


def test_crop_decoding_equals_cropping_decoded_pixels():
    jpeg = photographs.encode(photographs.photograph("rocket"))
    pixels = tf.io.decode_jpeg(jpeg, channels=3)
    for seed in range(8):
        part = imagenet.decode_train(tf.constant(jpeg), [seed, 5], 64)
        whole = imagenet.decode_train(tf.io.encode_png(pixels), [seed, 5], 64)
        difference = np.abs(part.numpy().astype(int) - whole.numpy())
        assert difference.mean() < 0.05
        assert (difference[2:-2, 2:-2] <= 1).all()


def test_equal_seeds_give_equal_crops():
    jpeg = tf.constant(photographs.encode(photographs.photograph("flower")))
    traced = tf.function(imagenet.decode_train)

    def decode(*seed):
        return traced(jpeg, tf.constant(seed)).numpy()

    tf.random.set_seed(1)
    first = decode(1, 2)
    tf.random.set_seed(3)
    np.testing.assert_array_equal(decode(1, 2), first)
    np.testing.assert_array_equal(imagenet.decode_train(jpeg, [1, 2]), first)
    for other in ((1, 3), (2, 2), (2, 1)):
        assert np.abs(decode(*other).astype(int) - first).mean() > 1


def test_rounding_is_small_after_normalization():
    rounded, clipped, count = [], [], 0
    for name in photographs.NAMES:
        pixels = photographs.photograph(name, 500, 400)
        content = photographs.encode(pixels)
        result = imagenet.decode_eval(tf.constant(content)).numpy()
        part = tf.io.decode_and_crop_jpeg(content, [25, 75, 350, 350])
        exact = tf.image.resize(part, (224, 224), "bicubic").numpy()
        difference = np.abs((result - MEAN) - (exact - MEAN)) / DEVIATION
        outside = (exact < 0) | (exact > 255)
        rounded.append(difference[~outside])
        clipped.append(difference[outside])
        count += difference.size
    rounded, clipped = np.concatenate(rounded), np.concatenate(clipped)
    # Half a level, and what float32 adds.
    assert rounded.max() < 0.5 / DEVIATION.min() + 1e-4 < 0.0089
    assert rounded.mean() < 0.0045
    # The kernel overshoots at edges.
    assert len(clipped) < 0.02 * count
    assert clipped.max() < 0.5


@pytest.mark.parametrize(
    "content", [b"", b"text", b"\xff\xd8\xff" + bytes(99), "truncated"]
)
@pytest.mark.parametrize(
    "decode",
    [imagenet.decode_eval, lambda jpeg: imagenet.decode_train(jpeg, [1, 2])],
)
def test_corrupt_image_raises(content, decode):
    if content == "truncated":
        content = photographs.encode(photographs.photograph("coffee"))[:9000]
    with pytest.raises(tf.errors.InvalidArgumentError):
        decode(tf.constant(content))


def examples_of(labels, size=(40, 32)):
    """Photographs whose labels identify them."""
    names = photographs.NAMES
    contents = [
        photographs.encode(photographs.photograph(name, *size))
        for name in names
    ]
    return [(contents[label % len(names)], label) for label in labels]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A data directory with 24 training and 50 evaluation images."""
    root = tmp_path_factory.mktemp("data")
    train = examples_of(range(24))
    evaluation = examples_of(range(50))
    photographs.write_dataset(
        root,
        {
            # One file is empty.
            "train": [train[:7], train[7:12], [], train[12:]],
            "validation": [evaluation[:20], evaluation[20:21], evaluation[21:]],
            "test": [examples_of([0])],
        },
        classes=50,
    )
    return root


def make(directory, **options):
    return imagenet.TfdsImages(
        **{
            "name": "small",
            "directory": directory,
            "seed": 3,
            "batch_size": 6,
            "image_size": 16,
            **options,
        }
    )


def arrays(batch):
    return {name: value.numpy() for name, value in batch.items()}


def test_source_has_attributes_of_the_data_set(directory):
    source = make(directory)
    assert source.image_shape == (16, 16, 3)
    assert source.classes == 50
    assert source.class_names[:2] == ("0", "1")
    assert source.train_examples == 24
    # The split "validation", not "test".
    assert source.eval_examples == 50


@pytest.mark.parametrize("place", ["root", "data set", "text"])
def test_directory_may_be_that_of_the_data_set(directory, place):
    path = directory / "small" / "1.0.0" if place == "data set" else directory
    source = make(str(path) if place == "text" else path)
    batch = arrays(next(iter(source.eval(context()))))
    assert batch["image"].shape == (1000, 16, 16, 3)
    assert batch["image"].dtype == np.uint8
    assert batch["label"].dtype == np.int32
    assert batch["weight"].sum() == 50


def test_train_batches_are_whole_epochs_of_the_images(directory):
    batches = iter(make(directory).train(context(), 0))
    orders = []
    for _ in range(2):
        epoch = [arrays(next(batches)) for _ in range(4)]
        assert set(epoch[0]) == {"image", "label"}
        orders.append([label for b in epoch for label in b["label"].tolist()])
        assert sorted(orders[-1]) == list(range(24))
    assert orders[0] != orders[1]
    assert orders[0] != list(range(24))


def test_train_images_belong_to_their_labels(directory):
    source = make(directory, min_area=1.0)
    for batch in source.train(context(), 0).take(4):
        images, labels = batch["image"].numpy(), batch["label"].numpy()
        for image, label in zip(images, labels, strict=True):
            # With an area of 1, every attempt fails unless it is the image.
            content = examples_of([label])[0][0]
            expected = imagenet.decode_eval(tf.constant(content), 16).numpy()
            assert any(
                np.array_equal(image, x) for x in (expected, expected[:, ::-1])
            )


@pytest.fixture(scope="module")
def reference(directory):
    """The first ten batches of training, which are two epochs and a half."""
    return [arrays(b) for b in make(directory).train(context(), 0).take(10)]


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(step, marks=() if step in (3, 4, 5) else pytest.mark.slow)
        for step in range(9)
    ],
)
def test_resuming_at_any_step_gives_the_same_batches(
    directory, reference, step
):
    resumed = make(directory).train(context(), step).take(2)
    for expected, batch in zip(
        reference[step : step + 2], resumed, strict=True
    ):
        for name, value in arrays(batch).items():
            np.testing.assert_array_equal(value, expected[name])


def test_another_seed_gives_another_order_and_augmentation(directory):
    def images(seed):
        source = make(directory, seed=seed)
        epoch = [arrays(b) for b in source.train(context(), 0).take(4)]
        labels = np.concatenate([batch["label"] for batch in epoch])
        pixels = np.concatenate([batch["image"] for batch in epoch])
        return labels.tolist(), pixels[np.argsort(labels)]

    first, second, again = images(3), images(4), images(3)
    assert first[0] == again[0] != second[0]
    np.testing.assert_array_equal(first[1], again[1])
    equal = (first[1] == second[1]).all(axis=(1, 2, 3))
    assert not equal.any()


def test_augmentation_does_not_depend_on_the_number_of_hosts(directory):
    def epoch(hosts):
        found = {}
        for host in range(hosts):
            batches = make(directory).train(context(hosts, host), 0)
            for batch in batches.take(4):
                for image, label in zip(
                    batch["image"].numpy(), batch["label"].numpy(), strict=True
                ):
                    assert label not in found
                    found[label] = image
        return found

    one, two = epoch(1), epoch(2)
    assert set(one) == set(two) == set(range(24))
    for label, image in one.items():
        np.testing.assert_array_equal(image, two[label])


@pytest.mark.parametrize(
    ("hosts", "replicas", "batch_size"),
    [(1, 1, 1), (1, 1, 12), (1, 4, 50), (2, 1, 7), (3, 1, 12), (3, 2, 1000)],
)
def test_every_evaluation_image_counts_once(
    directory, hosts, replicas, batch_size
):
    source = make(directory, eval_batch_size=batch_size)
    images, steps = {}, set()
    for host in range(hosts):
        batches = source.eval(context(hosts, host, replicas))
        steps.add(int(batches.cardinality()))
        for batch in map(arrays, batches):
            for image, label, weight in zip(*batch.values(), strict=True):
                if weight:
                    assert label not in images
                    images[label] = image
    assert len(steps) == 1
    assert sorted(images) == list(range(50))
    for label, (content, _) in enumerate(examples_of(range(50))):
        expected = imagenet.decode_eval(tf.constant(content), 16)
        np.testing.assert_array_equal(images[label], expected)


def opened_files(source, host, steps, monkeypatch):
    """Returns the files that one of two hosts opens during some steps."""
    paths = set()
    original = imagenet.inputs.record_batches

    def read(path):
        tf.py_function(lambda p: paths.add(p.numpy()), [path], [])
        return tf.data.TFRecordDataset(path)

    with monkeypatch.context() as patch:
        patch.setattr(
            imagenet.inputs,
            "record_batches",
            functools.partial(original, read=read),
        )
        batches = source.train(context(2, host), 0)
    for _ in batches.take(steps):
        pass
    return paths


def test_only_files_of_the_host_are_opened(directory, monkeypatch):
    first, second = (
        opened_files(make(directory), host, 8, monkeypatch) for host in range(2)
    )
    assert first and second
    assert not first & second


def test_test_split_is_used_without_validation(tmp_path):
    photographs.write_dataset(
        tmp_path,
        {"train": [examples_of([0, 1])], "test": [examples_of([2, 3, 4])]},
    )
    source = make(tmp_path, batch_size=2)
    assert (source.train_examples, source.eval_examples) == (2, 3)


def test_version_other_than_the_defined_one_is_found(tmp_path):
    # TensorFlow Datasets defines a newer version.
    photographs.write_dataset(
        tmp_path,
        {"train": [examples_of([0, 1])], "test": [examples_of([2])]},
        name="imagenet2012",
        classes=1000,
    )
    source = make(tmp_path, name="imagenet2012", batch_size=2)
    assert source.classes == 1000
    assert make(tmp_path, name="imagenet2012:1.0.0").train_examples == 2
    with pytest.raises(UsageError, match="9.9.9"):
        make(tmp_path, name="imagenet2012:9.9.9")


def test_tfds_not_installed_raises(directory, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: (
            None if name == "tensorflow_datasets" else find_spec(name, *rest)
        ),
    )
    with pytest.raises(
        MissingPackageError, match="pip install tensorflow-datasets"
    ):
        make(directory)


def test_unknown_data_set_raises(tmp_path):
    with pytest.raises(UsageError) as error:
        make(tmp_path, name="no_such_set")
    for part in ("'no_such_set'", str(tmp_path), "write_images"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_data_set_that_is_not_prepared_raises(tmp_path):
    with pytest.raises(UsageError) as error:
        make(tmp_path, name="imagenet2012")
    for part in (
        f"{tmp_path}/imagenet2012",
        f"builder('imagenet2012', data_dir='{tmp_path}').download_and_prepare(",
        "ILSVRC2012_img_train.tar",
    ):
        assert part in str(error.value)


def test_missing_directory_raises(tmp_path):
    with pytest.raises(UsageError, match="absent, which does not exist"):
        make(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file, which is not a directory"):
        make(tmp_path / "file")


def test_remote_directory_that_cannot_be_read_raises_its_cause():
    with pytest.raises(UsageError, match="unknown://.*'unknown' not implem"):
        make("unknown://bucket/data")


def test_unknown_config_of_a_defined_data_set_is_named(tmp_path):
    with pytest.raises(UsageError, match="no_such_config not found"):
        make(tmp_path, name="imagenet2012/no_such_config")


def test_default_directory_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(UsageError, match="no_such_set") as error:
        make(None, name="no_such_set")
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": [1]}, "'validation' or 'test'.*the splits train"),
        ({"test": [1]}, "'train'.*the splits test"),
    ],
)
def test_missing_split_raises(tmp_path, splits, message):
    photographs.write_dataset(
        tmp_path, {name: [examples_of(x)] for name, x in splits.items()}
    )
    with pytest.raises(UsageError, match=message):
        make(tmp_path)


@pytest.mark.parametrize(
    "features",
    [
        {"image": tfds.features.Image(encoding_format="jpeg")},
        {"label": tfds.features.ClassLabel(num_classes=3)},
        {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.Scalar(np.int64),
        },
        {
            "image": tfds.features.Tensor(shape=(2,), dtype=np.uint8),
            "label": tfds.features.ClassLabel(num_classes=3),
        },
    ],
    ids=["no label", "no image", "label of no class", "image of numbers"],
)
def test_missing_features_raise(tmp_path, features):
    photographs.write_dataset(
        tmp_path, {"train": [[]], "test": [[]]}, features=features
    )
    with pytest.raises(UsageError, match='features "image".*Received: small'):
        make(tmp_path)


def test_other_file_format_raises(tmp_path):
    path = photographs.write_dataset(
        tmp_path, {"train": [examples_of([1])], "test": [examples_of([1])]}
    )
    info = path / "dataset_info.json"
    text = info.read_text()
    info.write_text(text.replace('"tfrecord"', '"array_record"'))
    with pytest.raises(
        UsageError, match="file_format='tfrecord'.*'array_record'"
    ):
        make(tmp_path)


def test_missing_file_raises(tmp_path):
    path = photographs.write_dataset(
        tmp_path, {"train": [examples_of([1])], "test": [examples_of([1])]}
    )
    next(path.glob("*train*")).unlink()
    with pytest.raises(UsageError, match="1 are missing, .*train"):
        make(tmp_path)


@pytest.mark.parametrize("file", ["features.json", "dataset_info.json"])
@pytest.mark.parametrize("content", [None, "", "{", '{"a": 1}'])
def test_damaged_description_raises(tmp_path, file, content):
    path = photographs.write_dataset(
        tmp_path, {"train": [examples_of([1])], "test": [examples_of([1])]}
    )
    (path / file).unlink()
    if content is not None:
        (path / file).write_text(content)
    for directory in (tmp_path, path):
        with pytest.raises(UsageError) as error:
            make(directory)
        assert str(tmp_path) in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("label", [-1, 10])
def test_label_beyond_the_classes_raises(tmp_path, label):
    examples = [(content, label) for content, _ in examples_of([1])]
    photographs.write_dataset(
        tmp_path, {"train": [examples], "test": [examples]}
    )
    batches = make(tmp_path, batch_size=1).train(context(), 0)
    with (
        pytest.raises(
            ReportedError, match="label must be from 0 to 9"
        ) as error,
        inputs.input_errors(),
    ):
        next(iter(batches))
    assert f"Received:] [{label}]" in str(error.value)


@pytest.fixture(scope="module")
def corrupt_directory(tmp_path_factory):
    """Twelve images, of which the last of the first file is truncated."""
    root = tmp_path_factory.mktemp("corrupt")
    examples = examples_of(range(12))
    content, label = examples[6]
    examples[6] = content[:-300], label
    files = [examples[:7], examples[7:]]
    photographs.write_dataset(
        root, {"train": files, "validation": files}, classes=12
    )
    return root


def batches_of(source, split):
    if split == "train":
        return source.train(context(), 0).take(4)
    return source.eval(context())


@pytest.mark.parametrize("split", ["train", "validation"])
def test_corrupt_image_is_named(corrupt_directory, split):
    source = make(corrupt_directory, batch_size=3, eval_batch_size=3)
    with pytest.raises(ReportedError) as error, inputs.input_errors():
        list(batches_of(source, split))
    message = str(error.value)
    file = f"small-{split}.tfrecord-00000-of-00002"
    assert str(corrupt_directory / "small" / "1.0.0" / file) in message
    assert re.search(r"\b6\b", message.replace(str(corrupt_directory), ""))
    assert "\n" not in message


@pytest.mark.parametrize("split", ["train", "validation"])
def test_skip_corrupt_gives_a_black_image_of_weight_zero(
    corrupt_directory, split
):
    source = make(
        corrupt_directory, batch_size=3, eval_batch_size=3, skip_corrupt=True
    )
    labels = []
    for batch in map(arrays, batches_of(source, split)):
        assert set(batch) == {"image", "label", "weight"}
        assert batch["image"].shape == (3, 16, 16, 3)
        kept = batch["weight"] == 1
        labels += batch["label"][kept].tolist()
        assert not batch["image"][~kept].any()
        assert not batch["weight"][~kept].any()
    assert sorted(labels) == [label for label in range(12) if label != 6]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "`image_size` must be at least 1"),
        ({"min_area": 0.0}, "`min_area` must be a fraction"),
        ({"min_area": 1.5}, "min_area=1.5"),
        ({"eval_batch_size": 0}, "`eval_batch_size` must be at least 1"),
    ],
)
def test_invalid_argument_raises(directory, options, message):
    with pytest.raises(UsageError, match=message):
        make(directory, **options)


def test_synthetic_images_are_reproducible_and_have_weights():
    def source():
        return imagenet.SyntheticImages(
            seed=1,
            batch_size=6,
            image_size=8,
            classes=5,
            train_examples=20,
            eval_examples=50,
            eval_batch_size=12,
        )

    assert source().image_shape == (8, 8, 3)
    assert source().classes == len(source().class_names) == 5
    assert (source().train_examples, source().eval_examples) == (20, 50)
    whole = [arrays(b) for b in source().train(context(), 0).take(5)]
    assert whole[0]["image"].shape == (6, 8, 8, 3)
    assert whole[0]["image"].dtype == np.uint8
    assert whole[0]["label"].dtype == np.int32
    for step in range(4):
        batch = arrays(next(iter(source().train(context(), step))))
        for name, value in batch.items():
            np.testing.assert_array_equal(value, whole[step][name])
    labels = np.concatenate([batch["label"] for batch in whole])
    assert 0 <= labels.min() < labels.max() < 5
    for hosts in (1, 3):
        weights = [
            batch["weight"].numpy().sum()
            for host in range(hosts)
            for batch in source().eval(context(hosts, host))
        ]
        assert sum(weights) == 50


@pytest.mark.parametrize(
    "name",
    [
        "classes",
        "train_examples",
        "eval_examples",
        "image_size",
        "eval_batch_size",
    ],
)
def test_synthetic_images_with_invalid_argument_raise(name):
    with pytest.raises(UsageError, match=f"`{name}` must be at least 1"):
        imagenet.SyntheticImages(seed=0, batch_size=1, **{name: 0})
