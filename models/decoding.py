"""Translates many sentences with beam search, in batches of static shape."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from models import beam_search
from sos.datasets.subwords import EOS, PAD, Subwords

#: Lengths to which sentences are padded, in tokens. Each is traced once.
LENGTHS = (16, 32, 64, 128, 256, 512, 1024)
# Up to this length a batch has all its rows, and above it as many tokens.
_FULL_LENGTH = 64


class Translation(NamedTuple):
    """A translated sentence.

    Attributes:
        text: The translation.
        score: Its log probability, divided by the length penalty of the beam
            search.
    """

    text: str
    score: float


class Decoder:
    """Translates sentences with the present weights of a model.

    Sentences are sorted by length and padded to one of `LENGTHS`, so that few
    shapes are traced and little is computed for padding. Longer sentences are
    cut.

    Args:
        model: A `models.transformer.Transformer`, dense or sparse.
        subwords: Its vocabulary.
        beam: Number of hypotheses.
        alpha: Exponent of the length penalty.
        extra_length: Number of tokens by which a translation may be longer than
            its source.
        batch_size: Number of sentences of up to 64 tokens in a batch. Batches
            of longer ones have as many tokens.

    Attributes:
        model: The model.
        cut: Number of sentences so far that were cut.
    """

    def __init__(
        self,
        model: keras.Model,
        subwords: Subwords,
        *,
        beam: int,
        alpha: float,
        extra_length: int,
        batch_size: int,
    ) -> None:
        self.model = model
        self.cut = 0
        self._subwords = subwords
        self._batch_size = batch_size

        def decode(source: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            found = beam_search.translate(
                model,
                source,
                beam=beam,
                alpha=alpha,
                extra_length=extra_length,
            )
            return found.tokens[:, 0], found.scores[:, 0]

        self._decode = tf.function(decode, autograph=False)
        # One for each shape. Calling `_decode` would warn of so many traces.
        self._traced: dict[tuple[int, int], Any] = {}

    def __call__(
        self,
        sentences: Sequence[str],
        on_batch: Callable[[int], None] | None = None,
    ) -> list[Translation]:
        """Translates sentences.

        Args:
            sentences: The sentences. One of nothing but spaces has an empty
                translation.
            on_batch: Called after each batch with the number of sentences in
                it. Its exceptions end the call.

        Returns:
            The translations, in the order of the sentences.
        """
        results = [Translation("", 0.0)] * len(sentences)
        wanted = [i for i, text in enumerate(sentences) if text.strip()]
        if on_batch is not None and len(wanted) < len(sentences):
            on_batch(len(sentences) - len(wanted))
        if not wanted:
            return results
        tokens = self._subwords.tokenize(
            tf.constant(
                # A lone surrogate has no encoding.
                [sentences[i].encode("utf-8", "replace") for i in wanted]
            )
        )
        values = tokens.values.numpy()
        starts = tokens.row_starts().numpy()
        lengths = tokens.row_lengths().numpy()
        self.cut += int(np.sum(lengths > LENGTHS[-1]))
        for length, size, rows in batches(lengths, self._batch_size):
            source = np.full((size, length), PAD, np.int32)
            for row, i in enumerate(rows):
                count = min(lengths[i], length)
                source[row, :count] = values[starts[i] : starts[i] + count]
                source[row, count - 1] = EOS
            # A repeated sentence takes no more steps than the others.
            source[len(rows) :] = source[len(rows) - 1]
            found, scores = self._trace(source.shape)(tf.constant(source))
            texts = self._subwords.detokenize(found).numpy()
            for i, text, score in zip(
                rows, texts, scores.numpy(), strict=False
            ):
                results[wanted[i]] = Translation(
                    text.decode(errors="replace"), float(score)
                )
            if on_batch is not None:
                on_batch(len(rows))
        return results

    def _trace(self, shape: tuple[int, int]) -> Any:
        if shape not in self._traced:
            self._traced[shape] = self._decode.get_concrete_function(
                tf.TensorSpec(shape, tf.int32)
            )
        return self._traced[shape]


def batches(
    lengths: Sequence[int], batch_size: int
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Sorts sentences by length and divides them into batches.

    Args:
        lengths: Number of tokens of each sentence.
        batch_size: As for `Decoder`.

    Yields:
        The length of a batch, one of `LENGTHS`; the number of its rows, a
        function of the length; and the indices of up to as many sentences.

    Example:
    >>> from models import decoding
    >>> for length, size, indices in decoding.batches([3, 200, 16, 17], 8):
    ...     print(length, size, indices)
    16 8 [0 2]
    32 8 [3]
    256 2 [1]
    """
    lengths = np.minimum(lengths, LENGTHS[-1])
    order = np.argsort(lengths, kind="stable")
    shortest = 0
    for longest in LENGTHS:
        size = max(1, batch_size * _FULL_LENGTH // max(_FULL_LENGTH, longest))
        chosen = order[
            (lengths[order] > shortest) & (lengths[order] <= longest)
        ]
        for begin in range(0, len(chosen), size):
            yield longest, size, chosen[begin : begin + size]
        shortest = longest
