"""Tiny networks of several kinds, and one big layer."""

import keras
import numpy as np
from keras import layers

from tests.support.toy_experiment import ToyExperiment

PRUNING = {
    "technique": "MagnitudePruning",
    "sparsity": 0.75,
    "end_step": 2,
    "frequency": 1,
}


def config(task, **overrides):
    """A config of one of these tasks, not resolved."""
    return {
        "task": f"{__name__}:{task}",
        "train_steps": 3,
        "sparsity": PRUNING,
        **overrides,
    }


class Residual(ToyExperiment):
    """Two residual blocks with batch normalization."""

    def build_model(self):
        inputs = keras.Input((6,))
        x = layers.Reshape((3, 2, 1))(inputs)
        x = layers.Conv2D(4, 3, padding="same", use_bias=False, name="stem")(x)
        for block in ("first", "second"):
            y = layers.BatchNormalization(name=f"{block}_norm")(x)
            y = layers.ReLU()(y)
            y = layers.Conv2D(4, 3, padding="same", name=f"{block}_conv")(y)
            x = layers.Add()([x, y])
        x = layers.GlobalAveragePooling2D()(x)
        outputs = layers.Dense(3, name="logits")(x)
        return self.sparsify(keras.Model(inputs, outputs, name="residual"))


class Transformer(ToyExperiment):
    """One block with dropout; the table gives embeddings and logits."""

    def __init__(self, config):
        super().__init__(config)
        for data in (self._train, self._eval):
            data["x"] = np.clip(data["x"] * 2 + 5, 0, 9).astype(np.int32)

    def build_model(self):
        inputs = keras.Input((6,), dtype="int32")
        table = layers.ReversibleEmbedding(10, 8, name="table")
        x = table(inputs)
        attention = layers.MultiHeadAttention(2, 4, name="attention")
        x = layers.LayerNormalization(name="norm")(x + attention(x, x))
        # Used twice.
        hidden = layers.Dense(8, activation="relu", name="hidden")
        x = layers.Dropout(0.1, name="dropout")(hidden(hidden(x)) + x)
        logits = table(layers.GlobalAveragePooling1D()(x), reverse=True)
        return self.sparsify(keras.Model(inputs, logits, name="transformer"))


class Unnamed(ToyExperiment):
    """Layers that Keras names."""

    def build_model(self):
        hidden = layers.Dense(8, activation="relu")
        model = keras.Sequential([keras.Input((6,)), hidden, layers.Dense(3)])
        return self.sparsify(model)


class Wide(ToyExperiment):
    """A layer of so many weights that their variance is known well."""

    @classmethod
    def default_config(cls):
        config = super().default_config()
        config.model = {"initializer": "glorot_uniform", "arguments": {}}
        return config

    def build_model(self):
        model = self.config.model.to_dict()
        initializer = keras.initializers.get(
            {"class_name": model["initializer"], "config": model["arguments"]}
        )
        dense = layers.Dense(300, kernel_initializer=initializer, name="wide")
        return self.sparsify(keras.Sequential([keras.Input((400,)), dense]))
