"""A small Transformer for translation, of plain Keras layers.

Layers are normalized before they are applied (pre-norm), and one table embeds
both languages and computes the logits, as in Vaswani et al. 2017
(https://arxiv.org/abs/1706.03762). It has what costs time in a step. Dropout,
label smoothing and decoding are left out.
"""

import keras
import numpy as np
import tensorflow as tf

import sos

# Number of the tokens that fill short sentences.
PADDING = 0


class Transformer(keras.Model):
    """Predicts each next token of a target sentence.

    Args:
        vocabulary: Number of tokens.
        width: Number of features of a token.
        hidden: Number of hidden units of a feed-forward layer.
        heads: Number of attention heads.
        depth: Number of encoder blocks and of decoder blocks.
        length: Number of tokens in the longest sentence.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        hidden: int,
        heads: int,
        depth: int,
        length: int,
    ) -> None:
        super().__init__(name="transformer")
        self.table = keras.layers.ReversibleEmbedding(
            vocabulary,
            width,
            embeddings_initializer=keras.initializers.RandomNormal(
                stddev=width**-0.5
            ),
            name="table",
        )
        self.encoder_blocks = [
            Block(width, hidden, heads, name=f"encoder_{i}")
            for i in range(depth)
        ]
        self.decoder_blocks = [
            Block(width, hidden, heads, decoder=True, name=f"decoder_{i}")
            for i in range(depth)
        ]
        self.encoder_norm = keras.layers.LayerNormalization(name="encoder_norm")
        self.decoder_norm = keras.layers.LayerNormalization(name="decoder_norm")
        self.positions = _positions(length, width)

    def call(self, source: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
        """Computes logits.

        Args:
            source: int32 tokens of shape [batch, source length].
            target: int32 tokens of shape [batch, target length].

        Returns:
            Logits of shape [batch, target length, vocabulary]: at each place
            those of the next token.
        """
        # True where attention may look, for all heads and places.
        visible = keras.ops.expand_dims(source != PADDING, (1, 2))
        with sos.noise_scope("source"):
            memory = self._embed(source)
        for block in self.encoder_blocks:
            memory = block(memory, visible=visible)
        memory = self.encoder_norm(memory)
        with sos.noise_scope("target"):
            x = self._embed(target)
        for block in self.decoder_blocks:
            x = block(x, memory=memory, visible=visible)
        x = self.decoder_norm(x)
        with sos.noise_scope("logits"):
            return self.table(x, reverse=True)

    def _embed(self, tokens: tf.Tensor) -> tf.Tensor:
        x = self.table(tokens) * self.positions.shape[1] ** 0.5
        return x + keras.ops.cast(self.positions[: tokens.shape[1]], x.dtype)


class Block(keras.Layer):
    """One block of the encoder or the decoder.

    Args:
        width: Number of features of a token.
        hidden: Number of hidden units of the feed-forward layer.
        heads: Number of attention heads.
        decoder: Whether tokens attend to the encoder's output as well, and of
            their own sentence only to what comes before.
        name: Name of the layer.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        heads: int,
        *,
        decoder: bool = False,
        name: str,
    ) -> None:
        super().__init__(name=name)
        layers = keras.layers
        self.decoder = decoder
        self.self_norm = layers.LayerNormalization(name=f"{name}_self_norm")
        self.self_attention = Attention(width, heads, name=f"{name}_self")
        if decoder:
            self.cross_norm = layers.LayerNormalization(
                name=f"{name}_cross_norm"
            )
            self.cross_attention = Attention(width, heads, name=f"{name}_cross")
        self.hidden_norm = layers.LayerNormalization(name=f"{name}_hidden_norm")
        self.hidden = layers.Dense(
            hidden, activation="relu", name=f"{name}_hidden"
        )
        self.contraction = layers.Dense(width, name=f"{name}_contraction")

    def call(
        self,
        x: tf.Tensor,
        memory: tf.Tensor | None = None,
        visible: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Applies the block.

        Args:
            x: Tokens of shape [batch, length, width].
            memory: The encoder's output, [batch, source length, width]; None
                in the encoder.
            visible: Which tokens of the source are not padding, boolean of
                shape [batch, 1, 1, source length].

        Returns:
            A tensor like `x`.
        """
        y = self.self_norm(x)
        if self.decoder:
            x = x + self.self_attention(y, y, causal=True)
            x = x + self.cross_attention(
                self.cross_norm(x), memory, visible=visible
            )
        else:
            x = x + self.self_attention(y, y, visible=visible)
        return x + self.contraction(self.hidden(self.hidden_norm(x)))


class Attention(keras.Layer):
    """Multi-head attention of four dense layers without biases.

    Args:
        width: Number of features of a token; a multiple of `heads`.
        heads: Number of heads.
        name: Name of the layer.
    """

    def __init__(self, width: int, heads: int, *, name: str) -> None:
        super().__init__(name=name)

        def dense(part: str) -> keras.Layer:
            return keras.layers.Dense(
                width, use_bias=False, name=f"{name}_{part}"
            )

        self.query, self.key = dense("query"), dense("key")
        self.value, self.mixture = dense("value"), dense("mixture")
        self.head_shape = (heads, width // heads)

    def call(
        self,
        x: tf.Tensor,
        memory: tf.Tensor,
        visible: tf.Tensor | None = None,
        causal: bool = False,
    ) -> tf.Tensor:
        """Attends from `x` to `memory`.

        Args:
            x: Tokens of shape [batch, length, width].
            memory: Tokens of shape [batch, memory length, width].
            visible: True where attention may look; broadcast to
                [batch, heads, length, memory length].
            causal: Whether a token attends only to itself and those before it.

        Returns:
            A tensor like `x`.
        """
        y = keras.ops.dot_product_attention(
            self._split(self.query(x)),
            self._split(self.key(memory)),
            self._split(self.value(memory)),
            mask=visible,
            is_causal=causal,
        )
        return self.mixture(keras.ops.reshape(y, keras.ops.shape(x)))

    def _split(self, x: tf.Tensor) -> tf.Tensor:
        """Splits features into heads: [batch, length, heads, features]."""
        shape = (*keras.ops.shape(x)[:-1], *self.head_shape)
        return keras.ops.reshape(x, shape)


def _positions(length: int, width: int) -> np.ndarray:
    """Returns sines and cosines of each place, float32 [length, width]."""
    rates = np.geomspace(1, 1e-4, width // 2)
    angles = np.arange(length)[:, np.newaxis] * rates
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    return waves.astype(np.float32)
