"""The Transformer: counts, and a forward pass written in NumPy."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import sos
from models import beam_search
from models.transformer import Transformer, timing_signal
from sos.errors import UsageError
from sos.training import tpu_check
from sos.training.inputs import array_batches
from sos.training.task import Task
from sos.training.trainer import Trainer
from sos.wrappers.base import find_wrappers
from tests.support import techniques

VOCABULARY = 23
TINY = {"width": 8, "hidden_width": 12, "heads": 2, "layers": 2}
DENSE = {
    "residual_dropout": 0.0,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}

# Two pairs of sentences in the first row, three in the second.
SOURCE = np.array([[5, 6, 7, 1, 8, 9, 1, 0], [3, 1, 4, 5, 1, 6, 7, 1]])
SOURCE_SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 0], [1, 1, 2, 2, 2, 3, 3, 3]])
TARGET = np.array([[15, 16, 1, 17, 18, 19, 1], [13, 14, 1, 15, 1, 16, 1]])
TARGET_SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 2, 2, 3, 3]])
# The first row without its second pair.
PADDED_SOURCE = np.array([[5, 6, 7, 1, 0, 0], [3, 4, 8, 9, 10, 1]])
PADDED_TARGET = np.array([[15, 16, 1, 0, 0], [17, 18, 19, 20, 1]])


def tiny(randomize=True, **options):
    """Returns a tiny network, by default with no zeros or ones in it."""
    model = Transformer(VOCABULARY, **{**TINY, **options})
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables if randomize else ():
        values = rng.normal(size=variable.shape)
        if variable.path.endswith("gamma"):
            values = 1 + 0.3 * values
        variable.assign(0.5 * values)
    return model


@pytest.fixture(scope="module")
def plain():
    """A network in float32 without dropout, not to be changed."""
    return tiny(**DENSE)


def values(model):
    """Returns the arrays of a model by path, without its name."""
    return {
        variable.path.removeprefix(f"{model.name}/"): np.asarray(variable)
        for variable in model.variables
    }


class Reference:
    """The network in float64, one sentence and one place at a time.

    Args:
        model: The network.
    """

    def __init__(self, model):
        config = model.get_config()
        self.weights = {
            path: array.astype(np.float64)
            for path, array in values(model).items()
        }
        self.width = config["width"]
        self.heads = config["heads"]
        self.layers = config["layers"]
        self.split = config["split_heads"]
        self.spaces = config["target_spaces"]

    def __call__(self, source, target):
        """Logits of one pair without padding."""
        x = self.embed(source)
        if self.spaces:
            x = x + self.weights["target_space/bias"][0]
        x = x + self.signal(len(source))
        everything = np.ones((len(source), len(source)), bool)
        for i in range(self.layers):
            name = f"encoder_{i}"
            y = self.norm(x, f"{name}/self_norm")
            x = x + self.attention(y, y, everything, f"{name}/self_attention")
            x = x + self.feed_forward(x, name)
        memory = self.norm(x, "encoder_norm")
        x = np.zeros((len(target), self.width))
        x[1:] = self.embed(target[:-1])
        x = x + self.signal(len(target))
        before = np.tri(len(target), dtype=bool)
        everything = np.ones((len(target), len(source)), bool)
        for i in range(self.layers):
            name = f"decoder_{i}"
            y = self.norm(x, f"{name}/self_norm")
            x = x + self.attention(y, y, before, f"{name}/self_attention")
            y = self.norm(x, f"{name}/cross_norm")
            x = x + self.attention(
                y, memory, everything, f"{name}/cross_attention"
            )
            x = x + self.feed_forward(x, name)
        return self.norm(x, "decoder_norm") @ self.table.T

    @property
    def table(self):
        return self.weights["embedding/embeddings"]

    def embed(self, tokens):
        rows = self.table[tokens] * np.sqrt(self.width)
        rows[np.asarray(tokens) == 0] = 0
        return rows

    def signal(self, length):
        """The signal of Tensor2Tensor's get_timing_signal_1d."""
        signal = np.zeros((length, self.width))
        count = self.width // 2
        for position in range(length):
            for i in range(count):
                timescale = 1e4 ** (i / max(count - 1, 1))
                signal[position, i] = np.sin(position / timescale)
                signal[position, count + i] = np.cos(position / timescale)
        return signal

    def norm(self, x, name):
        gamma, beta = (
            self.weights[f"{name}/{part}"] for part in ("gamma", "beta")
        )
        centered = x - x.mean(-1, keepdims=True)
        deviation = np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-6)
        return centered / deviation * gamma + beta

    def attention(self, x, memory, visible, name):
        depth = self.width // self.heads
        results = []
        for head in range(self.heads):
            columns = slice(head * depth, (head + 1) * depth)
            query, key, value = (
                self.weights[f"{name}/{part}_{head}/kernel"]
                if self.split
                else self.weights[f"{name}/{part}/kernel"][:, columns]
                for part in ("query", "key", "value")
            )
            result = np.zeros((len(x), depth))
            for i in range(len(x)):
                seen = memory[visible[i]]
                scores = seen @ key @ (x[i] @ query) / np.sqrt(depth)
                weights = np.exp(scores - scores.max())
                result[i] = weights / weights.sum() @ (seen @ value)
            results.append(result)
        return (
            np.concatenate(results, 1) @ self.weights[f"{name}/output/kernel"]
        )

    def feed_forward(self, x, name):
        y = self.norm(x, f"{name}/hidden_norm")
        for part in ("expansion", "contraction"):
            y = y @ self.weights[f"{name}/feed_forward/{part}/kernel"]
            y = y + self.weights[f"{name}/feed_forward/{part}/bias"]
            if part == "expansion":
                y = np.maximum(y, 0)
        return y


def pairs():
    """Yields each pair of the packed rows, and its places."""
    for row, segments in enumerate(TARGET_SEGMENTS):
        for number in range(1, segments.max() + 1):
            source = SOURCE[row][SOURCE_SEGMENTS[row] == number]
            places = np.flatnonzero(segments == number)
            yield source, TARGET[row][places], (row, places)


# Sizes.


def test_weights_of_the_study_are_counted_exactly():
    model = Transformer(33_288)
    sizes = [int(np.prod(w.shape)) for w in model.trainable_weights]
    assert sum(sizes) == 61_163_520
    table = model.embedding.embeddings
    assert table.shape == (33_288, 512)
    assert np.std(table) == pytest.approx(512**-0.5, rel=1e-3)
    sos.sparsify(model, "MagnitudePruning", sparsity=0.9, copy=False)
    sparse = [w for t in find_wrappers(model) for w in t.sparse_weights]
    assert len(sparse) == 97
    total = sum(int(np.prod(w.variable.shape)) for w in sparse)
    assert total == 61_083_648
    assert round(100 * total / sum(sizes), 3) == 99.869
    assert all(
        w.path.endswith(("/kernel", "embedding/embeddings")) for w in sparse
    )


def test_paths_name_the_kinds_of_layers(plain):
    paths = {path for path in values(plain) if "kernel" in path}
    attention = ("query", "key", "value", "output")
    expected = set()
    for i in range(2):
        for part, kinds in (
            ("encoder", ["self"]),
            ("decoder", ["self", "cross"]),
        ):
            expected |= {
                f"{part}_{i}/{kind}_attention/{name}/kernel"
                for kind in kinds
                for name in attention
            }
            expected |= {
                f"{part}_{i}/feed_forward/{name}/kernel"
                for name in ("expansion", "contraction")
            }
    assert paths == expected


def test_split_heads_have_masks_of_their_own():
    model = tiny(split_heads=True, layers=1)
    paths = [path for path in values(model) if "encoder_0/self" in path]
    names = [path.split("/")[2] for path in paths if path.endswith("kernel")]
    assert names == [
        *("query_0", "query_1", "key_0", "key_1", "value_0", "value_1"),
        "output",
    ]
    for head in range(2):
        # The second head has smaller weights.
        layer = model.encoder[0].self_attention.query[head]
        layer.kernel.assign(layer.kernel * 0.01**head)
    masks = sos.get_masks(sos.prune(model, 0.75))
    for head in range(2):
        mask = masks[f"encoder_0/self_attention/query_{head}/kernel"]
        assert mask.shape == (8, 4)
        assert mask.sum() == 8


def test_target_space_is_optional(plain):
    assert not any(
        "target_space" in path for path in values(tiny(target_spaces=0))
    )
    assert values(plain)["target_space/bias"].shape == (32, 8)
    sparse = sos.sparsify(tiny(layers=1), "MagnitudePruning", sparsity=0.5)
    report = {row["weight"]: row for row in sos.sparsity_report(sparse).rows}
    row = report["target_space/bias"]
    assert (row["technique"], row["reason"]) == ("", "bias")


# Forward pass.


@pytest.mark.parametrize(
    "options",
    [{}, {"split_heads": True}, {"target_spaces": 0, "heads": 1}],
    ids=["shared_heads", "split_heads", "one_head"],
)
def test_packed_pairs_get_the_logits_of_numpy(options):
    model = tiny(**options)
    logits = model(SOURCE, TARGET, SOURCE_SEGMENTS, TARGET_SEGMENTS)
    assert logits.shape == (*TARGET.shape, VOCABULARY)
    reference = Reference(model)
    for source, target, place in pairs():
        expected = reference(source, target)
        np.testing.assert_allclose(
            np.asarray(logits)[place], expected, rtol=1e-4, atol=2e-4
        )


def test_padding_changes_no_logits(plain):
    reference = Reference(plain)
    logits = np.asarray(plain(PADDED_SOURCE, PADDED_TARGET))
    wide = np.asarray(
        plain(
            np.pad(PADDED_SOURCE, [[0, 0], [0, 3]]),
            np.pad(PADDED_TARGET, [[0, 0], [0, 2]]),
        )
    )
    for row in range(2):
        source = PADDED_SOURCE[row][PADDED_SOURCE[row] > 0]
        target = PADDED_TARGET[row][PADDED_TARGET[row] > 0]
        expected = reference(source, target)
        for actual in (logits, wide):
            np.testing.assert_allclose(
                actual[row, : len(target)], expected, rtol=1e-4, atol=2e-4
            )


def test_a_token_does_not_change_the_logits_up_to_it(plain):
    logits = np.asarray(plain(PADDED_SOURCE, PADDED_TARGET))
    changed = PADDED_TARGET.copy()
    changed[:, 2] = 21
    again = np.asarray(plain(PADDED_SOURCE, changed))
    np.testing.assert_array_equal(again[:, :3], logits[:, :3])
    assert (np.abs(again[:, 3:] - logits[:, 3:]).max(-1) > 1e-4).all()


@pytest.mark.parametrize(
    "dtype", ["float32", "mixed_bfloat16", "mixed_float16"]
)
def test_rows_that_are_all_padding_are_finite(dtype):
    # Dropout uses another implementation of attention.
    model = tiny(dtype=dtype, layers=1, attention_dropout=0.5)
    nothing = np.zeros((2, 5), int)
    for segments in ((), (nothing, nothing), (nothing, nothing + 1)):
        for training in (False, True):
            logits = model(nothing, nothing, *segments, training=training)
            assert np.isfinite(logits).all()


@pytest.mark.parametrize("width", [2, 5, 8])
def test_timing_signal_equals_the_formula(width):
    model = tiny(width=width, heads=1, layers=1)
    expected = Reference(model).signal(300)
    actual = timing_signal(np.arange(300, dtype=np.float32), width)
    np.testing.assert_allclose(actual, expected, atol=3e-5)


def test_only_one_of_the_segments_raises(plain):
    with pytest.raises(UsageError, match="`source_segments`.*give both or"):
        plain(SOURCE, TARGET, SOURCE_SEGMENTS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "`width` must be a multiple.*width=8, heads=3"),
        ({"layers": 0}, "`layers` must be at least 1.*layers=0"),
        ({"hidden_dropout": 1.0}, r"`hidden_dropout` .* \[0, 1\).*1.0"),
        ({"target_spaces": -1}, "`target_spaces`.*-1"),
    ],
)
def test_invalid_options_raise(options, message):
    with pytest.raises(UsageError, match=message):
        tiny(**options)


# Decoding step by step.


@pytest.mark.parametrize("split_heads", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_cached_steps_equal_decoding_all_places(split_heads, sparse):
    model = tiny(split_heads=split_heads, layers=1)
    if sparse:
        # Without `sos.frozen`.
        model = sos.prune(model, sparsity=0.7)
    encoded = model.encode(PADDED_SOURCE)
    logits = model.decode(PADDED_TARGET, encoded, PADDED_SOURCE)
    np.testing.assert_array_equal(model(PADDED_SOURCE, PADDED_TARGET), logits)
    length = PADDED_TARGET.shape[1]
    cache = model.make_cache(encoded, PADDED_SOURCE, length + 2, beam=1)
    tokens = np.zeros((2, 1), np.int32)
    ancestors = np.zeros((2, 1, length + 2), np.int32)
    for place in range(length):
        step_logits, cache = model.step(tokens, place, cache, ancestors)
        np.testing.assert_allclose(
            step_logits[:, 0], logits[:, place], rtol=1e-4, atol=1e-5
        )
        tokens = PADDED_TARGET[:, place, np.newaxis]


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_cached_steps_follow_the_ancestors(dtype):
    model = tiny(layers=2, dtype=dtype)
    tolerance = 1e-5 if dtype == "float32" else 0.1
    rng = np.random.default_rng(0)
    encoded = model.encode(PADDED_SOURCE)
    batch, beam, length = 2, 3, 4
    cache = model.make_cache(encoded, PADDED_SOURCE, length, beam)
    histories = np.zeros((batch, beam, 0), np.int32)
    ancestors = np.zeros((batch, beam, length), np.int32)
    tokens = np.zeros((batch, beam), np.int32)
    for place in range(length):
        ancestors[:, :, place] = np.arange(beam)
        step_logits, cache = model.step(tokens, place, cache, ancestors)
        for rank in range(beam):
            history = np.pad(histories[:, rank], [(0, 0), (0, length - place)])
            logits = model.decode(history, encoded, PADDED_SOURCE)
            assert step_logits.dtype == logits.dtype
            np.testing.assert_allclose(
                step_logits[:, rank],
                logits[:, place],
                rtol=10 * tolerance,
                atol=tolerance,
            )
        # Each hypothesis goes on with any of its sentence.
        parents = rng.integers(0, beam, (batch, beam, 1))
        tokens = rng.integers(2, 20, (batch, beam)).astype(np.int32)
        histories = np.take_along_axis(histories, parents, 1)
        histories = np.concatenate([histories, tokens[..., np.newaxis]], 2)
        ancestors = np.take_along_axis(ancestors, parents, 1)


def test_methods_can_be_traced_without_sizes(plain):
    spec = tf.TensorSpec([None, None], tf.int32)

    @tf.function(input_signature=[spec] * 4)
    def call(*inputs):
        return plain(*inputs)

    inputs = (SOURCE, TARGET, SOURCE_SEGMENTS, TARGET_SEGMENTS)
    np.testing.assert_allclose(call(*inputs), plain(*inputs), atol=1e-5)


# Initial values and randomness.


def test_initial_weights_have_the_published_distributions():
    model = tiny(randomize=False, width=64, hidden_width=96)
    for path, array in values(model).items():
        if path.endswith("/kernel"):
            bound = np.sqrt(6 / sum(array.shape))
            assert np.abs(array).max() <= bound, path
            assert array.std() == pytest.approx(bound / np.sqrt(3), rel=0.05)
        elif path.endswith("feed_forward/expansion/bias"):
            assert not array.any()
    assert values(model)["embedding/embeddings"].std() == pytest.approx(
        1 / 8, rel=0.05
    )


def test_seeds_determine_weights_and_dropout():
    def outputs(seed, **options):
        model = tiny(randomize=False, seed=seed, **options)
        kernels = [
            np.asarray(w) for w in model.weights if w.path.endswith("kernel")
        ]
        rows = [
            model(PADDED_SOURCE, PADDED_TARGET, training=True) for _ in range(2)
        ]
        return kernels, np.asarray(rows)

    (first, dropped), (same, dropped_again), (other, _) = (
        outputs(seed, layers=1) for seed in (3, 3, 4)
    )
    for a, b, c in zip(first, same, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert (a != c).all()
    np.testing.assert_array_equal(dropped, dropped_again)
    assert (dropped[0] != dropped[1]).any()
    # All layers differ.
    assert len({kernel.ravel()[:4].tobytes() for kernel in first}) == len(first)
    without, rows = outputs(3, layers=1, **DENSE)
    for a, b in zip(first, without, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(rows[0], rows[1])


@pytest.mark.parametrize(
    "rate", ["residual_dropout", "attention_dropout", "hidden_dropout"]
)
def test_every_dropout_is_applied_in_training_only(rate, plain):
    model = tiny(**{**DENSE, rate: 0.5})
    arguments = (PADDED_SOURCE, PADDED_TARGET)
    expected = np.asarray(plain(*arguments))
    np.testing.assert_allclose(model(*arguments), expected, atol=1e-5)
    dropped = np.asarray(model(*arguments, training=True))
    assert (np.abs(dropped - expected).max(-1) > 1e-3).all()
    # Also by the methods alone.
    encoded = np.asarray(model.encode(PADDED_SOURCE, training=True))
    assert (encoded != np.asarray(plain.encode(PADDED_SOURCE))).any()


def test_attention_dropout_of_a_negligible_rate_changes_nothing(plain):
    # It uses another implementation of attention.
    model = tiny(**{**DENSE, "attention_dropout": 1e-9})
    arguments = (SOURCE, TARGET, SOURCE_SEGMENTS, TARGET_SEGMENTS)
    np.testing.assert_allclose(
        model(*arguments, training=True),
        plain(*arguments),
        rtol=1e-4,
        atol=1e-5,
    )


# Mixed precision.


def test_bfloat16_has_float32_logits_near_those_of_float32():
    model = tiny(randomize=False, width=32, dtype="mixed_bfloat16")
    plain = tiny(randomize=False, width=32)
    assert model.encode(PADDED_SOURCE).dtype == "bfloat16"
    logits = model(PADDED_SOURCE, PADDED_TARGET)
    assert logits.dtype == "float32"
    expected = np.asarray(plain(PADDED_SOURCE, PADDED_TARGET))
    np.testing.assert_allclose(logits, expected, atol=0.05)
    # Not rounded to 8 bits.
    rounded = tf.cast(tf.cast(logits, tf.bfloat16), tf.float32)
    assert (np.asarray(rounded) != np.asarray(logits)).mean() > 0.9
    found = beam_search.translate(model, PADDED_SOURCE, extra_length=2)
    assert found.scores.dtype == "float32"
    assert np.isfinite(found.scores).all()


# Saving.


def test_saved_model_comes_back(tmp_path):
    model = tiny(split_heads=True, seed=5, dtype="mixed_bfloat16")
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded) is Transformer
    assert loaded.get_config() == model.get_config()
    assert [w.path for w in loaded.weights] == [w.path for w in model.weights]
    np.testing.assert_array_equal(
        loaded(PADDED_SOURCE, PADDED_TARGET),
        model(PADDED_SOURCE, PADDED_TARGET),
    )


# Techniques.


@pytest.mark.parametrize(
    "technique",
    [
        "MagnitudePruning",
        "VariationalDropout",
        "L0Regularization",
        # Masks of other origin.
        pytest.param("RandomPruning", marks=pytest.mark.slow),
        pytest.param("FixedMask", marks=pytest.mark.slow),
    ],
)
def test_technique_trains_and_translates_as_its_stripped_model(
    technique, tmp_path
):
    sparse = sos.sparsify(
        tiny(layers=1), technique, **techniques.arguments(technique)
    )
    assert isinstance(sparse, Transformer)
    if technique in ("VariationalDropout", "L0Regularization"):
        techniques.make_zeros(sparse)
    optimizer = keras.optimizers.Adam(0.01)
    optimizer.build(sparse.trainable_variables)
    before = values(sparse)

    def train_step():
        with tf.GradientTape() as tape:
            logits = sparse(
                SOURCE,
                TARGET,
                SOURCE_SEGMENTS,
                TARGET_SEGMENTS,
                training=True,
            )
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
                TARGET, logits
            )
            loss = tf.reduce_mean(losses) + sum(sparse.losses, 0.0)
        gradients = tape.gradient(loss, sparse.trainable_variables)
        optimizer.apply(gradients, sparse.trainable_variables)
        return loss

    with sos.SparsityUpdater(sparse, optimizer) as updater:
        assert np.isfinite(train_step())
        updater.step()
    after = values(sparse)
    report = sos.sparsity_report(sparse)
    assert report.totals["sparsity"] > 0.1
    names = {"embedding/embeddings", "encoder_0/self_attention/query/kernel"}
    assert all((before[name] != after[name]).any() for name in names)

    sparse.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded) is type(sparse)
    np.testing.assert_array_equal(
        loaded(PADDED_SOURCE, PADDED_TARGET),
        sparse(PADDED_SOURCE, PADDED_TARGET),
    )
    plain = sos.strip(sparse)
    assert type(plain) is Transformer
    # Not compiled, as a trace takes longer.
    found, again = (
        beam_search.translate(model, SOURCE[:1, :3], extra_length=1)
        for model in (sparse, plain)
    )
    np.testing.assert_array_equal(again.tokens, found.tokens)
    np.testing.assert_allclose(again.scores, found.scores, atol=1e-5)


@pytest.mark.parametrize(
    "technique", ["VariationalDropout", "L0Regularization"]
)
def test_uses_of_the_table_have_noise_of_their_own(technique):
    # One token everywhere, so that only noise makes rows differ.
    sparse = sos.sparsify(
        tiny(layers=1, **DENSE), technique, penalty_weight=1e-3
    )
    for wrapper in find_wrappers(sparse):
        for weight in wrapper.sparse_weights:
            for variable in weight.state.values():
                variable.assign(np.full(variable.shape, -1.0))
    tokens = np.full((1, 4), 7)
    rows = {}
    original = sparse.embedding.call

    def recording(inputs, reverse=False, **kwargs):
        outputs = original(inputs, reverse=reverse, **kwargs)
        rows[len(rows)] = np.asarray(outputs)
        return outputs

    object.__setattr__(sparse.embedding, "call", recording)
    optimizer = keras.optimizers.SGD()
    optimizer.build(sparse.trainable_variables)
    with sos.SparsityUpdater(sparse, optimizer):
        sparse(tokens, tokens, training=True)
    source, target, _ = rows.values()
    assert len(np.unique(source.round(6), axis=1)[0]) == 4
    assert (np.abs(source - target).max(-1) > 1e-6).all()


class Translation(Task):
    """Trains the network on rows of random tokens."""

    def __init__(self, technique):
        self.technique = technique
        self.batch_size = 4
        rng = np.random.default_rng(0)
        self.arrays = {
            name: rng.integers(0, VOCABULARY, (8, 6), np.int32)
            for name in (
                "source",
                "target",
                "source_segments",
                "target_segments",
            )
        }

    def build_model(self):
        model = tiny(layers=1, dtype="mixed_bfloat16")
        if self.technique is None:
            return model
        return sos.sparsify(
            model, self.technique, **techniques.arguments(self.technique)
        )

    def build_optimizer(self, model):
        return keras.optimizers.Adam(1e-3)

    def train_dataset(self, context, step):
        return array_batches(
            self.arrays,
            seed=0,
            batch_size=self.batch_size,
            step=step,
            context=context,
        )

    def compute_metrics(self, model, batch, training):
        logits = model(**batch, training=training)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
            batch["target"], logits
        )
        count = tf.cast(tf.size(losses), tf.float32)
        return {"loss": (tf.reduce_sum(losses), count)}


@pytest.mark.slow
@pytest.mark.parametrize("technique", [None, *techniques.NAMES])
def test_training_step_is_accepted_by_a_tpu(technique):
    strategy = tpu_check.deviceless_strategy(2)
    trainer = Trainer(Translation(technique), strategy=strategy)
    data = strategy.distribute_datasets_from_function(
        lambda context: trainer.task.train_dataset(context, 0)
    )
    updater = None
    if trainer.steps.sparse_weights:
        updater = sos.SparsityUpdater(trainer.model, trainer.optimizer)
        updater.resume()
    function = trainer.steps.train_function.get_concrete_function(
        iter(data), tf.TensorSpec((), tf.int32)
    )
    assert not tpu_check.violations(function)
    if updater:
        updater.pause()


def test_search_is_accepted_by_a_tpu():
    strategy = tpu_check.deviceless_strategy(2)
    with strategy.scope():
        model = tiny(layers=1, dtype="mixed_bfloat16")

    def search(source):
        return beam_search.translate(model, source, extra_length=2)

    @tf.function
    def run(source):
        return strategy.run(search, args=(source,))

    function = run.get_concrete_function(tf.TensorSpec((2, 6), tf.int32))
    assert not tpu_check.violations(function)
