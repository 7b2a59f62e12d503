"""Writes labelled images in the format of TensorFlow Datasets."""

import importlib
import importlib.util
import io
import operator
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from sos.errors import MissingPackageError, UsageError
from sos.files import atomic_directory, storage_errors

#: An encoded image, the path of a file with one, or uint8 pixels.
Image = bytes | str | os.PathLike | np.ndarray

# Records that are held in memory while they are distributed among files.
_BUFFER_BYTES = 2**28
_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_VERSION = re.compile(r"\d+\.\d+\.\d+")


def write_images(
    directory: str | os.PathLike,
    splits: Mapping[str, Iterable[tuple[Image, int]]],
    *,
    name: str,
    class_names: Sequence[str],
    version: str = "1.0.0",
    shards: int = 1,
    quality: int = 95,
    channels: int = 3,
    description: str | None = None,
) -> Path:
    """Writes labelled images in the format of TensorFlow Datasets.

    The data set is read by `sos.datasets.imagenet.TfdsImages`,
    `tfds.load(name, data_dir=directory)` and `tfds.builder_from_directory`. Its
    files are TFRecords of examples with the features "image" and "label". The
    order of the images within a split is random, but the same every time, so
    that they may be passed class by class.

    The data set is written to a temporary directory and renamed when it is
    complete. Images are read one after another. They are held in memory up to
    256 MB or the size of one file, whichever is larger.

    Args:
        directory: The data directory, `data_dir` of TensorFlow Datasets. A
            local path.
        splits: For each split, such as "train" and "validation", pairs of an
            image and its label. An image is a JPEG or PNG file, as bytes or as
            its path, and stored unchanged; or uint8 pixels of shape [height,
            width], [height, width, 1] or [height, width, 3], which are stored
            as a JPEG. A label is an index of `class_names`.
        name: Name of the data set in lower-case letters, digits and single
            underscores. It must differ from the data sets that TensorFlow
            Datasets defines, such as "imagenet2012".
        class_names: Name of each class.
        version: Version of the data set.
        shards: Number of files in each split, at most its number of images.
            Every host of a training reads its own files, so that there should
            be several for each host.
        quality: Quality of the JPEGs of pixels, from 1 to 100.
        channels: 1 or 3, the channels that readers decode an image to by
            default.
        description: Text to store with the data.

    Returns:
        The directory of the data set, `directory/name/version`.

    Raises:
        UsageError: If an argument is invalid, the data set exists, a split has
            fewer images than `shards`, or an image or label is invalid.
        MissingPackageError: If tensorflow-datasets is not installed.
        StorageError: If an image cannot be read or the data set cannot be
            written.

    Example:
    >>> import numpy as np
    >>> from sos.datasets import write_images
    >>> pixels = np.zeros((4, 6, 32, 48, 3), np.uint8)
    >>> path = write_images(
    ...     "data",
    ...     {
    ...         "train": zip(pixels[0], [0, 1, 0, 1, 0, 1]),
    ...         "validation": zip(pixels[1], [0, 1, 0, 1, 0, 1]),
    ...     },
    ...     name="black_images",
    ...     class_names=["cat", "dog"],
    ...     shards=2,
    ... )
    >>> path.parts[-2:]
    ('black_images', '1.0.0')
    >>> sorted(file.name for file in path.glob("*train*"))
    ['black_images-train.tfrecord-00000-of-00002', \
'black_images-train.tfrecord-00001-of-00002']
    """
    _check_arguments(
        directory, splits, name, class_names, version, quality, channels
    )
    if shards < 1:
        raise UsageError(f"`shards` must be at least 1. Received: {shards}")
    tfds = import_tfds()
    if name in tfds.list_builders(with_community_datasets=False):
        raise UsageError(
            "`name` must differ from the data sets that TensorFlow Datasets "
            f"defines, which would be read in its place. Received: {name!r}"
        )
    target = Path(directory).expanduser() / name / version
    if target.exists():
        raise UsageError(
            "A data set is written once. Choose another version or directory, "
            f"or remove it. Received: {target}, which exists"
        )
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(
                shape=(None, None, channels), encoding_format="jpeg"
            ),
            "label": tfds.features.ClassLabel(names=list(class_names)),
        }
    )
    infos = []
    with (
        storage_errors(f"{target} could not be written"),
        # It flushes files to the disk, and removes what a killed process left.
        atomic_directory(target) as temporary,
    ):
        temporary.mkdir(parents=True)
        for split, images in splits.items():
            records = (
                features.serialize_example(example)
                for example in _examples(split, images, class_names, quality)
            )
            paths = [
                temporary
                / f"{name}-{split}.tfrecord-{shard:05d}-of-{shards:05d}"
                for shard in range(shards)
            ]
            lengths, size = _write_shuffled(records, paths)
            if 0 in lengths:
                raise UsageError(
                    "`shards` must be at most the number of images in each "
                    f"split. Received: {shards} shards for {sum(lengths)} "
                    f"images in the split {split!r}"
                )
            infos.append(
                tfds.core.SplitInfo(
                    name=split, shard_lengths=lengths, num_bytes=size
                )
            )
        tfds.folder_dataset.write_metadata(
            data_dir=temporary,
            features=features,
            split_infos=infos,
            version=version,
            description=description or f"{len(class_names)} classes of images.",
            check_data=False,
        )
    return target


def _examples(
    split: str,
    images: Iterable[tuple[Image, int]],
    class_names: Sequence[str],
    quality: int,
) -> Iterator[dict[str, Any]]:
    """Yields examples as TensorFlow Datasets takes them."""
    for index, (image, label) in enumerate(images):
        place = f"image {index} of the split {split!r}"
        content = _encode(image, quality, place)
        label = _label(label, len(class_names), place)
        yield {"image": io.BytesIO(content), "label": label}


def _write_shuffled(
    records: Iterable[bytes], paths: Sequence[Path]
) -> tuple[list[int], int]:
    """Writes records to files in a random order.

    Records are first distributed among temporary files, each of which fits in
    memory to be shuffled.

    Returns:
        The number of records in each file, and their total size in bytes.
    """
    generator = np.random.default_rng(0)
    pending: list[list[bytes]] = [[] for _ in paths]
    lengths = [0] * len(paths)
    turn: list[int] = []
    total = memory = 0
    for record in records:
        # In each turn every file receives one, in a random order.
        turn = turn or generator.permutation(len(paths)).tolist()
        shard = turn.pop()
        pending[shard].append(record)
        lengths[shard] += 1
        total += len(record)
        memory += len(record)
        if memory >= _BUFFER_BYTES:
            _flush(pending, paths)
            memory = 0
    _flush(pending, paths)
    for path, length in zip(paths, lengths, strict=True):
        temporary = _unshuffled(path)
        contents = _read_all(temporary) if length else []
        with tf.io.TFRecordWriter(os.fspath(path)) as writer:
            for index in generator.permutation(length):
                writer.write(contents[index])
        temporary.unlink(missing_ok=True)
    return lengths, total


def _flush(pending: Sequence[list[bytes]], paths: Sequence[Path]) -> None:
    """Appends records to the temporary files, of which one is open at a time.

    The operating system limits the number of open files.
    """
    for records, path in zip(pending, paths, strict=True):
        with _unshuffled(path).open("ab") as file:
            for record in records:
                file.write(struct.pack("<Q", len(record)) + record)
        records.clear()


def _read_all(path: Path) -> list[bytes]:
    content = path.read_bytes()
    records, begin = [], 0
    while begin < len(content):
        (length,) = struct.unpack_from("<Q", content, begin)
        begin += 8 + length
        records.append(content[begin - length : begin])
    return records


def _unshuffled(path: Path) -> Path:
    return path.with_name(f"{path.name}.unshuffled")


def _encode(image: Image, quality: int, place: str) -> bytes:
    """Returns the content of an image file."""
    place = place.capitalize()
    if isinstance(image, str | os.PathLike):
        with storage_errors(f"{place}, {os.fspath(image)}, cannot be read"):
            image = Path(image).read_bytes()
    if isinstance(image, bytes):
        if not image.startswith((b"\xff\xd8\xff", b"\x89PNG")):
            raise UsageError(
                f"{place} must be a JPEG or PNG file. Received: "
                f"{len(image)} bytes that begin with {image[:4]!r}"
            )
        return image
    pixels = np.asarray(image)
    if pixels.ndim == 2:
        pixels = pixels[..., np.newaxis]
    if (
        pixels.dtype != np.uint8
        or pixels.ndim != 3
        or pixels.shape[-1] not in (1, 3)
        or 0 in pixels.shape
    ):
        raise UsageError(
            f"{place} must be an encoded image, a path, or uint8 pixels of "
            "shape [height, width, 1 or 3]. Received: "
            f"{np.asarray(image).dtype} of shape {np.shape(image)}"
        )
    # All details of colours are kept, as there may be few pixels.
    return tf.io.encode_jpeg(
        pixels, quality=quality, chroma_downsampling=False
    ).numpy()


def _label(label: Any, classes: int, place: str) -> int:
    try:
        number = operator.index(label)
    except TypeError:
        number = -1
    if not 0 <= number < classes:
        raise UsageError(
            f"The label of {place} must be an integer "
            f"from 0 to {classes - 1}, an index of `class_names`. "
            f"Received: {label!r}"
        )
    return number


def _check_arguments(
    directory: str | os.PathLike,
    splits: Mapping[str, Any],
    name: str,
    class_names: Sequence[str],
    version: str,
    quality: int,
    channels: int,
) -> None:
    if "://" in os.fspath(directory):
        raise UsageError(
            "`directory` must be a local path. Copy the data set afterwards. "
            f"Received: {os.fspath(directory)}"
        )
    if not splits:
        raise UsageError("`splits` must have at least one. Received: none")
    for split in splits:
        if not re.fullmatch(r"\w+", split):
            raise UsageError(
                "The name of a split must consist of letters, digits and "
                f"underscores. Received: {split!r}"
            )
    if not _NAME.fullmatch(name):
        raise UsageError(
            "`name` must consist of lower-case letters, digits and single "
            f"underscores, and begin with a letter. Received: {name!r}"
        )
    if not _VERSION.fullmatch(version):
        raise UsageError(
            "`version` must be three numbers, such as '1.0.0'. "
            f"Received: {version!r}"
        )
    if isinstance(class_names, str) or not class_names:
        raise UsageError(
            "`class_names` must name at least one class. "
            f"Received: {class_names!r}"
        )
    if len(set(class_names)) < len(class_names):
        raise UsageError(
            f"`class_names` must differ. Received: {list(class_names)}"
        )
    if not 1 <= quality <= 100:
        raise UsageError(
            f"`quality` must be from 1 to 100. Received: {quality}"
        )
    if channels not in (1, 3):
        raise UsageError(f"`channels` must be 1 or 3. Received: {channels}")


def import_tfds() -> Any:
    """Imports tensorflow-datasets, which is not a dependency."""
    if importlib.util.find_spec("tensorflow_datasets") is None:
        raise MissingPackageError(
            "Data sets of TensorFlow Datasets need the package "
            "tensorflow-datasets, which is not installed: "
            "pip install tensorflow-datasets"
        )
    return importlib.import_module("tensorflow_datasets")
