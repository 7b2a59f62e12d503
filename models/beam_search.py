"""Batched beam search with a cache, in one graph."""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

import sos
from models.transformer import Transformer
from sos.datasets.subwords import EOS, PAD
from sos.errors import UsageError

# Score of a hypothesis that does not exist.
_NEVER = -np.inf


class Hypotheses(NamedTuple):
    """The best translations that a search found, best first.

    Attributes:
        tokens: int32 of shape [batch, beam, length], `PAD` after the last token
            (`EOS`, unless the limit came first).
        scores: float32 of shape [batch, beam]: log probability, divided by the
            length penalty. -inf, with `PAD` only as tokens, where there is no
            hypothesis, as with a model whose logits are NaN.
    """

    tokens: tf.Tensor
    scores: tf.Tensor


def beam_search(
    step: Callable[
        [tf.Tensor, tf.Tensor, Any, tf.Tensor], tuple[tf.Tensor, Any]
    ],
    cache: Any,
    *,
    limits: tf.Tensor,
    length: int | tf.Tensor,
    vocabulary_size: int,
    beam: int = 4,
    alpha: float = 0.6,
) -> Hypotheses:
    """Searches for the most probable sentences.

    Keeps the `beam` most probable beginnings of each sentence, and as many
    sentences that ended, by the score log p / ((5 + n) / 6)^alpha of n tokens
    (Wu et al. 2016, arXiv 1609.08144, equation 14, without coverage). Among
    equal ones the first beginning, then the first token, wins. Sentences that
    ended precede those that reached their limit, which follow only if fewer
    than `beam` ended. A search stops when nothing that continues can be better
    than the worst sentence that ended, so that stopping changes no result. What
    a sentence gets does not depend on the others of the batch. With a beam of
    one the search is greedy.

    Call it in a `tf.function`, with or without `jit_compile`. Shapes are static
    if the batch and `length` are: a TPU needs that.

    Args:
        step: Function of the last tokens (int32 of shape [batch, beam], `PAD`
            at the beginning), the place `index` (int32 scalar), the cache and
            `ancestors`, that returns logits of shape [batch, beam, vocabulary
            size] and the new cache. `ancestors[b, h, i]`, int32, is the rank
            that the beginning of hypothesis h of sentence b had at place i, for
            i up to `index`. The search does not reorder the cache, which would
            take as long as a step: what belongs to a hypothesis is at the rank
            that it had.
        cache: Nested structure of tensors of any shape, which `step` returns
            with the same structure, shapes and dtypes.
        limits: Most tokens of each sentence, `EOS` included, int32 of shape
            [batch]; at most `length`.
        length: Most tokens of all sentences, an integer or int32 scalar.
        vocabulary_size: Number of tokens.
        beam: Number of hypotheses.
        alpha: Exponent of the length penalty, at least 0.

    Returns:
        The hypotheses.

    Raises:
        UsageError: If an argument is out of range, or the logits have another
            shape.

    Example: a sentence without a context, whose tokens are independent.
    >>> import numpy as np, tensorflow as tf
    >>> from models import beam_search
    >>> def step(tokens, index, cache, ancestors):
    ...     logits = tf.math.log([0.0, 0.5, 0.3, 0.2])
    ...     return tf.broadcast_to(logits, [*tokens.shape, 4]), cache
    >>> found = beam_search.beam_search(
    ...     step,
    ...     {},
    ...     limits=tf.constant([3]),
    ...     length=3,
    ...     vocabulary_size=4,
    ...     beam=2,
    ... )
    >>> found.tokens.numpy().tolist()
    [[[1, 0, 0], [2, 1, 0]]]
    >>> float(np.exp(found.scores[0, 0]))
    0.5
    """
    _check(length, vocabulary_size, beam, alpha)
    limits = tf.minimum(tf.convert_to_tensor(limits, tf.int32), length)
    batch = limits.shape[0]
    sentences = tf.shape(limits)[0] if batch is None else batch
    # By the number of tokens, computed once so that equal ones are the same.
    penalties = ((5 + tf.range(length + 1, dtype=tf.float32)) / 6) ** alpha
    largest = tf.gather(penalties, tf.maximum(limits, 0))[:, tf.newaxis]
    ranks = tf.range(beam)[:, tf.newaxis]
    # Every beginning may end, and as many must go on. A greedy search is over
    # when its only one ends.
    candidates = 2 * beam if beam > 1 else 1
    tokens_each = min(candidates, vocabulary_size)

    def goes_on(state: _State) -> tf.Tensor:
        """Returns whether each sentence can still change."""
        # Log probabilities only fall, and the largest penalty helps most.
        best = state.scores[:, :1] / largest
        worst = state.ended_scores[:, -1:]
        can_win = tf.squeeze(best > worst, 1)
        return tf.logical_and(can_win, state.index < limits)

    def body(state: _State) -> list[_State]:
        index = state.index
        logits, cache = step(state.last, index, state.cache, state.ancestors)
        logits = _checked_logits(logits, [batch, beam, vocabulary_size])
        logs = tf.nn.log_softmax(tf.cast(logits, tf.float32))
        # The best of each beginning, as the best of all are among them.
        scores, last = tf.math.top_k(
            state.scores[:, :, tf.newaxis] + logs, tokens_each
        )
        # Nothing follows from NaN, which has no order.
        scores = tf.where(tf.math.is_nan(scores), _NEVER, scores)
        joined = [sentences, beam * tokens_each]
        scores, chosen = tf.math.top_k(tf.reshape(scores, joined), candidates)
        parents = chosen // tokens_each
        last = _take(tf.reshape(last, joined), chosen)
        column = tf.range(length) == index
        tokens = tf.where(
            column, last[..., tf.newaxis], _take(state.tokens, parents)
        )
        ends = last == EOS
        penalty = tf.gather(penalties, index + 1)
        ended_scores = tf.where(ends, scores / penalty, _NEVER)
        ended_scores, ended = tf.math.top_k(
            tf.concat([state.ended_scores, ended_scores], 1), beam
        )
        scores, going = tf.math.top_k(tf.where(ends, _NEVER, scores), beam)
        parents = _take(parents, going)
        new = _State(
            index=index + 1,
            last=_take(last, going),
            tokens=_take(tokens, going),
            scores=scores,
            ended_tokens=_take(
                tf.concat([state.ended_tokens, tokens], 1), ended
            ),
            ended_scores=ended_scores,
            ancestors=tf.where(
                tf.range(length) > index,
                ranks,
                _take(state.ancestors, parents),
            ),
            cache=cache,
        )
        return [_keep_shapes(state, _select(goes_on(state), new, state))]

    first = tf.zeros([sentences, beam], tf.int32)
    nothing = tf.fill([sentences, beam], tf.constant(_NEVER, tf.float32))
    empty = tf.zeros([sentences, beam, length], tf.int32)
    state = _State(
        index=tf.constant(0),
        last=first + PAD,
        tokens=empty + PAD,
        # All hypotheses begin equal: go on with one.
        scores=tf.where(tf.range(beam) == 0, 0.0, nothing),
        ended_tokens=empty + PAD,
        ended_scores=nothing,
        ancestors=empty + ranks,
        cache=keras.tree.map_structure(tf.convert_to_tensor, cache),
    )
    (state,) = tf.while_loop(
        lambda state: tf.reduce_any(goes_on(state)), body, [state]
    )
    return _result(state, largest)


def translate(
    model: Transformer,
    source: tf.Tensor,
    *,
    beam: int = 4,
    alpha: float = 0.6,
    extra_length: int = 100,
) -> Hypotheses:
    """Translates sentences by `beam_search`.

    The weights of a sparse model are computed once (`sos.frozen`). Call it in a
    `tf.function`, with or without `jit_compile`.

    Args:
        model: The model, sparse or dense.
        source: Tokens of the sentences, int32 of shape [batch, source length],
            each with `EOS` and then `PAD` at the end. In a graph either size
            may be unknown, except on a TPU.
        beam: As for `beam_search`.
        alpha: As for `beam_search`.
        extra_length: Number of tokens by which a translation may be longer than
            its source.

    Returns:
        The hypotheses, of length `source length + extra_length`.

    Raises:
        UsageError: If an argument is out of range, or `source` is not a matrix.

    Example:
    >>> import tensorflow as tf
    >>> from models import beam_search, transformer
    >>> model = transformer.Transformer(
    ...     50, width=8, hidden_width=16, heads=2, layers=1
    ... )
    >>> @tf.function
    ... def translate(source):
    ...     return beam_search.translate(model, source, extra_length=2)
    >>> translate(tf.constant([[7, 8, 9, 1], [5, 1, 0, 0]])).tokens.shape
    TensorShape([2, 4, 6])
    """
    source = tf.convert_to_tensor(source, tf.int32)
    if source.shape.rank != 2:
        raise UsageError(
            "`source` must have the shape [batch, source length]. "
            f"Received: source of shape {source.shape}"
        )
    if extra_length < 0:
        raise UsageError(
            "`extra_length` must be at least 0. "
            f"Received: extra_length={extra_length!r}"
        )
    sizes = tf.reduce_sum(tf.cast(source != PAD, tf.int32), 1)
    # Static if it can be.
    length = keras.ops.shape(source)[1] + extra_length
    with sos.frozen(model):
        encoded = model.encode(source)
        return beam_search(
            model.step,
            model.make_cache(encoded, source, length, beam),
            limits=sizes + extra_length,
            length=length,
            vocabulary_size=model.vocabulary_size,
            beam=beam,
            alpha=alpha,
        )


class _State(NamedTuple):
    """State of a search.

    Attributes:
        index: Number of tokens of the hypotheses that go on, int32 scalar.
        last: Their last tokens, int32 of shape [batch, beam].
        tokens: Their tokens, int32 of shape [batch, beam, length].
        scores: Their log probabilities, best first, float32 of shape [batch,
            beam].
        ended_tokens: Tokens of the best hypotheses that ended.
        ended_scores: Their scores, best first.
        ancestors: As for `beam_search`; from `index` on the present ranks.
        cache: The cache.
    """

    index: tf.Tensor
    last: tf.Tensor
    tokens: tf.Tensor
    scores: tf.Tensor
    ended_tokens: tf.Tensor
    ended_scores: tf.Tensor
    ancestors: tf.Tensor
    cache: Any


def _take(tensor: tf.Tensor, indices: tf.Tensor) -> tf.Tensor:
    """Takes hypotheses of each sentence."""
    return tf.gather(tensor, indices, axis=1, batch_dims=1)


def _select(active: tf.Tensor, new: _State, old: _State) -> _State:
    """Keeps the hypotheses of sentences whose search is over.

    Their cache and ancestors may change, as nothing follows from them.
    """

    def select(name: str) -> tf.Tensor:
        value = getattr(new, name)
        shape = [-1] + [1] * (value.shape.rank - 1)
        return tf.where(tf.reshape(active, shape), value, getattr(old, name))

    names = ("last", "tokens", "scores", "ended_tokens", "ended_scores")
    return new._replace(**{name: select(name) for name in names})


def _keep_shapes(old: _State, new: _State) -> _State:
    """Restores static shapes, which must not change in a loop."""
    return tf.nest.map_structure(
        lambda before, after: tf.ensure_shape(after, before.shape), old, new
    )


def _result(state: _State, penalties: tf.Tensor) -> Hypotheses:
    """Adds the hypotheses that reached their limit to those that ended."""
    beam = state.scores.shape[1]
    ended = tf.reduce_sum(
        tf.cast(state.ended_scores > _NEVER, tf.int32), 1, keepdims=True
    )
    place = tf.range(beam)
    chosen = tf.where(place < ended, place, beam + place - ended)
    scores = tf.concat([state.ended_scores, state.scores / penalties], 1)
    scores = _take(scores, chosen)
    tokens = tf.concat([state.ended_tokens, state.tokens], 1)
    tokens = _take(tokens, chosen)
    exists = (scores > _NEVER)[..., tf.newaxis]
    return Hypotheses(tf.where(exists, tokens, PAD), scores)


def _check(
    length: int | tf.Tensor, vocabulary_size: int, beam: int, alpha: float
) -> None:
    if not tf.is_tensor(length) and length < 1:
        raise UsageError(
            f"`length` must be at least 1. Received: length={length!r}"
        )
    if vocabulary_size <= EOS:
        raise UsageError(
            f"`vocabulary_size` must be at least {EOS + 1}, as {EOS} ends a "
            f"sentence. Received: vocabulary_size={vocabulary_size!r}"
        )
    if not 1 <= beam <= vocabulary_size:
        raise UsageError(
            "`beam` must be between 1 and the size of the vocabulary, "
            f"{vocabulary_size}. Received: beam={beam!r}"
        )
    if not alpha >= 0:
        raise UsageError(
            f"`alpha` must be at least 0. Received: alpha={alpha!r}"
        )


def _checked_logits(logits: tf.Tensor, shape: list[int | None]) -> tf.Tensor:
    """Returns logits with their static shape, or raises `UsageError`."""
    _, beam, vocabulary_size = shape
    if logits.shape.rank != 3 or not logits.shape.is_compatible_with(shape):
        raise UsageError(
            f"`step` must return logits of shape [batch, {beam}, "
            f"{vocabulary_size}], as `beam={beam}` and "
            f"`vocabulary_size={vocabulary_size}`, for as many sentences as "
            f"there are `limits`. Received: logits of shape {logits.shape}"
        )
    return tf.ensure_shape(logits, shape)
