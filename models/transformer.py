"""The Transformer for translation, as the authors trained it.

The "base" network of Vaswani et al. 2017 (arXiv 1706.03762) as Tensor2Tensor
has it: layers are normalized before they are applied instead of afterwards, and
one table embeds both languages and computes the logits.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

import sos
from sos.datasets.subwords import PAD
from sos.errors import UsageError

#: Periods of the sines of positions, over 2 pi, are between these.
MIN_TIMESCALE, MAX_TIMESCALE = 1.0, 1e4
NORM_EPSILON = 1e-6

# A tensor of Keras's backend.
Tensor = Any
#: Keys and values of every decoder block, which source tokens are visible, and
#: the transposed table.
Cache = Mapping[str, Any]


@keras.saving.register_keras_serializable(package="models")
class Transformer(keras.Model):
    """Predicts each token of a sentence from those before and a source.

    Encoder and decoder are stacks of blocks. A block has self-attention, in the
    decoder attention to the encoder's output, and a feed-forward network of two
    dense layers with ReLU in between. Before each of these is a layer
    normalization, after it dropout and the addition of its input. At the end of
    each stack is another layer normalization. Attention has no biases.

    Embeddings are multiplied by sqrt(width). Sines and cosines of the position
    are added to them, and to the source's a vector for the target language, of
    which there is one here: the others of Tensor2Tensor's table are counted
    but not used.

    With the default sizes and 33,288 tokens it has 61,163,520 weights, of which
    `sos.sparsify` makes 61,083,648 in 97 tensors sparse.

    All variables exist as soon as the model does. Their paths are
    "embedding/embeddings", "target_space/bias",
    "encoder_0/self_attention/query/kernel" (or `key`, `value`, `output`),
    "decoder_0/cross_attention/query/kernel",
    "encoder_0/feed_forward/expansion/kernel" (or `contraction`), those of their
    biases and of the layer normalizations, after the name of the model. With
    split heads, "query_0", "query_1" and so on replace "query"; the same goes
    for "key" and "value".

    Args:
        vocabulary_size: Number of tokens, with the padding token 0.
        width: Number of features of a token; a multiple of `heads`.
        hidden_width: Number of hidden units of a feed-forward network.
        heads: Number of attention heads.
        layers: Number of blocks of the encoder, and of the decoder.
        residual_dropout: Dropout rate of the embeddings, and of what each
            attention and feed-forward network adds.
        attention_dropout: Dropout rate of the attention weights.
        hidden_dropout: Dropout rate of the hidden units.
        split_heads: Whether queries, keys and values have one weight for each
            head, so that masks are ranked by head. They compute the same.
        target_spaces: Number of vectors for target languages, of which the
            first is used; 0 for none.
        seed: Seed of the initial weights and of dropout.
        name: Name of the model.
        **kwargs: Further arguments of `keras.Model`, such as `dtype`.

    Raises:
        UsageError: If a size or rate is out of range.

    Example:
    >>> import numpy as np
    >>> from models import transformer
    >>> model = transformer.Transformer(
    ...     50, width=8, hidden_width=16, heads=2, layers=1
    ... )
    >>> source = np.array([[7, 8, 9, 1], [5, 6, 1, 0]])
    >>> target = np.array([[17, 18, 1], [15, 1, 0]])
    >>> model(source, target).shape
    TensorShape([2, 3, 50])
    """

    def __init__(
        self,
        vocabulary_size: int,
        *,
        width: int = 512,
        hidden_width: int = 2048,
        heads: int = 8,
        layers: int = 6,
        residual_dropout: float = 0.1,
        attention_dropout: float = 0.1,
        hidden_dropout: float = 0.1,
        split_heads: bool = False,
        target_spaces: int = 32,
        seed: int = 0,
        name: str = "transformer",
        **kwargs: Any,
    ) -> None:
        super().__init__(name=name, **kwargs)
        self._arguments = {
            "vocabulary_size": vocabulary_size,
            "width": width,
            "hidden_width": hidden_width,
            "heads": heads,
            "layers": layers,
            "residual_dropout": residual_dropout,
            "attention_dropout": attention_dropout,
            "hidden_dropout": hidden_dropout,
            "split_heads": split_heads,
            "target_spaces": target_spaces,
            "seed": seed,
        }
        _check(self._arguments)
        self.vocabulary_size = vocabulary_size
        self.width = width
        # Layers have seeds of their own, which do not depend on the options.
        seeds = iter(_seeds(seed, 2 * layers + 4))
        self.embedding = keras.layers.ReversibleEmbedding(
            vocabulary_size,
            width,
            embeddings_initializer=keras.initializers.RandomNormal(
                stddev=width**-0.5, seed=next(seeds)
            ),
            # bfloat16 would keep 8 bits of a logit.
            reverse_dtype=self._logits_dtype(),
            dtype=self.dtype_policy,
            name="embedding",
        )
        space_seed = next(seeds)
        self.target_space = None
        if target_spaces:
            self.target_space = _TargetSpace(
                target_spaces,
                seed=space_seed,
                dtype=self.dtype_policy,
                name="target_space",
            )

        def stack(part: str) -> list[_Block]:
            return [
                _Block(
                    width,
                    hidden_width,
                    heads,
                    decoder=part == "decoder",
                    residual_dropout=residual_dropout,
                    attention_dropout=attention_dropout,
                    hidden_dropout=hidden_dropout,
                    split_heads=split_heads,
                    seed=next(seeds),
                    dtype=self.dtype_policy,
                    name=f"{part}_{i}",
                )
                for i in range(layers)
            ]

        self.source_dropout = keras.layers.Dropout(
            residual_dropout,
            seed=next(seeds),
            dtype=self.dtype_policy,
            name="source_dropout",
        )
        self.target_dropout = keras.layers.Dropout(
            residual_dropout,
            seed=next(seeds),
            dtype=self.dtype_policy,
            name="target_dropout",
        )
        self.encoder = stack("encoder")
        self.decoder = stack("decoder")
        self.encoder_norm = _norm("encoder_norm", self.dtype_policy)
        self.decoder_norm = _norm("decoder_norm", self.dtype_policy)
        self.build()

    def build(self, input_shape: Any = None) -> None:
        """Creates all variables, once."""
        del input_shape  # Weights have the same shapes for all inputs.
        if self.built:
            return
        tokens = (None, None)
        features = (None, None, self.width)
        self.embedding.build(tokens)
        for layer in (
            *([] if self.target_space is None else [self.target_space]),
            *self.encoder,
            self.encoder_norm,
            *self.decoder,
            self.decoder_norm,
        ):
            layer.build(features)

    def call(
        self,
        source: Tensor,
        target: Tensor,
        source_segments: Tensor | None = None,
        target_segments: Tensor | None = None,
        training: bool = False,
    ) -> Tensor:
        """Computes the logits of the tokens of `target`.

        Several pairs of sentences fit in one row: segments number them, and
        tokens see those of their own pair only.

        Args:
            source: Tokens, int32 of shape [batch, source length], with `PAD` at
                the end.
            target: Tokens of the translations, int32 of shape [batch, target
                length], with `PAD` at the end. Logits at a place depend on the
                tokens before it.
            source_segments: Number of the pair of each source token, int32 like
                `source`: 1, 2, and so on, and 0 for padding. Without segments
                each row is one pair.
            target_segments: The same for `target`.
            training: Whether dropout, and the noise of techniques, is applied.

        Returns:
            Logits of shape [batch, target length, vocabulary size], of float32
            at least: those at [:, i] predict `target[:, i]`.

        Raises:
            UsageError: If only one of the segments is given.
        """
        encoded = self.encode(source, source_segments, training=training)
        return self.decode(
            target,
            encoded,
            source,
            source_segments,
            target_segments,
            training=training,
        )

    def encode(
        self,
        source: Tensor,
        source_segments: Tensor | None = None,
        training: bool = False,
    ) -> Tensor:
        """Runs the encoder.

        Args:
            source: As for `call`.
            source_segments: As for `call`.
            training: As for `call`.

        Returns:
            Features of shape [batch, source length, width].
        """
        x = self._embed(source, "source", training)
        if self.target_space is not None:
            x = self.target_space(x)
        x = x + self._positions(source, source_segments)
        x = self.source_dropout(x, training=training)
        if source_segments is None:
            visible = ops.expand_dims(ops.not_equal(source, PAD), 1)
        else:
            visible = _same(source_segments, source_segments)
        for block in self.encoder:
            x = block(x, visible, training=training)
        return self.encoder_norm(x)

    def decode(
        self,
        target: Tensor,
        encoded: Tensor,
        source: Tensor,
        source_segments: Tensor | None = None,
        target_segments: Tensor | None = None,
        training: bool = False,
    ) -> Tensor:
        """Runs the decoder for all places of the target at once.

        Args:
            target: As for `call`.
            encoded: Result of `encode`.
            source: As for `call`.
            source_segments: As for `call`.
            target_segments: As for `call`.
            training: As for `call`.

        Returns:
            Logits as `call`.

        Raises:
            UsageError: If only one of the segments is given.
        """
        if (source_segments is None) != (target_segments is None):
            raise UsageError(
                "`source_segments` and `target_segments` go together: give "
                "both or neither. Received: "
                f"source_segments={source_segments!r}, "
                f"target_segments={target_segments!r}"
            )
        x = self._embed(target, "target", training)
        # A place sees the token before it, the first one zeros.
        x = ops.pad(x[:, :-1], [[0, 0], [1, 0], [0, 0]])
        length = ops.shape(target)[1]
        visible = ops.tril(ops.ones((1, length, length), "bool"))
        if target_segments is None:
            # No token of the target sees padding, which comes after it.
            visible_source = ops.expand_dims(ops.not_equal(source, PAD), 1)
        else:
            # So does the first one of each pair, as in `step`. Tensor2Tensor
            # shows it the end of the pair before.
            continues = ops.equal(
                target_segments[:, 1:], target_segments[:, :-1]
            )
            continues = ops.pad(ops.cast(continues, x.dtype), [[0, 0], [1, 0]])
            x = x * ops.expand_dims(continues, -1)
            same = _same(target_segments, target_segments)
            visible = ops.logical_and(visible, same)
            visible_source = _same(target_segments, source_segments)
        x = x + self._positions(target, target_segments)
        x = self.target_dropout(x, training=training)
        for block in self.decoder:
            x = block(x, visible, encoded, visible_source, training=training)
        with sos.noise_scope("logits"):
            return self.embedding(
                self.decoder_norm(x), reverse=True, training=training
            )

    def make_cache(
        self,
        encoded: Tensor,
        source: Tensor,
        length: Tensor | int,
        beam: int,
    ) -> Cache:
        """Prepares `step` for sources.

        Args:
            encoded: Result of `encode`, without segments.
            source: Tokens, as for `encode`.
            length: Most tokens of a translation, an integer or int32 scalar.
            beam: Number of hypotheses of each sentence.

        Returns:
            A nested structure of tensors.
        """
        # The layer itself, as it may be sparse.
        table = self.embedding(ops.arange(self.vocabulary_size))
        return {
            # A product with few rows takes half as long if the table has been
            # transposed before.
            "table": ops.transpose(
                ops.cast(table, self._logits_dtype() or table.dtype)
            ),
            "visible": ops.not_equal(source, PAD),
            "blocks": [
                block.make_cache(encoded, length, beam)
                for block in self.decoder
            ],
        }

    def step(
        self,
        tokens: Tensor,
        index: Tensor | int,
        cache: Cache,
        ancestors: Tensor,
    ) -> tuple[Tensor, Cache]:
        """Runs the decoder for one place, with what the cache has of others.

        If one hypothesis of a sentence is NaN, all of them become NaN.

        Args:
            tokens: The token of each hypothesis before this place, int32 of
                shape [batch, beam] for the `beam` of the cache; `PAD` at the
                first place.
            index: The place, an integer or int32 scalar less than the length of
                the cache. Call it for 0, 1, and so on.
            cache: Result of `make_cache` or the last `step`.
            ancestors: The ranks that hypotheses had at other places, int32 of
                shape [batch, beam, length], as for `beam_search.beam_search`.
                Zeros for a beam of 1.

        Returns:
            Logits of this place, of shape [batch, beam, vocabulary size] and
            dtype as `call`, and the new cache.
        """
        x = self._embed(tokens, "target", training=False)
        position = ops.cast(ops.reshape(index, (1, 1)), "float32")
        x = x + ops.cast(timing_signal(position, self.width), x.dtype)
        # Places that other hypotheses wrote, or nobody yet, are masked.
        batch, beam, length = ops.shape(ancestors)
        ranks = ops.arange(beam, dtype="int32")
        is_ancestor = ops.equal(ops.expand_dims(ancestors, -1), ranks)
        is_written = ops.arange(length, dtype="int32") <= index
        visible = ops.logical_and(is_ancestor, ops.expand_dims(is_written, -1))
        visible = ops.reshape(visible, (batch, beam, length * beam))
        blocks = []
        for block, block_cache in zip(
            self.decoder, cache["blocks"], strict=True
        ):
            x, block_cache = block.step(
                x, index, block_cache, visible, cache["visible"]
            )
            blocks.append(block_cache)
        table = cache["table"]
        logits = ops.matmul(ops.cast(self.decoder_norm(x), table.dtype), table)
        return logits, {**cache, "blocks": blocks}

    def _embed(self, tokens: Tensor, label: str, training: bool) -> Tensor:
        with sos.noise_scope(label):
            x = self.embedding(tokens, training=training)
        scale = ops.cast(ops.not_equal(tokens, PAD), x.dtype) * self.width**0.5
        return x * ops.expand_dims(scale, -1)

    def _positions(self, tokens: Tensor, segments: Tensor | None) -> Tensor:
        """Returns the signal of positions, which begin anew in each segment."""
        length = ops.shape(tokens)[1]
        if segments is None:
            positions = ops.expand_dims(ops.arange(length, dtype="float32"), 0)
        else:
            # The number of tokens before in the same segment.
            before = ops.tril(ops.ones((1, length, length), "bool"), -1)
            before = ops.logical_and(before, _same(segments, segments))
            positions = ops.sum(ops.cast(before, "float32"), -1)
        return ops.cast(
            timing_signal(positions, self.width), self.compute_dtype
        )

    def _logits_dtype(self) -> str | None:
        low = keras.backend.standardize_dtype(self.compute_dtype) in (
            "bfloat16",
            "float16",
        )
        return "float32" if low else None

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {**super().get_config(), **self._arguments}


class _TargetSpace(keras.layers.Layer):
    """Adds a vector for the language into which is translated.

    Args:
        spaces: Number of vectors.
        seed: Seed of the initial vectors.
        **kwargs: Arguments of the layer.
    """

    def __init__(self, spaces: int, *, seed: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.spaces = spaces
        self.seed = seed

    def build(self, input_shape: Any) -> None:
        # The name keeps it dense: it is added, not multiplied.
        self.bias = self.add_weight(
            shape=(self.spaces, input_shape[-1]),
            initializer=keras.initializers.GlorotUniform(seed=self.seed),
            name="bias",
        )

    def call(self, x: Tensor) -> Tensor:
        return x + ops.cast(self.bias[0], x.dtype)


class _Block(keras.layers.Layer):
    """One block of the encoder or the decoder.

    Args:
        width, hidden_width, heads: As for `Transformer`.
        decoder: Whether it attends to the encoder's output, too.
        residual_dropout, attention_dropout, hidden_dropout: As for
            `Transformer`.
        split_heads: As for `Transformer`.
        seed: Seed of the block.
        **kwargs: Arguments of the layer.
    """

    def __init__(
        self,
        width: int,
        hidden_width: int,
        heads: int,
        *,
        decoder: bool,
        residual_dropout: float,
        attention_dropout: float,
        hidden_dropout: float,
        split_heads: bool,
        seed: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        policy = self.dtype_policy
        self_seed, cross_seed, hidden_seed, *seeds = _seeds(seed, 6)

        def attention(name: str, seed: int) -> _Attention:
            return _Attention(
                width,
                heads,
                dropout=attention_dropout,
                split_heads=split_heads,
                seed=seed,
                dtype=policy,
                name=name,
            )

        def dropout(name: str, seed: int) -> keras.layers.Layer:
            return keras.layers.Dropout(
                residual_dropout, seed=seed, dtype=policy, name=name
            )

        self.self_norm = _norm("self_norm", policy)
        self.self_attention = attention("self_attention", self_seed)
        self.self_dropout = dropout("self_dropout", seeds[0])
        self.cross_attention = None
        if decoder:
            self.cross_norm = _norm("cross_norm", policy)
            self.cross_attention = attention("cross_attention", cross_seed)
            self.cross_dropout = dropout("cross_dropout", seeds[1])
        self.hidden_norm = _norm("hidden_norm", policy)
        self.feed_forward = _FeedForward(
            width,
            hidden_width,
            dropout=hidden_dropout,
            seed=hidden_seed,
            dtype=policy,
            name="feed_forward",
        )
        self.hidden_dropout = dropout("hidden_dropout", seeds[2])

    def build(self, input_shape: Any) -> None:
        self.self_norm.build(input_shape)
        self.self_attention.build(input_shape)
        if self.cross_attention is not None:
            self.cross_norm.build(input_shape)
            self.cross_attention.build(input_shape)
        self.hidden_norm.build(input_shape)
        self.feed_forward.build(input_shape)

    def call(
        self,
        x: Tensor,
        visible: Tensor,
        memory: Tensor | None = None,
        visible_memory: Tensor | None = None,
        training: bool = False,
    ) -> Tensor:
        """Applies the block.

        Args:
            x: Features of shape [batch, length, width].
            visible: Whether a token, axis 1, sees another, axis 2; boolean,
                broadcast to [batch, length, length].
            memory: The encoder's output, [batch, source length, width].
            visible_memory: Like `visible`, for the source tokens.
            training: Whether dropout is applied.

        Returns:
            A tensor like `x`.
        """
        y = self.self_norm(x)
        y = self.self_attention(y, y, visible, training=training)
        x = x + self.self_dropout(y, training=training)
        if self.cross_attention is not None:
            y = self.cross_norm(x)
            y = self.cross_attention(
                y, memory, visible_memory, training=training
            )
            x = x + self.cross_dropout(y, training=training)
        y = self.feed_forward(self.hidden_norm(x), training=training)
        return x + self.hidden_dropout(y, training=training)

    def make_cache(
        self, memory: Tensor, length: Tensor | int, beam: int
    ) -> dict[str, Tensor]:
        """Computes keys and values of the source, and makes room for others."""
        keys, values = self.cross_attention.keys_values(memory)
        batch, heads, _, depth = ops.shape(keys)
        shape = (batch, heads, length, beam, depth)
        return {
            "keys": ops.zeros(shape, keys.dtype),
            "values": ops.zeros(shape, values.dtype),
            "memory_keys": keys,
            "memory_values": values,
        }

    def step(
        self,
        x: Tensor,
        index: Tensor | int,
        cache: dict[str, Tensor],
        visible: Tensor,
        visible_memory: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Applies the block at one place.

        Args:
            x: Features of shape [batch, beam, width].
            index: The place.
            cache: Result of `make_cache` or the last `step`.
            visible: Whether a hypothesis, axis 1, sees what was written at
                `place * beam + rank`, axis 2; boolean of shape [batch, beam,
                length * beam].
            visible_memory: Whether source tokens are visible, boolean of shape
                [batch, source length].

        Returns:
            A tensor like `x`, and the new cache.
        """
        y = self.self_norm(x)
        keys, values = self.self_attention.keys_values(y)
        keys = _write(cache["keys"], index, keys)
        values = _write(cache["values"], index, values)
        x = x + self.self_attention.attend(
            y, _join_places(keys), _join_places(values), visible
        )
        x = x + self.cross_attention.attend(
            self.cross_norm(x),
            cache["memory_keys"],
            cache["memory_values"],
            ops.expand_dims(visible_memory, 1),
        )
        x = x + self.feed_forward(self.hidden_norm(x))
        return x, {**cache, "keys": keys, "values": values}


class _FeedForward(keras.layers.Layer):
    """Two dense layers with ReLU, and dropout, in between.

    Args:
        width: Number of features.
        hidden_width: Number of hidden units.
        dropout: Dropout rate of the hidden units.
        seed: Seed of the layers.
        **kwargs: Arguments of the layer.
    """

    def __init__(
        self,
        width: int,
        hidden_width: int,
        *,
        dropout: float,
        seed: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        seeds = _seeds(seed, 3)
        self.expansion = _dense(
            hidden_width,
            "expansion",
            seeds[0],
            self.dtype_policy,
            activation="relu",
            use_bias=True,
        )
        self.dropout = keras.layers.Dropout(
            dropout, seed=seeds[1], dtype=self.dtype_policy, name="dropout"
        )
        self.contraction = _dense(
            width, "contraction", seeds[2], self.dtype_policy, use_bias=True
        )

    def build(self, input_shape: Any) -> None:
        self.expansion.build(input_shape)
        self.contraction.build((*input_shape[:-1], self.expansion.units))

    def call(self, x: Tensor, training: bool = False) -> Tensor:
        x = self.dropout(self.expansion(x), training=training)
        return self.contraction(x)


class _Attention(keras.layers.Layer):
    """Multi-head attention without biases.

    Args:
        width: Number of features; a multiple of `heads`.
        heads: Number of heads.
        dropout: Dropout rate of the attention weights.
        split_heads: Whether each head has its own weights.
        seed: Seed of the layers.
        **kwargs: Arguments of the layer.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        dropout: float,
        split_heads: bool,
        seed: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.heads = heads
        self.depth = width // heads
        query, key, value, output, dropout_seed = _seeds(seed, 5)

        def projections(name: str, seed: int) -> list[keras.layers.Layer]:
            if not split_heads:
                return [_dense(width, name, seed, self.dtype_policy)]
            return [
                _dense(self.depth, f"{name}_{i}", head_seed, self.dtype_policy)
                for i, head_seed in enumerate(_seeds(seed, heads))
            ]

        self.query = projections("query", query)
        self.key = projections("key", key)
        self.value = projections("value", value)
        self.output_projection = _dense(
            width, "output", output, self.dtype_policy
        )
        self.dropout = keras.layers.Dropout(
            dropout, seed=dropout_seed, dtype=self.dtype_policy, name="dropout"
        )

    def build(self, input_shape: Any) -> None:
        for layer in (*self.query, *self.key, *self.value):
            layer.build(input_shape)
        self.output_projection.build(input_shape)

    def call(
        self,
        x: Tensor,
        memory: Tensor,
        visible: Tensor,
        training: bool = False,
    ) -> Tensor:
        """Attends from `x` to `memory`.

        Args:
            x: Features of shape [batch, length, width].
            memory: Features of shape [batch, memory length, width].
            visible: Whether a token of `x` sees one of `memory`; boolean,
                broadcast to [batch, length, memory length]. A token that sees
                nothing gets the mean of all.
            training: Whether dropout is applied.

        Returns:
            A tensor like `x`.
        """
        if training and self.dropout.rate:
            # `dot_product_attention` has no dropout.
            keys, values = self.keys_values(memory)
            return self.attend(x, keys, values, visible, training=training)
        y = ops.dot_product_attention(
            self._heads(self.query, x),
            self._heads(self.key, memory),
            self._heads(self.value, memory),
            mask=ops.expand_dims(visible, 1),
        )
        return self.output_projection(ops.reshape(y, ops.shape(x)))

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Returns keys and values, [batch, heads, memory length, depth]."""
        keys, values = (
            ops.transpose(self._heads(projections, memory), (0, 2, 1, 3))
            for projections in (self.key, self.value)
        )
        return keys, values

    def attend(
        self,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        visible: Tensor,
        training: bool = False,
    ) -> Tensor:
        """Attends from `x` to what `keys_values` returned; see `call`."""
        queries = self._heads(self.query, x)
        scores = ops.einsum("bqhd,bhkd->bhqk", queries, keys)
        # In float32 at least, as `dot_product_attention` has it.
        scores = ops.cast(
            scores, keras.backend.result_type(scores.dtype, "float32")
        )
        scores = scores * self.depth**-0.5
        # Finite, so that nothing is NaN where a token sees nothing.
        scores = ops.where(ops.expand_dims(visible, 1), scores, -1e9)
        weights = ops.cast(ops.softmax(scores), values.dtype)
        weights = self.dropout(weights, training=training)
        y = ops.einsum("bhqk,bhkd->bqhd", weights, values)
        return self.output_projection(ops.reshape(y, ops.shape(x)))

    def _heads(self, projections: list[Callable], x: Tensor) -> Tensor:
        """Projects to [batch, length, heads, depth]."""
        if len(projections) == self.heads > 1:
            return ops.stack([project(x) for project in projections], axis=2)
        (project,) = projections
        shape = (*ops.shape(x)[:-1], self.heads, self.depth)
        return ops.reshape(project(x), shape)


def timing_signal(positions: Tensor, width: int) -> Tensor:
    """Returns sines, then cosines, of positions.

    The periods are a geometric sequence from 2 pi `MIN_TIMESCALE` to 2 pi
    `MAX_TIMESCALE`, as in Tensor2Tensor; Vaswani et al. 2017 (section 3.5)
    interleave sines and cosines.

    Args:
        positions: Positions, float32 of any shape.
        width: Number of features.

    Returns:
        float32 tensor of shape [*positions.shape, width]. The last feature of
        an odd width is 0.

    Example:
    >>> import numpy as np
    >>> from models import transformer
    >>> signal = transformer.timing_signal(np.float32([0, np.pi / 2]), 4)
    >>> np.abs(np.round(signal, 3)).astype(str).tolist()
    [['0.0', '0.0', '1.0', '1.0'], ['1.0', '0.0', '0.0', '1.0']]
    """
    waves = width // 2
    increment = math.log(MAX_TIMESCALE / MIN_TIMESCALE) / max(waves - 1, 1)
    rates = np.exp(-increment * np.arange(waves)) / MIN_TIMESCALE
    angles = ops.expand_dims(positions, -1) * rates.astype("float32")
    signal = ops.concatenate([ops.sin(angles), ops.cos(angles)], axis=-1)
    if width % 2:
        signal = ops.pad(signal, [[0, 0]] * len(positions.shape) + [[0, 1]])
    return signal


def _write(cache: Tensor, index: Tensor | int, new: Tensor) -> Tensor:
    """Writes keys or values of one place.

    Args:
        cache: Those of all places, [batch, heads, length, beam, depth].
        index: The place.
        new: Those of the place, [batch, heads, beam, depth].

    Returns:
        The new cache.
    """
    heads = cache.shape[1]
    # A scatter, as a selection would compute all places.
    rows = ops.arange(ops.shape(cache)[0] * heads)
    column = ops.zeros_like(rows) + index
    indices = ops.stack([rows // heads, rows % heads, column], 1)
    new = ops.reshape(new, (-1, *ops.shape(cache)[3:]))
    return ops.scatter_update(cache, indices, new)


def _join_places(cache: Tensor) -> Tensor:
    """Reshapes a cache to [batch, heads, length * beam, depth]."""
    batch, heads, length, beam, depth = ops.shape(cache)
    return ops.reshape(cache, (batch, heads, length * beam, depth))


def _same(segments: Tensor, others: Tensor) -> Tensor:
    """Compares every segment of a row, axis 1, with every other, axis 2."""
    return ops.equal(ops.expand_dims(segments, 2), ops.expand_dims(others, 1))


def _norm(name: str, policy: Any) -> keras.layers.Layer:
    return keras.layers.LayerNormalization(
        epsilon=NORM_EPSILON, dtype=policy, name=name
    )


def _dense(
    units: int,
    name: str,
    seed: int,
    policy: Any,
    *,
    activation: str | None = None,
    use_bias: bool = False,
) -> keras.layers.Layer:
    return keras.layers.Dense(
        units,
        activation=activation,
        use_bias=use_bias,
        kernel_initializer=keras.initializers.GlorotUniform(seed=seed),
        dtype=policy,
        name=name,
    )


def _seeds(seed: int, count: int) -> list[int]:
    return np.random.SeedSequence(seed).generate_state(count).tolist()


def _check(arguments: Mapping[str, Any]) -> None:
    """Raises an error if arguments of `Transformer` are out of range."""
    least = {
        "vocabulary_size": 2,
        "width": 2,
        "hidden_width": 1,
        "heads": 1,
        "layers": 1,
        "target_spaces": 0,
        "seed": 0,
    }
    for name, bound in least.items():
        if arguments[name] < bound:
            raise UsageError(
                f"`{name}` must be at least {bound}. "
                f"Received: {name}={arguments[name]!r}"
            )
    width, heads = arguments["width"], arguments["heads"]
    if width % heads:
        raise UsageError(
            "`width` must be a multiple of `heads`. "
            f"Received: width={width!r}, heads={heads!r}"
        )
    for name in ("residual_dropout", "attention_dropout", "hidden_dropout"):
        if not 0 <= arguments[name] < 1:
            raise UsageError(
                f"`{name}` must be in [0, 1). "
                f"Received: {name}={arguments[name]!r}"
            )
