"""Networks of benchmarks, dense or with any technique, and their data."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import keras

import sos
from benchmarks.recipes import Recipe
from models import convnet
from models.transformer import PAD, Transformer

DENSE = "dense"


class Network(Protocol):
    """A network, its data and its optimizer.

    Attributes:
        size: Default size of an example, in the unit of `describe`.
        smallest_size: Smallest possible size of an example.
        batch_size: Default number of examples in a batch.
    """

    size: int
    smallest_size: int
    batch_size: int

    def build(self, size: int) -> keras.Model:
        """Builds the dense network.

        Args:
            size: Size of the examples.

        Returns:
            A built model that returns logits.
        """

    def data(
        self, batch_size: int, size: int, dtype: str = "float32"
    ) -> list[Recipe]:
        """Returns recipes of the model's inputs, and last of the labels.

        Args:
            batch_size: Number of examples.
            size: Size of the examples.
            dtype: Dtype of inputs that are floats.
        """

    def optimizer(self) -> keras.optimizers.Optimizer:
        """Returns the optimizer with which the network is usually trained."""

    def describe(self, batch_size: int, size: int) -> str:
        """Describes a batch, such as "32 images of 224x224"."""


@dataclasses.dataclass(frozen=True)
class _ImageNetwork(Network):
    """A network that classifies square images, trained by SGD with momentum.

    Attributes:
        size: Height and width of the images.
        channels: Number of channels.
        classes: Number of classes.
        make: Builds a network for a shape of images and a number of classes.
        batch_size: Default number of images in a batch.
        smallest_size: Smallest height and width that the network can take.
    """

    size: int
    channels: int
    classes: int
    make: Callable[[tuple[int, int, int], int], keras.Model]
    batch_size: int = 32
    smallest_size: int = 16

    def build(self, size: int) -> keras.Model:
        return self.make((size, size, self.channels), self.classes)

    def data(
        self, batch_size: int, size: int, dtype: str = "float32"
    ) -> list[Recipe]:
        shape = (batch_size, size, size, self.channels)
        labels = (0, self.classes)
        return [
            Recipe("images", shape, dtype, "normal", (0.0, 1.0)),
            Recipe("labels", (batch_size,), "int32", "integers", labels),
        ]

    def optimizer(self) -> keras.optimizers.Optimizer:
        return keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True)

    def describe(self, batch_size: int, size: int) -> str:
        return f"{batch_size} images of {size}x{size}"


@dataclasses.dataclass(frozen=True)
class _TranslationNetwork(Network):
    """A `Transformer`, trained by Adam.

    Without dropout, as the study trained most of its sparse Transformers. It
    would add the same to the step of every technique.

    Attributes:
        vocabulary, width, hidden_width, heads, layers: As `Transformer` takes
            them.
        size: Number of tokens in a sentence of either language.
        batch_size: Default number of pairs of sentences in a batch.
        smallest_size: Smallest number of tokens in a sentence.
    """

    vocabulary: int
    width: int = 512
    hidden_width: int = 2048
    heads: int = 8
    layers: int = 6
    size: int = 32
    batch_size: int = 64
    smallest_size: int = 1

    def build(self, size: int) -> keras.Model:
        del size  # The network takes sentences of all lengths.
        return Transformer(
            self.vocabulary,
            width=self.width,
            hidden_width=self.hidden_width,
            heads=self.heads,
            layers=self.layers,
            residual_dropout=0.0,
            attention_dropout=0.0,
            hidden_dropout=0.0,
        )

    def data(
        self, batch_size: int, size: int, dtype: str = "float32"
    ) -> list[Recipe]:
        del dtype
        # Sentences without padding. The labels need not be the targets.
        tokens = (PAD + 1, self.vocabulary)
        return [
            Recipe(name, (batch_size, size), "int32", "integers", tokens)
            for name in ("sources", "targets", "labels")
        ]

    def optimizer(self) -> keras.optimizers.Optimizer:
        return keras.optimizers.Adam(1e-3)

    def describe(self, batch_size: int, size: int) -> str:
        return f"{batch_size} pairs of sentences of {size} tokens"


def _resnet50(shape: tuple[int, int, int], classes: int) -> keras.Model:
    return keras.applications.ResNet50(
        weights=None,
        input_shape=shape,
        classes=classes,
        classifier_activation=None,
    )


def _convnet(shape: tuple[int, int, int], classes: int) -> keras.Model:
    return convnet.build(shape, classes, seed=0)


def _attention(shape: tuple[int, int, int], classes: int) -> keras.Model:
    """Attends over the rows of an image, each with its brightness as a word."""
    rows, columns, channels = shape
    images = keras.Input(shape)
    table = keras.layers.ReversibleEmbedding(classes, 32, name="table")
    brightness = keras.ops.mean(images, axis=(2, 3)) * classes
    words = keras.ops.clip(brightness, 0, classes - 1)
    x = keras.layers.Reshape((rows, columns * channels))(images)
    x = keras.layers.Dense(32, name="projection")(x)
    x = x + table(keras.ops.cast(words, "int32"))
    attention = keras.layers.MultiHeadAttention(2, 16, name="attention")
    x = keras.layers.LayerNormalization(name="norm")(x + attention(x, x))
    x = keras.layers.GlobalAveragePooling1D(name="pooling")(x)
    return keras.Model(images, table(x, reverse=True))


# "attention", "convnet" and "transformer_tiny" are for quick trials. The first
# has weights in a composite layer, and a table for look-up and matrix
# multiplication.
NETWORKS: dict[str, Network] = {
    "attention": _ImageNetwork(28, 1, 10, _attention),
    "convnet": _ImageNetwork(28, 1, 10, _convnet),
    # Images of less than 32 vanish in its strides.
    "resnet50": _ImageNetwork(224, 3, 1000, _resnet50, smallest_size=32),
    "transformer": _TranslationNetwork(
        vocabulary=8000, width=256, hidden_width=1024, heads=4, layers=2
    ),
    # That of the study, on rows as long as its packed ones.
    "transformer_base": _TranslationNetwork(
        vocabulary=33_288, size=256, batch_size=8
    ),
    "transformer_tiny": _TranslationNetwork(
        vocabulary=40,
        width=8,
        hidden_width=16,
        heads=2,
        layers=1,
        size=4,
        batch_size=2,
    ),
}


def build(
    name: str,
    technique: str = DENSE,
    hyperparameters: dict[str, Any] | None = None,
    *,
    size: int | None = None,
) -> keras.Model:
    """Builds one of `NETWORKS`.

    Args:
        name: Name of the network.
        technique: Name of a registered technique, or "dense".
        hyperparameters: Hyperparameters of any techniques. Those of other
            techniques are ignored.
        size: Size of the examples; by default that of the network.

    Returns:
        A built model that returns logits.
    """
    network = NETWORKS[name]
    model = network.build(network.size if size is None else size)
    if technique == DENSE:
        return model
    selected = sos.extend.select_hyperparameters(
        technique, hyperparameters or {}
    )
    return sos.sparsify(model, technique, copy=False, **selected)
