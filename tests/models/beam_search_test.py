"""Beam search against one in NumPy, on tables and on a tiny Transformer."""

import functools

import hypothesis
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st

from models import beam_search
from models.beam_search import EOS, PAD, Hypotheses
from models.transformer import Transformer
from sos.errors import UsageError

VOCABULARY = 11


def log_softmax(logits):
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def penalty(count, alpha):
    return ((5 + count) / 6) ** alpha


def reference(logits_after, limit, beam, alpha):
    """A search for one sentence, from the description alone.

    Args:
        logits_after: Function of a tuple of tokens that returns the logits of
            the next one.
        limit: Most tokens.
        beam: Number of hypotheses.
        alpha: Exponent of the length penalty.

    Returns:
        Pairs of score and tokens, best first. It never stops early.
    """
    going, ended = [(0.0, ())], []
    for count in range(1, limit + 1):
        candidates = []
        for total, tokens in going:
            logs = log_softmax(logits_after(tokens))
            candidates += [
                (total + log, (*tokens, token))
                for token, log in enumerate(logs)
            ]
        # Sorting is stable: the first of equal ones wins.
        candidates.sort(key=lambda pair: -pair[0])
        # With a beam of one the search is greedy.
        candidates = candidates[: 2 * beam if beam > 1 else 1]
        candidates = [pair for pair in candidates if pair[0] > -np.inf]
        ended += [
            (total / penalty(count, alpha), tokens)
            for total, tokens in candidates
            if tokens[-1] == EOS
        ]
        ended.sort(key=lambda pair: -pair[0])
        ended = ended[:beam]
        going = [pair for pair in candidates if pair[1][-1] != EOS][:beam]
    going = [(total / penalty(limit, alpha), tokens) for total, tokens in going]
    return (ended + going)[:beam]


def assert_equal(found, expected):
    """Compares the hypotheses of one sentence with the reference's."""
    for i, (score, tokens) in enumerate(expected):
        np.testing.assert_allclose(found.scores[i], score, rtol=0, atol=1e-4)
        # Rounding decides between those that are as good.
        if any(
            abs(score - other) < 1e-4
            for j, (other, _) in enumerate(expected)
            if j != i
        ):
            continue
        length = found.tokens.shape[1]
        padded = [*tokens, *[PAD] * (length - len(tokens))]
        assert found.tokens[i].tolist() == padded


def sentence(found, index):
    return Hypotheses(*(np.asarray(part)[index] for part in found))


class Table:
    """Logits that depend on the last two tokens and the place.

    The cache holds the token before the last, where its hypothesis was.

    Args:
        seed: Seed of the tables of all sentences.
        batch: Number of sentences.
        length: Number of places.
        vocabulary: Number of tokens.
        ending: Logit that is added for the end of a sentence.
        scale: Standard deviation of the logits.
    """

    def __init__(self, seed, batch, length, vocabulary, ending=0.0, scale=3.0):
        rng = np.random.default_rng(seed)
        self.tables = rng.normal(
            scale=scale,
            size=(batch, length, vocabulary, vocabulary, vocabulary),
        ).astype(np.float32)
        self.tables[..., EOS] += ending
        self.batch, self.length, self.vocabulary = batch, length, vocabulary

    def cache(self, rows=None, beam=4):
        rows = range(self.batch) if rows is None else rows
        rows = np.repeat(np.array(list(rows), np.int32)[:, None], beam, 1)
        return {"sentence": rows, "before": [np.zeros_like(rows)]}

    def step(self, tokens, index, cache, ancestors):
        (before,) = cache["before"]
        parents = tf.gather(ancestors, tf.maximum(index - 1, 0), axis=2)
        before = tf.gather(before, parents, axis=1, batch_dims=1)
        places = tf.stack(
            [
                cache["sentence"],
                tf.fill(tf.shape(tokens), index),
                before,
                tokens,
            ],
            -1,
        )
        logits = tf.gather_nd(tf.constant(self.tables), places)
        return logits, {"sentence": cache["sentence"], "before": [tokens]}

    def logits_after(self, row, tokens):
        before, last = ((PAD, PAD) + tokens)[-2:]
        return self.tables[row, len(tokens), before, last].astype(np.float64)

    def search(self, limits=None, rows=None, compiled=False, beam=4, **options):
        cache = self.cache(rows, beam)
        count = len(cache["sentence"])
        limits = [self.length] * count if limits is None else limits

        def run():
            return beam_search.beam_search(
                self.step,
                cache,
                limits=np.array(limits, np.int32),
                length=self.length,
                vocabulary_size=self.vocabulary,
                beam=beam,
                **options,
            )

        if compiled:
            run = tf.function(run, jit_compile=compiled == "xla")
        return run()

    def expected(self, row, limit, beam, alpha):
        return reference(
            functools.partial(self.logits_after, row), limit, beam, alpha
        )


# Against NumPy.


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    seed=st.integers(0, 2**31),
    limits=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    vocabulary=st.integers(2, 7),
    beam=st.integers(1, 5),
    alpha=st.sampled_from([0.0, 0.6, 1.5]),
    ending=st.sampled_from([-50.0, -3.0, 0.0, 3.0]),
)
def test_search_equals_numpy(seed, limits, vocabulary, beam, alpha, ending):
    beam = min(beam, vocabulary)
    table = Table(seed, len(limits), 6, vocabulary, ending)
    found = table.search(limits, beam=beam, alpha=alpha)
    assert found.tokens.shape == (len(limits), beam, 6)
    assert found.tokens.dtype == tf.int32
    assert found.scores.dtype == tf.float32
    for row, limit in enumerate(limits):
        assert_equal(
            sentence(found, row), table.expected(row, limit, beam, alpha)
        )


@pytest.mark.parametrize("compiled", ["graph", "xla"])
def test_compiled_search_equals_numpy(compiled):
    limits = [9, 1, 5, 8]
    table = Table(1, 4, 9, 7)
    found = table.search(limits, compiled=compiled, beam=3)
    for row, limit in enumerate(limits):
        assert_equal(sentence(found, row), table.expected(row, limit, 3, 0.6))


def test_fewer_hypotheses_than_the_beam_leave_rows_empty():
    # Two tokens: after one step one has ended and one goes on.
    found = sentence(Table(0, 1, 3, 2).search([1], beam=2), 0)
    assert np.isfinite(found.scores).all()
    # All others follow the end.
    table = Table(0, 1, 3, 4)
    table.tables[...] = -np.inf
    table.tables[..., EOS] = 0
    found = sentence(table.search(beam=3), 0)
    assert found.scores.tolist() == [0, -np.inf, -np.inf]
    assert found.tokens.tolist() == [[EOS, PAD, PAD], [PAD] * 3, [PAD] * 3]


def test_equal_logits_prefer_the_first_hypothesis_and_token():
    table = Table(0, 1, 3, 5, scale=0.0)
    found = sentence(table.search(beam=4, alpha=0.0), 0)
    expected = table.expected(0, 3, 4, 0.0)
    assert [tokens for _, tokens in expected] == [
        tuple(row[: len(tokens)])
        for row, (_, tokens) in zip(found.tokens, expected, strict=True)
    ]


def test_equal_sums_prefer_the_first_token():
    # The logits of 2 and 3 differ, but their sums are the same in float32.
    table = Table(0, 1, 2, 5)
    table.tables[...] = -np.inf
    table.tables[0, 0, ..., [EOS, 4]] = [[[0]], [[-40]]]
    table.tables[0, 1, ..., [2, 3]] = [[[0]], [[3e-7]]]
    found = sentence(table.search(beam=3, alpha=0.0), 0)
    assert found.scores[1] == found.scores[2]
    np.testing.assert_array_equal(found.tokens, [[EOS, PAD], [4, 2], [4, 3]])


def test_beam_of_one_is_greedy():
    table = Table(3, 8, 9, 7)
    found = table.search(beam=1)
    for row in range(8):
        tokens, total = (), 0.0
        while len(tokens) < 9 and EOS not in tokens:
            logs = log_softmax(table.logits_after(row, tokens))
            tokens += (int(np.argmax(logs)),)
            total += logs.max()
        (score,), (best,) = found.scores[row], found.tokens[row]
        assert best.numpy().tolist() == [*tokens, *[PAD] * (9 - len(tokens))]
        np.testing.assert_allclose(
            score, total / penalty(len(tokens), 0.6), atol=1e-5
        )


# Independence of the batch, limits and stopping.


def test_sentences_do_not_depend_on_the_batch():
    limits = [9, 3, 6, 1, 9]
    table = Table(5, 5, 9, 7, ending=-1.0)
    together = table.search(limits)
    for row, limit in enumerate(limits):
        alone = table.search([limit], rows=[row])
        np.testing.assert_array_equal(together.tokens[row], alone.tokens[0])
        np.testing.assert_allclose(
            together.scores[row], alone.scores[0], rtol=1e-6
        )


def test_search_stops_as_soon_as_nothing_can_change():
    table = Table(0, 3, 30, 6, ending=8.0)
    places = []
    step = table.step

    def counting(tokens, index, cache, ancestors):
        places.append(int(index))
        return step(tokens, index, cache, ancestors)

    table.step = counting
    found = table.search()
    assert len(places) < 15
    for row in range(3):
        assert_equal(sentence(found, row), table.expected(row, 30, 4, 0.6))


def test_model_that_never_ends_reaches_the_limits():
    table = Table(0, 3, 7, 6, ending=-np.inf)
    found = table.search([7, 4, 1])
    counts = (np.asarray(found.tokens) != PAD).sum(-1)
    assert (np.asarray(found.tokens) != EOS).all()
    for row, limit in enumerate([7, 4, 1]):
        assert (counts[row] <= limit).all()
        assert_equal(sentence(found, row), table.expected(row, limit, 4, 0.6))


def test_limits_beyond_the_length_are_the_length():
    table = Table(0, 1, 4, 6)
    for a, b in zip(table.search([100]), table.search([4]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_limit_of_zero_finds_the_empty_sentence():
    found = sentence(Table(0, 2, 4, 6).search([0, 4]), 0)
    assert not found.tokens.any()
    assert found.scores[0] == 0


@pytest.mark.parametrize("compiled", ["graph", "xla"])
@pytest.mark.parametrize("tokens", [slice(None), 3])
@pytest.mark.parametrize("place", [0, 2])
def test_nan_logits_end_the_search_without_a_hypothesis(
    place, tokens, compiled
):
    table = Table(0, 2, 6, 5, ending=-np.inf)
    table.tables[0, place, ..., tokens] = np.nan
    found = table.search(compiled=compiled)
    assert (sentence(found, 0).scores == -np.inf).all()
    assert not sentence(found, 0).tokens.any()
    assert_equal(sentence(found, 1), table.expected(1, 6, 4, 0.6))


# The Transformer.


@pytest.fixture(scope="module")
def model():
    network = Transformer(
        VOCABULARY, width=8, hidden_width=12, heads=2, layers=1
    )
    rng = np.random.default_rng(0)
    for variable in network.trainable_variables:
        variable.assign(rng.normal(size=variable.shape))
    # So that sentences end at different places.
    table = np.array(network.embedding.embeddings)
    table[EOS] *= 1.5
    network.embedding.embeddings.assign(table)
    return network


SOURCE = np.array(
    [[5, 6, 7, 1, 0], [8, 1, 0, 0, 0], [3, 4, 9, 10, 1]], np.int32
)


@pytest.fixture(scope="module")
def uncached(model):
    """Returns logits after tokens, from decoding all places anew."""

    @tf.function(autograph=False)
    def decode(target, source):
        return model.decode(target, model.encode(source), source)

    def logits_after(source, tokens):
        target = np.zeros((1, 8), np.int32)
        target[0, : len(tokens)] = tokens
        logits = decode(target, source[np.newaxis])
        return np.asarray(logits)[0, len(tokens)].astype(np.float64)

    return logits_after


@pytest.fixture(scope="module")
def translate(model):
    @tf.function(reduce_retracing=True)
    def translate(source):
        return beam_search.translate(model, source, extra_length=3)

    return translate


def test_translations_equal_numpy_without_a_cache(uncached, translate):
    found = translate(SOURCE)
    assert found.tokens.shape == (3, 4, 8)
    for row, source in enumerate(SOURCE):
        limit = int((source != PAD).sum()) + 3
        logits_after = functools.partial(uncached, source)
        expected = reference(logits_after, limit, 4, 0.6)
        assert_equal(sentence(found, row), expected)


def test_translations_do_not_depend_on_batch_or_padding(model, translate):
    together = translate(SOURCE)
    for row in range(3):
        size = int((SOURCE[row] != PAD).sum())
        alone = beam_search.translate(
            model, SOURCE[row : row + 1, :size], extra_length=3
        )
        expected = [
            (float(score), tuple(tokens[: size + 3]))
            for score, tokens in zip(*reversed(sentence(alone, 0)), strict=True)
        ]
        assert_equal(sentence(together, row), expected)


def test_compiled_by_xla_translations_are_the_same(model, translate):
    # XLA learns the sizes when it is called.
    found = tf.function(
        lambda source: beam_search.translate(model, source, extra_length=3),
        input_signature=[tf.TensorSpec([None, None], tf.int32)],
        jit_compile=True,
    )(SOURCE)
    np.testing.assert_array_equal(found.tokens, translate(SOURCE).tokens)
    np.testing.assert_allclose(
        found.scores, translate(SOURCE).scores, atol=1e-4
    )


def test_sizes_are_static_where_those_of_the_source_are(model):
    def search(source):
        return beam_search.translate(model, source, extra_length=3)

    for shape, expected in (
        ([3, 5], [3, 4, 8]),
        ([None, 5], [None, 4, 8]),
        ([3, None], [3, 4, None]),
    ):
        function = tf.function(search).get_concrete_function(
            tf.TensorSpec(shape, tf.int32)
        )
        tokens, scores = function.structured_outputs
        assert tokens.shape.as_list() == expected
        assert scores.shape.as_list() == expected[:2]


def test_source_of_unknown_size_translates(model, translate):
    function = tf.function(
        lambda source: beam_search.translate(model, source, extra_length=3),
        input_signature=[tf.TensorSpec([None, None], tf.int32)],
    )
    expected = translate(SOURCE)
    for count, length in ((1, 4), (3, 5)):
        found = function(SOURCE[:count, :length])
        assert found.tokens.shape == (count, 4, length + 3)
        np.testing.assert_array_equal(
            found.tokens, expected.tokens[:count, :, : length + 3]
        )
        np.testing.assert_allclose(
            found.scores, expected.scores[:count], atol=1e-4
        )


# Mistakes.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam": 8}, "`beam` must be between 1 and .* 7. Received: beam=8"),
        ({"beam": 0}, "`beam`.*beam=0"),
        ({"alpha": -0.1}, "`alpha` must be at least 0.*-0.1"),
        ({"alpha": np.nan}, "`alpha`.*nan"),
        ({"length": 0}, "`length` must be at least 1"),
        ({"vocabulary_size": 1}, "`vocabulary_size` must be at least 2"),
        ({"vocabulary_size": 6}, r"`step` must .*4, 6\].*\(2, 4, 7\)"),
        ({"beam": 3}, r"`step` must .*, 3, 7\].*\(2, 4, 7\)"),
        ({"limits": [4]}, r"`step` must .*as many .*\(2, 4, 7\)"),
    ],
)
def test_invalid_arguments_raise(options, message):
    table = Table(0, 2, 4, 7)
    arguments = {
        "length": 4,
        "vocabulary_size": 7,
        "limits": [4, 4],
        **options,
    }

    def step(tokens, index, cache, ancestors):
        del tokens, ancestors
        return table.step(
            np.full((2, 4), PAD), index, cache, np.zeros((2, 4, 4), np.int32)
        )

    with pytest.raises(UsageError, match=message):
        beam_search.beam_search(step, table.cache(), **arguments)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (SOURCE[0], {}, r"\[batch, source length\].*\(5,\)"),
        (SOURCE, {"extra_length": -1}, "`extra_length`.*-1"),
        (SOURCE, {"beam": 12}, "`beam` must be between 1 and .*11"),
    ],
)
def test_invalid_arguments_of_translate_raise(model, source, options, message):
    with pytest.raises(UsageError, match=message):
        beam_search.translate(model, source, **options)
