"""ImageNet and other image data sets of TensorFlow Datasets, for training.

`TfdsImages` reads a prepared data set of images and labels, and `decode_train`
and `decode_eval` make inputs of a network from its JPEGs, as the study did on
ImageNet (Gale, Elsen and Hooker 2019, arXiv 1902.09574). `SyntheticImages`
needs no files. All are sources of images for
`sos.experiments.image_classification`.

Differences from the authors' input:

- Resized pixels are rounded and clipped to uint8, a quarter of the bytes to the
  device. Rounding changes a value by at most 1/2, that is 0.0088 after the
  normalization of ImageNet. Bicubic interpolation overshoots at edges: about
  1 % of the values are clipped, which changes them by up to 0.34. The mean of
  the whole difference is 0.0041 (200 crops of photographs).
- Bicubic resizing has pixel centres at half integers, as in TensorFlow 2, and
  the kernel of Keys with a = -0.5. The function of TensorFlow 1 placed them at
  integers, which shifts the image, and had a = -0.75.
- Order and augmentation are functions of the seed, the epoch and the example.

JPEGs are decoded with the default of `tf.io.decode_jpeg`, a fast transform. Its
pixels are about 0.8 of 255 darker on average than those of an exact decoder.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from sos.datasets import prepared
from sos.errors import UsageError
from sos.training import inputs

# An evaluation image is the centre square of this fraction of the shorter side,
# 224/256 for whatever `image_size`.
_CENTER_NUMERATOR, _CENTER_DENOMINATOR = 7, 8

# Number of different images of `SyntheticImages`.
_POOL = 64


def decode_train(
    jpeg: tf.Tensor,
    seed: tf.Tensor,
    image_size: int = 224,
    min_area: float = 0.08,
) -> tf.Tensor:
    """Decodes a random crop of an image, resizes it, and flips half of them.

    The crop covers a fraction in [min_area, 1] of the image, and its width is
    3/4 to 4/3 of its height, which is uniform in the range that this leaves. If
    ten attempts find none that fits, as in very wide images, it is the centre
    square of 7/8 of the shorter side, as in evaluation. Only the crop is
    decoded.

    The Exif orientation is ignored, as in the study and by TensorFlow: an image
    that a viewer rotates is used as it is stored.

    Args:
        jpeg: A JPEG file, a string scalar: of colours, grey or CMYK. PNG, BMP
            and GIF files, of which the first frame is used, are decoded, too.
        seed: int32 of shape [2], which determines the crop and the flip.
        image_size: Height and width of the result.
        min_area: Smallest fraction of the image that a crop covers.

    Returns:
        RGB pixels, uint8 of shape [image_size, image_size, 3].

    Raises:
        tf.errors.InvalidArgumentError: If the file is corrupt.

    Example:
    >>> import tensorflow as tf
    >>> from sos.datasets.imagenet import decode_train
    >>> jpeg = tf.io.encode_jpeg(tf.zeros((300, 400, 3), tf.uint8))
    >>> decode_train(jpeg, seed=tf.constant([1, 2]), image_size=64).shape
    TensorShape([64, 64, 3])
    """

    def box(shape: tf.Tensor) -> tf.Tensor:
        begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
            shape,
            # The crop may be anywhere in the image.
            tf.zeros((1, 0, 4)),
            seed,
            min_object_covered=0.0,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(min_area, 1.0),
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        # After failed attempts, the box is the whole image.
        failed = tf.reduce_all(size[:2] == shape[:2])
        sampled = tf.concat([begin[:2], size[:2]], 0)
        return tf.where(failed, _center_box(shape), sampled)

    pixels = _resize(_decode_and_crop(jpeg, box), image_size)
    # Another stream than that of the crop.
    flip = tf.random.stateless_uniform((), seed + tf.constant([0, 1])) < 0.5
    # Neither `tf.cond` nor a stride of -1, which takes longer than decoding.
    pixels = tf.raw_ops.Reverse(
        tensor=pixels, dims=tf.stack([False, flip, False])
    )
    return tf.ensure_shape(pixels, (image_size, image_size, 3))


def decode_eval(jpeg: tf.Tensor, image_size: int = 224) -> tf.Tensor:
    """Decodes the centre of an image and resizes it.

    The crop is the centre square of 7/8 = 224/256 of the shorter side. The Exif
    orientation is ignored, as in `decode_train`.

    Args:
        jpeg: An image file, as in `decode_train`.
        image_size: Height and width of the result.

    Returns:
        RGB pixels, uint8 of shape [image_size, image_size, 3].

    Raises:
        tf.errors.InvalidArgumentError: If the file is corrupt.

    Example:
    >>> import tensorflow as tf
    >>> from sos.datasets.imagenet import decode_eval
    >>> jpeg = tf.io.encode_jpeg(tf.zeros((300, 400, 3), tf.uint8))
    >>> decode_eval(jpeg).shape
    TensorShape([224, 224, 3])
    """
    pixels = _resize(_decode_and_crop(jpeg, _center_box), image_size)
    return tf.ensure_shape(pixels, (image_size, image_size, 3))


def crop_eval(pixels: tf.Tensor, image_size: int = 224) -> tf.Tensor:
    """Crops the centre of a decoded image and resizes it, as `decode_eval`.

    Args:
        pixels: RGB pixels, uint8 of shape [height, width, 3].
        image_size: Height and width of the result.

    Returns:
        RGB pixels, uint8 of shape [image_size, image_size, 3].

    Example:
    >>> import tensorflow as tf
    >>> from sos.datasets.imagenet import crop_eval
    >>> crop_eval(tf.zeros((300, 400, 3), tf.uint8)).shape
    TensorShape([224, 224, 3])
    """
    top, left, height, width = tf.unstack(_center_box(tf.shape(pixels)))
    pixels = pixels[top : top + height, left : left + width]
    pixels = _resize(pixels, image_size)
    return tf.ensure_shape(pixels, (image_size, image_size, 3))


class TfdsImages:
    """Images and labels of a prepared data set of TensorFlow Datasets.

    The data set has the features "image" and "label", a split "train", and
    "validation" or else "test". `sos.datasets.write_images` writes own images
    in this format. Each host opens its own files only. Order and augmentation
    are functions of the seed, the epoch and the example; see
    `sos.training.record_batches`.

    Args:
        name: Name of the data set, for example "imagenet2012", with a version
            ("imagenet2012:5.1.0") or config ("NAME/CONFIG") if needed.
        directory: Data directory, `data_dir` of TensorFlow Datasets, which may
            be remote (`gs://`); by default its own, which the environment
            variable `TFDS_DATA_DIR` sets. It may also be the directory of the
            data set itself, which has a file dataset_info.json. Then `name` is
            not used.
        seed: Seed of order and augmentation.
        batch_size: Number of training examples in one optimizer step.
        image_size: Height and width of the images.
        min_area: Smallest fraction of an image that a training crop covers.
        eval_batch_size: Maximum number of examples in an evaluation batch. It
            is lowered to a multiple of the number of replicas.
        skip_corrupt: Whether an image that cannot be decoded, or whose label is
            beyond the classes, is replaced by a black one of weight 0, with a
            warning, instead of raising an error. Training batches then have
            "weight".
        shuffle_buffer: Number of undecoded training images that are shuffled
            together. A host holds up to twice as many; those of ImageNet have
            110 kB each. The process may take five times their size, as glibc's
            allocator fragments memory.

    Attributes:
        image_shape: (image_size, image_size, 3).
        classes: Number of classes.
        class_names: Names of the classes.
        train_examples: Number of training examples.
        eval_examples: Number of evaluation examples.

    Raises:
        UsageError: If an argument is invalid; or if the data set is unknown or
            not prepared, lacks a split or feature, or has another file format
            than TFRecord.
        MissingPackageError: If tensorflow-datasets is not installed.

    Example:
    >>> import numpy as np, tensorflow as tf
    >>> from sos.datasets import imagenet, write_images
    >>> images = [(np.zeros((30, 40, 3), np.uint8), label) for label in [0, 1]]
    >>> path = write_images(
    ...     "data",
    ...     {"train": images, "validation": images},
    ...     name="two_images",
    ...     class_names=["cat", "dog"],
    ... )
    >>> source = imagenet.TfdsImages(
    ...     "two_images", directory="data", seed=0, batch_size=2, image_size=32
    ... )
    >>> source.class_names, source.train_examples
    (('cat', 'dog'), 2)
    >>> batch = next(iter(source.train(tf.distribute.InputContext(), step=0)))
    >>> batch["image"].shape, sorted(batch["label"].numpy().tolist())
    (TensorShape([2, 32, 32, 3]), [0, 1])
    """

    def __init__(
        self,
        name: str = "imagenet2012",
        *,
        directory: str | os.PathLike | None = None,
        seed: int,
        batch_size: int,
        image_size: int = 224,
        min_area: float = 0.08,
        eval_batch_size: int = 1000,
        skip_corrupt: bool = False,
        shuffle_buffer: int = 10_000,
    ) -> None:
        _check_positive(image_size=image_size, eval_batch_size=eval_batch_size)
        if not 0 < min_area <= 1:
            raise UsageError(
                "`min_area` must be a fraction of the image, above 0 and at "
                f"most 1. Received: min_area={min_area}"
            )
        info = prepared.find(
            name, directory, how_to_prepare=_how_to_prepare
        ).info
        label = _check_features(info)
        self.image_shape = (image_size, image_size, 3)
        self.classes = label.num_classes
        self.class_names = tuple(label.names)
        self._train = _shards(info, "train")
        self._eval = _shards(info, "validation", "test")
        self.train_examples = sum(shard.examples for shard in self._train)
        self.eval_examples = sum(shard.examples for shard in self._eval)
        self._seed = seed
        self._batch_size = batch_size
        self._image_size = image_size
        self._min_area = min_area
        self._eval_batch_size = eval_batch_size
        self._shuffle_buffer = shuffle_buffer
        self._skip_corrupt = skip_corrupt

    def train(
        self, context: tf.distribute.InputContext, step: int
    ) -> tf.data.Dataset:
        """Returns training batches.

        Args:
            context: The share of the data that this host reads.
            step: Number of completed optimizer steps.

        Returns:
            Infinite batches with "image", uint8 of shape [batch, *image_shape],
            and "label", int32 of shape [batch]; and "weight", float32 of shape
            [batch], with `skip_corrupt`.
        """

        def decode(record: tf.Tensor, seed: tf.Tensor) -> dict[str, tf.Tensor]:
            jpeg, label = self._parse(record)
            image = decode_train(jpeg, seed, self._image_size, self._min_area)
            return {"image": image, "label": label}

        return inputs.record_batches(
            self._train,
            decode,
            seed=self._seed,
            batch_size=self._batch_size,
            step=step,
            context=context,
            shuffle_buffer=self._shuffle_buffer,
            skip_corrupt=self._skip_corrupt,
        )

    def eval(self, context: tf.distribute.InputContext) -> tf.data.Dataset:
        """Returns evaluation batches with every example once.

        Args:
            context: The share of the data that this host reads.

        Returns:
            Batches with "image" and "label" as in training, and "weight",
            float32 of shape [batch], which is 0 for padding.
        """

        def decode(record: tf.Tensor) -> dict[str, tf.Tensor]:
            jpeg, label = self._parse(record)
            return {
                "image": decode_eval(jpeg, self._image_size),
                "label": label,
            }

        return inputs.record_eval_batches(
            self._eval,
            decode,
            batch_size=inputs.whole_batch(self._eval_batch_size, context),
            context=context,
            skip_corrupt=self._skip_corrupt,
        )

    def _parse(self, record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the encoded image and the label of a record."""
        example = tf.io.parse_single_example(
            record,
            {
                "image": tf.io.FixedLenFeature((), tf.string),
                "label": tf.io.FixedLenFeature((), tf.int64),
            },
        )
        label = tf.cast(example["label"], tf.int32)
        tf.debugging.Assert(
            (label >= 0) & (label < self.classes),
            [f"A label must be from 0 to {self.classes - 1}. Received:", label],
        )
        return example["image"], label


class SyntheticImages:
    """Random images and labels, for trials without files.

    There are 64 different images, made once from the seed. Labels are
    independent of them, so that nothing can be learned.

    Args:
        seed: Seed of images, labels and order.
        batch_size: Number of training examples in one optimizer step.
        image_size: Height and width of the images.
        classes: Number of classes.
        train_examples: Number of training examples.
        eval_examples: Number of evaluation examples.
        eval_batch_size: Maximum number of examples in an evaluation batch. It
            is lowered to a multiple of the number of replicas.

    Attributes:
        image_shape: (image_size, image_size, 3).
        classes: Number of classes.
        class_names: Their numbers, as strings.
        train_examples: Number of training examples.
        eval_examples: Number of evaluation examples.

    Raises:
        UsageError: If `image_size` or a number is below 1.

    Example:
    >>> import tensorflow as tf
    >>> from sos.datasets.imagenet import SyntheticImages
    >>> source = SyntheticImages(seed=0, batch_size=4, image_size=32)
    >>> batch = next(iter(source.train(tf.distribute.InputContext(), step=0)))
    >>> batch["image"].shape, batch["label"].dtype
    (TensorShape([4, 32, 32, 3]), tf.int32)
    """

    def __init__(
        self,
        *,
        seed: int,
        batch_size: int,
        image_size: int = 224,
        classes: int = 1000,
        train_examples: int = 1_281_167,
        eval_examples: int = 50_000,
        eval_batch_size: int = 1000,
    ) -> None:
        _check_positive(
            image_size=image_size,
            classes=classes,
            train_examples=train_examples,
            eval_examples=eval_examples,
            eval_batch_size=eval_batch_size,
        )
        self.image_shape = (image_size, image_size, 3)
        self.classes = classes
        self.class_names = tuple(str(label) for label in range(classes))
        self.train_examples = train_examples
        self.eval_examples = eval_examples
        self._seed = seed
        self._batch_size = batch_size
        self._eval_batch_size = eval_batch_size

    @functools.cached_property
    def _pool(self) -> np.ndarray:
        """The images, uint8 of shape [64, *image_shape]."""
        # No tensor: it may be made while a function is traced.
        return np.random.default_rng(self._seed).integers(
            0, 256, (_POOL, *self.image_shape), np.uint8
        )

    def train(
        self, context: tf.distribute.InputContext, step: int
    ) -> tf.data.Dataset:
        """Returns training batches, as `TfdsImages.train`."""
        return inputs.array_batches(
            self._examples(self.train_examples, 1),
            seed=self._seed,
            batch_size=self._batch_size,
            step=step,
            context=context,
        ).map(self._with_image)

    def eval(self, context: tf.distribute.InputContext) -> tf.data.Dataset:
        """Returns evaluation batches, as `TfdsImages.eval`."""
        return inputs.array_eval_batches(
            self._examples(self.eval_examples, 2),
            batch_size=inputs.whole_batch(self._eval_batch_size, context),
            context=context,
        ).map(self._with_image)

    def _examples(self, count: int, split: int) -> dict[str, np.ndarray]:
        generator = np.random.default_rng((self._seed, split))
        return {
            "image": np.arange(count, dtype=np.int32) % _POOL,
            "label": generator.integers(0, self.classes, count, np.int32),
        }

    def _with_image(self, batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return {**batch, "image": tf.gather(self._pool, batch["image"])}


def _center_box(shape: tf.Tensor) -> tf.Tensor:
    """Returns the centre square: its begin and size, int32 of shape [4]."""
    height_and_width = shape[:2]
    side = tf.reduce_min(height_and_width)
    side = side * _CENTER_NUMERATOR // _CENTER_DENOMINATOR
    size = tf.fill([2], tf.maximum(side, 1))
    return tf.concat([(height_and_width - size + 1) // 2, size], 0)


def _decode_and_crop(
    jpeg: tf.Tensor, box: Callable[[tf.Tensor], tf.Tensor]
) -> tf.Tensor:
    """Decodes a part of an image.

    Args:
        jpeg: An image file, a string scalar.
        box: Maps the shape of the image, int32 of shape [3], to the top, left,
            height and width of the part, int32 of shape [4].

    Returns:
        RGB pixels, uint8 of shape [height, width, 3].
    """

    def decode_part() -> tf.Tensor:
        shape = tf.io.extract_jpeg_shape(jpeg)
        return tf.io.decode_and_crop_jpeg(jpeg, box(shape), channels=3)

    def decode_whole() -> tf.Tensor:
        pixels = tf.io.decode_image(jpeg, channels=3, expand_animations=False)
        pixels = tf.ensure_shape(pixels, (None, None, 3))
        top, left, height, width = tf.unstack(box(tf.shape(pixels)))
        return pixels[top : top + height, left : left + width]

    return tf.cond(tf.io.is_jpeg(jpeg), decode_part, decode_whole)


def _resize(pixels: tf.Tensor, size: int) -> tf.Tensor:
    """Resizes uint8 pixels, and rounds and clips them to uint8 again."""
    pixels = tf.image.resize(pixels[tf.newaxis], (size, size), "bicubic")[0]
    # The kernel overshoots at edges. The cast truncates.
    pixels = tf.clip_by_value(pixels, 0.0, 255.0) + 0.5
    return tf.cast(pixels, tf.uint8)


def _check_features(info: Any) -> Any:
    """Checks features and file format; returns the feature "label"."""
    features = dict(info.features) if hasattr(info.features, "keys") else {}
    image, label = features.get("image"), features.get("label")
    if getattr(image, "encoding_format", None) is None or not hasattr(
        label, "num_classes"
    ):
        raise UsageError(
            'The data set must have the features "image", an encoded image, '
            'and "label", a class. Received: '
            f"{info.full_name} with {features or info.features!r}"
        )
    file_format = getattr(info.file_format, "value", "tfrecord")
    if file_format != "tfrecord":
        raise UsageError(
            "The files of the data set must be TFRecords. Prepare it again "
            "with file_format='tfrecord'. Received: "
            f"{info.full_name} in {info.data_dir} with files of the format "
            f"{file_format!r}"
        )
    return label


def _how_to_prepare(name: str, directory: str) -> str:
    text = prepared.how_to_prepare(name, directory)
    if name.startswith("imagenet2012"):
        text += (
            ", after downloading ILSVRC2012_img_train.tar and "
            "ILSVRC2012_img_val.tar from image-net.org to "
            f"{os.path.join(directory, 'downloads', 'manual')}"
        )
    return (
        f"{text}; write own images with `sos.datasets.write_images`; or choose "
        "another directory"
    )


def _shards(info: Any, *names: str) -> list[inputs.Shard]:
    """Returns the files of the first of some splits."""
    for name in names:
        if name in info.splits:
            split = info.splits[name]
            return inputs.list_shards(
                split.filepaths, counts=split.shard_lengths
            )
    raise UsageError(
        f"The data set {info.full_name} in {info.data_dir} must have a split "
        f"{' or '.join(map(repr, names))}. Received: the splits "
        f"{', '.join(sorted(info.splits)) or 'none'}"
    )


def _check_positive(**arguments: int) -> None:
    for name, value in arguments.items():
        if value < 1:
            raise UsageError(
                f"`{name}` must be at least 1. Received: {name}={value}"
            )
