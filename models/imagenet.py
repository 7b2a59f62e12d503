"""Classification of ImageNet, and of other images in the same format."""

from typing import Any

import keras
import ml_collections
import tensorflow as tf

from models import resnet
from sos.datasets import imagenet
from sos.errors import UsageError
from sos.experiments.image_classification import (
    ImageClassification,
    ImageSource,
)
from sos.export import ServingModule

#: Training images of ImageNet (ILSVRC 2012).
TRAIN_EXAMPLES = 1_281_167
#: Optimizer steps in an epoch of the recipe.
_EPOCH = TRAIN_EXAMPLES / 1024

_SYNTHETIC = "synthetic"
_SYNTHETIC_EVAL_EXAMPLES = 1000


class ImageNet(ImageClassification):
    """Classifies images with a residual network.

    The recipe is that of the authors for ResNet-50 on ImageNet: 128,000 steps
    with 1,024 images each, about 102 epochs, of SGD with Nesterov momentum; a
    rate of 0.1 for 256 images, which grows over 5 epochs and drops by 10 after
    30, 60 and 80; label smoothing and an L2 penalty. The rate scales with
    `batch_size`, and its boundaries with `train_steps`.
    """

    top_k = 5
    runtime_entries = (
        "data.shuffle_buffer",
        "seed",
        "sparsity.num_examples",
        "sparsity.penalty_weight",
        "sparsity.seed",
        "sparsity.sparsity",
    )

    @property
    def layer_kinds(self) -> tuple[tuple[str, str], ...]:
        """Names and regular expressions of the kinds of layers."""
        bottleneck, _ = resnet.DEPTHS[self.config.model.depth]
        return (
            ("first convolution", r"^initial_conv/"),
            ("3x3 convolution", "_conv2/" if bottleneck else "_conv[12]/"),
            ("1x1 convolution", "_(conv[13]|projection)/"),
            ("classifier", r"^final_dense/"),
        )

    @classmethod
    def default_config(cls) -> ml_collections.ConfigDict:
        """Returns the entries of a config, with their defaults.

        - `model.depth`, `model.width`, `model.synchronized_batch_norm`: As
          `models.resnet.build` takes them.
        - `loss.l2`: Coefficient of the L2 penalty; see there. It is not
          decoupled weight decay, as `optimizer.weight_decay` is.
        - `data.name`: "imagenet2012" or another data set that
          tensorflow-datasets has prepared, or "synthetic", random images that
          need no files.
        - `data.directory`: Where it was prepared; by default where
          tensorflow-datasets does so.
        - `data.image_size`: Height and width of the images, in pixels.
        - `data.min_area`: Smallest part of an image that a random crop covers.
        - `data.skip_corrupt`: Whether images that cannot be decoded are
          replaced by black ones with a weight of 0 and counted in the log,
          instead of ending the run.
        - `data.shuffle_buffer`: Number of undecoded images that a host holds to
          draw the next one from.
        - `data.eval_batch_size`: Maximum number of images in an evaluation
          batch.
        """
        config = super().default_config()
        config.model = {
            "depth": 50,
            "width": 1.0,
            "synchronized_batch_norm": False,
        }
        config.data = {
            "name": "imagenet2012",
            "directory": ml_collections.config_dict.placeholder(str),
            "image_size": 224,
            "min_area": 0.08,
            "skip_corrupt": False,
            "shuffle_buffer": 10_000,
            "eval_batch_size": 1000,
        }
        config.loss.label_smoothing = 0.1
        config.loss.l2 = 1e-4
        config.optimizer.name = "sgd"
        config.optimizer.momentum = 0.9
        config.optimizer.nesterov = True
        config.learning_rate.schedule = "piecewise"
        config.learning_rate.base = 0.1
        config.learning_rate.base_batch_size = 256
        config.learning_rate.warmup_steps = 5 * _EPOCH
        config.learning_rate.boundaries = tuple(
            epochs * _EPOCH for epochs in (30, 60, 80)
        )
        config.learning_rate.factors = (0.1, 0.01, 0.001)
        config.learning_rate.reference_steps = 128_000
        config.batch_size = 1024
        config.train_steps = 128_000
        config.dtype_policy = "mixed_bfloat16"
        return config

    def load_source(self) -> ImageSource:
        """Returns the images selected by `config.data`."""
        options: dict[str, Any] = self.config.data.to_dict()
        name = options.pop("name")
        common = {
            "seed": self.config.seed,
            "batch_size": self.config.batch_size,
        }
        try:
            if name == _SYNTHETIC:
                return imagenet.SyntheticImages(
                    image_size=options["image_size"],
                    eval_batch_size=options["eval_batch_size"],
                    # A trial on a CPU takes seconds to evaluate them.
                    eval_examples=_SYNTHETIC_EVAL_EXAMPLES,
                    **common,
                )
            return imagenet.TfdsImages(name, **options, **common)
        except UsageError as error:
            raise UsageError(f"`config.data`: {error}") from error

    def build_network(self) -> keras.Model:
        """Returns the network that `config.model` describes."""
        try:
            return resnet.build(
                self.source.image_shape,
                self.source.classes,
                self.config.seed,
                l2=self.config.loss.l2,
                **self.config.model.to_dict(),
            )
        except UsageError as error:
            raise UsageError(f"`config.model`: {error}") from error

    def serving(self, model: keras.Model) -> tf.Module:
        """Returns a module that classifies JPEG files and arrays."""
        return ImageServing(model)


class ImageServing(ServingModule):
    """A module that classifies images, preprocessing included.

    It takes RGB images of any size, and prepares them as for evaluation: the
    central 224/256 of the shorter side, resized to the size of the network.

    Signatures, for any number of images:

    - `serving_default` takes "images", uint8 of shape [n, height, width, 3].
    - `classify_files` takes "files", strings of shape [n]: the contents of
      JPEG, PNG, BMP or GIF files.

    Both return "probabilities", float32 of shape [n, classes], and "class_ids",
    int32 of shape [n, 5]: the most probable classes, the best first; fewer if
    there are fewer classes.

    Args:
        model: A network that takes pixels in [0, 255] and returns logits, with
            square images of static size. A sparse one is stripped.

    Example:
    >>> import numpy as np
    >>> from models import imagenet, resnet
    >>> model = resnet.build((32, 32, 3), 10, 0, depth=18, width=0.25)
    >>> classify = imagenet.ImageServing(model).signatures["serving_default"]
    >>> images = np.zeros((2, 48, 40, 3), np.uint8)
    >>> classify(images=images)["class_ids"].shape
    TensorShape([2, 5])
    """

    def __init__(self, model: keras.Model) -> None:
        super().__init__(model)
        size = self.model.input_shape[1]
        classes = self.model.output_shape[-1]

        def classify(images: tf.Tensor) -> dict[str, tf.Tensor]:
            # oneDNN's batch normalization fails for no images.
            logits = tf.cond(
                tf.shape(images)[0] > 0,
                lambda: tf.cast(self(images), tf.float32),
                lambda: tf.zeros([0, classes]),
            )
            return {
                "probabilities": tf.nn.softmax(logits),
                "class_ids": tf.math.top_k(
                    logits, min(ImageNet.top_k, classes)
                ).indices,
            }

        def resized(prepare: Any, inputs: tf.Tensor) -> dict[str, tf.Tensor]:
            images = tf.map_fn(
                lambda each: prepare(each, size),
                inputs,
                fn_output_signature=tf.TensorSpec([size, size, 3], tf.uint8),
            )
            return classify(tf.cast(images, tf.float32))

        @tf.function(
            input_signature=[
                tf.TensorSpec([None, None, None, 3], tf.uint8, "images")
            ]
        )
        def classify_images(images: tf.Tensor) -> dict[str, tf.Tensor]:
            return resized(imagenet.crop_eval, images)

        @tf.function(
            input_signature=[tf.TensorSpec([None], tf.string, "files")]
        )
        def classify_files(files: tf.Tensor) -> dict[str, tf.Tensor]:
            return resized(imagenet.decode_eval, files)

        self.signatures = {
            "serving_default": classify_images,
            "classify_files": classify_files,
        }
