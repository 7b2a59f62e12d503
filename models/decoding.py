"""Translates many sentences with beam search, in batches of similar length."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from models import beam_search
from sos.datasets.subwords import EOS, PAD, Subwords, encode

#: Most tokens of a sentence; longer ones are cut.
MAX_LENGTH = 1024
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


def make_translate(
    model: keras.Model,
    subwords: Subwords,
    *,
    beam: int,
    alpha: float,
    extra_length: int,
) -> Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]:
    """Makes a function that translates tokens to text, for a graph.

    Args:
        model: A `models.transformer.Transformer`, dense or sparse.
        subwords: Its vocabulary.
        beam: Number of hypotheses.
        alpha: Exponent of the length penalty.
        extra_length: Number of tokens by which a translation may be longer than
            its source.

    Returns:
        A function of int32 tokens of shape [batch, length], such as `to_matrix`
        returns. It returns translations, strings of shape [batch], and their
        scores, float32 of shape [batch]; see `beam_search.Hypotheses`.
    """

    def translate(source: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        found = beam_search.translate(
            model, source, beam=beam, alpha=alpha, extra_length=extra_length
        )
        return subwords.detokenize(found.tokens[:, 0]), found.scores[:, 0]

    return translate


class Decoder:
    """Translates sentences with the present weights of a model.

    Sentences are sorted by length, so that little is computed for padding.
    Those of more than `MAX_LENGTH` tokens are cut. One graph has all batches.

    Args:
        model: A `models.transformer.Transformer`, dense or sparse.
        subwords: Its vocabulary.
        batch_size: Number of sentences of up to 64 tokens in a batch. Batches
            of longer ones have as many tokens.
        **search: As for `make_translate`.

    Attributes:
        model: The model.
        cut: Number of sentences so far that were cut.
        failed: Number of sentences so far that have no translation, as logits
            of the model are NaN.
    """

    def __init__(
        self,
        model: keras.Model,
        subwords: Subwords,
        *,
        batch_size: int,
        **search: Any,
    ) -> None:
        self.model = model
        self.cut = self.failed = 0
        self._subwords = subwords
        self._batch_size = batch_size

        # With a signature, as another trace for each shape would take longer
        # than many batches.
        self._decode = tf.function(
            make_translate(model, subwords, **search),
            input_signature=[tf.TensorSpec([None, None], tf.int32)],
            autograph=False,
        )

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
            tf.constant([encode(sentences[i]) for i in wanted])
        )
        lengths = tokens.row_lengths().numpy()
        self.cut += int(np.sum(lengths > MAX_LENGTH))
        for rows in batches(lengths, self._batch_size):
            texts, scores = self._decode(to_matrix(tf.gather(tokens, rows)))
            for i, text, score in zip(
                rows, texts.numpy(), scores.numpy(), strict=True
            ):
                results[wanted[i]] = Translation(
                    text.decode(errors="replace"), float(score)
                )
            self.failed += int(np.sum(np.isneginf(scores)))
            if on_batch is not None:
                on_batch(len(rows))
        return results


def to_line(text: str) -> str:
    r"""Replaces line breaks, which bytes of the vocabulary make, by spaces.

    Args:
        text: A translation.

    Example:
    >>> from models import decoding
    >>> decoding.to_line("one\ntwo")
    'one two'
    """
    return " ".join(text.splitlines())


def to_matrix(tokens: tf.RaggedTensor) -> tf.Tensor:
    """Pads sentences to the longest, and cuts those that are too long.

    Args:
        tokens: Tokens of the sentences, int32 of shape [batch, (length)].

    Returns:
        int32 tensor of shape [batch, length] with `PAD` at the end, of at most
        `MAX_LENGTH` tokens. Sentences that are cut end with `EOS`.

    Example:
    >>> import tensorflow as tf
    >>> from models import decoding
    >>> decoding.to_matrix(tf.ragged.constant([[5, 6, 1], [1]])).numpy()
    array([[5, 6, 1],
           [1, 0, 0]], dtype=int32)
    """
    matrix = tokens[:, :MAX_LENGTH].to_tensor(PAD)
    is_cut = (tokens.row_lengths() > MAX_LENGTH)[:, tf.newaxis]
    is_last = tf.range(tf.shape(matrix)[1]) == MAX_LENGTH - 1
    return tf.where(is_cut & is_last, EOS, matrix)


def batches(lengths: Sequence[int], batch_size: int) -> Iterator[np.ndarray]:
    """Divides sentences into batches of similar length, the longest first.

    Args:
        lengths: Number of tokens of each sentence.
        batch_size: As for `Decoder`.

    Yields:
        The indices of the sentences of a batch.

    Example:
    >>> from models import decoding
    >>> for indices in decoding.batches([3, 200, 16, 150, 17], 4):
    ...     print(indices)
    [1]
    [3]
    [4 2 0]
    """
    lengths = np.minimum(lengths, MAX_LENGTH)
    # Longest first, so that a lack of memory is noticed at once.
    order = np.argsort(-lengths, kind="stable")
    while len(order):
        longest = max(_FULL_LENGTH, lengths[order[0]])
        size = max(1, batch_size * _FULL_LENGTH // longest)
        yield order[:size]
        order = order[size:]
