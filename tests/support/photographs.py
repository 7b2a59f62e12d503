"""Photographs that installed packages carry, and data sets of images."""

import functools
import importlib.resources
import io
import pathlib

import numpy as np
import tensorflow as tf
from PIL import Image

# Files within packages. None is downloaded.
FILES = {
    "astronaut": ("skimage.data", "astronaut.png"),
    "chelsea": ("skimage.data", "chelsea.png"),
    "china": ("sklearn.datasets", "images/china.jpg"),
    "coffee": ("skimage.data", "coffee.png"),
    "flower": ("sklearn.datasets", "images/flower.jpg"),
    "hubble": ("skimage.data", "hubble_deep_field.jpg"),
    "motorcycle": ("skimage.data", "motorcycle_left.png"),
    "retina": ("skimage.data", "retina.jpg"),
    "rocket": ("skimage.data", "rocket.jpg"),
    "tissue": ("skimage.data", "ihc.png"),
}
NAMES = tuple(FILES)


@functools.cache
def photograph(name, width=None, height=None):
    """Returns RGB pixels, uint8 of shape [height, width, 3]."""
    package, path = FILES[name]
    content = importlib.resources.files(package).joinpath(path).read_bytes()
    image = Image.open(io.BytesIO(content)).convert("RGB")
    if width is not None:
        image = image.resize((width, height), Image.LANCZOS)
    pixels = np.asarray(image)
    pixels.setflags(write=False)
    return pixels


def drawing(label, classes=10, size=48):
    """Returns a drawn image of a class: a coloured bar at its own angle."""
    angle = np.pi * label / classes
    y, x = np.mgrid[:size, :size] / (size - 1) - 0.5
    distance = np.abs(x * np.sin(angle) - y * np.cos(angle))
    bar = np.clip(1.0 - 6.0 * distance, 0.0, 1.0)[..., np.newaxis]
    colour = 128 + 127 * np.cos(
        2 * np.pi * (label / classes + np.arange(3) / 3)
    )
    return np.uint8(np.rint(colour * bar + 40 * (1 - bar)))


def encode(pixels, format="JPEG", mode=None, **options):
    """Returns an image file, encoded by PIL."""
    image = Image.fromarray(np.asarray(pixels))
    if mode is not None:
        image = image.convert(mode)
    if format == "JPEG":
        options = {"quality": 95, **options}
    output = io.BytesIO()
    image.save(output, format, **options)
    return output.getvalue()


def decode(content):
    """Returns RGB pixels of an image file, decoded by PIL."""
    image = Image.open(io.BytesIO(content))
    return np.asarray(image.convert("RGB"))


def write_dataset(
    directory, splits, *, name="small", classes=10, features=None
):
    """Writes a data set as TensorFlow Datasets lays it out.

    It depends on nothing of `sos`.

    Args:
        directory: The data directory.
        splits: For each split a list of files, each a list of pairs of an
            encoded image and its label. A file may be empty.
        name: Name of the data set.
        classes: Number of classes.
        features: Features instead of those of ImageNet.

    Returns:
        The directory of the data set.
    """
    import tensorflow_datasets as tfds

    path = pathlib.Path(directory) / name / "1.0.0"
    path.mkdir(parents=True)
    infos = []
    for split, files in splits.items():
        for number, examples in enumerate(files):
            file = f"{name}-{split}.tfrecord-{number:05}-of-{len(files):05}"
            with tf.io.TFRecordWriter(str(path / file)) as writer:
                for index, (content, label) in enumerate(examples):
                    record = _record(content, label, f"{number}-{index}.JPEG")
                    writer.write(record)
        infos.append(
            tfds.core.SplitInfo(
                name=split, shard_lengths=list(map(len, files)), num_bytes=1
            )
        )
    if features is None:
        # As in imagenet2012.
        features = {
            "file_name": tfds.features.Text(),
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=classes),
        }
    tfds.folder_dataset.write_metadata(
        data_dir=path,
        features=tfds.features.FeaturesDict(features),
        split_infos=infos,
        check_data=False,
    )
    return path


def _record(content, label, file_name):
    def strings(value):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))

    integers = tf.train.Int64List(value=[label])
    example = tf.train.Example(
        features=tf.train.Features(
            feature={
                "file_name": strings(file_name.encode()),
                "image": strings(content),
                "label": tf.train.Feature(int64_list=integers),
            }
        )
    )
    return example.SerializeToString()
