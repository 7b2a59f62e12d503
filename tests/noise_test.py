import math
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

import sos
from sos import noise
from sos.training import tpu_check
from tests.support import noise_quality as quality
from tests.support import techniques
from tests.support.modes import MODES, xla

NOISY = ["L0Regularization", "VariationalDropout"]


def key(seed=0, name="a", step=0):
    return noise.key(tf.constant(seed), name, tf.constant(step)).numpy()


def test_keys_differ_by_seed_name_and_step_and_repeat():
    keys = {
        tuple(key(seed, name, step))
        for seed in (-1, 0, 1, 2**31 - 1)
        for name in ("", "a", "b")
        for step in range(50)
    }
    assert len(keys) == 4 * 3 * 50
    np.testing.assert_array_equal(key(3, "b", 7), key(3, "b", 7))


def philox(counter):
    """A block of Philox4x32-10 with key 0, by Salmon et al. 2011."""
    x, first, second = list(counter), 0, 0
    for _ in range(10):
        a, b = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [b >> 32 ^ x[1] ^ first, b, a >> 32 ^ x[3] ^ second, a]
        x = [word % 2**32 for word in x]
        first = (first + 0x9E3779B9) % 2**32
        second = (second + 0xBB67AE85) % 2**32
    return x


@pytest.mark.oldest
@pytest.mark.parametrize("jit_compile", [False, True])
def test_keys_are_blocks_of_philox(jit_compile):
    compiled = tf.function(
        lambda seed, step: noise.key(seed, "kernel", step),
        jit_compile=jit_compile,
    )
    for seed, step in ((0, 0), (-7, 12), (2**31 - 1, 2**31 - 1)):
        found = compiled(tf.constant(seed), tf.constant(step)).numpy()
        counter = [seed % 2**32, noise.text_id("kernel"), step, 0]
        assert [int(word) % 2**32 for word in found] == philox(counter)[:2]


@pytest.mark.oldest
def test_text_id_is_the_same_in_every_process():
    # Unlike `hash`: the number is BLAKE2s's for the empty text.
    assert noise.text_id("") == 1188227382
    assert noise.text_id("kernel") != noise.text_id("kernel ")
    assert 0 <= min(noise.text_id(str(i)) for i in range(999))


# Words.


def hash_by_numpy(x):
    x = (x ^ x >> 16) * np.uint32(0x21F0AAAD)
    x = (x ^ x >> 15) * np.uint32(0xD35A2D97)
    return x ^ x >> 15


def words_by_integers(shape, key):
    """The words of a key, with counters of Python's integers."""
    start, step = map(int, key)
    columns = shape[-1] if shape else 1
    counters = []
    for place in range(math.prod(shape)):
        r, c = divmod(place, columns)
        r *= step | 1
        c *= (start + step) | 1
        x = start + r + 0x3C6EF372 * r**2 + c + 0x3C6EF372 * c**2
        counters.append(x % 2**32)
    return hash_by_numpy(np.array(counters, np.uint32)).reshape(shape)


SHAPES = [(), (0,), (1,), (7,), (0, 4), (3, 0), (5, 1), (1, 3), (4, 3), (8, 6)]
SHAPES += [(2, 3, 1), (2, 1, 5, 3, 1), (2, 3, 2, 5, 7)]


@pytest.mark.oldest
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_bits_equal_the_hash_by_integers(mode, shape):
    for k in (key(), [-1, -1], [2**31 - 1, -(2**31)]):
        words = mode(lambda k: noise.bits(list(shape), k))(tf.constant(k))
        assert words.dtype == tf.uint32
        np.testing.assert_array_equal(words, words_by_integers(shape, k))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_of_a_dynamic_shape_equal_those_of_a_static_one(shape):
    k = key()

    @tf.function(input_signature=[tf.TensorSpec([len(shape)], tf.int32)])
    def draw(shape):
        return noise.bits(shape, k)

    words = draw(tf.constant(shape, tf.int32))
    np.testing.assert_array_equal(words, noise.bits(list(shape), k))


@pytest.mark.parametrize("shape", [(1_000_000,), (1_000_000, 1)])
def test_bits_of_one_row_or_column_are_all_different(shape):
    assert np.unique(noise.bits(shape, key())).size == 1_000_000


def test_bits_of_rows_and_columns_repeat_as_often_as_random_ones():
    words = noise.bits([10_000, 100], key()).numpy()
    expected = words.size**2 / 2 / 2**32
    repeated = words.size - np.unique(words).size
    assert abs(repeated - expected) < 5 * expected**0.5


@pytest.mark.parametrize("shape", [(200_000, 1), (200_000,)])
def test_bits_at_a_lag_that_the_hash_correlates_are_independent(shape):
    # Hashes of counters that differ by 2^31 + 2^15 give numbers of correlation
    # -0.1, and in a linear sequence of these steps all at one lag do.
    step, lag = 2**16 + 1, 2**15

    def correlation(words):
        numbers = quality.standardized(box_muller(words))
        return np.mean(numbers[:-lag] * numbers[lag:])

    linear = np.arange(200_000, dtype=np.uint32) * np.uint32(step)
    assert correlation(hash_by_numpy(linear)) < -0.05
    words = noise.bits(shape, [0, step])
    assert abs(correlation(np.ravel(words))) < 5 / 200_000**0.5


def test_bits_in_a_graph_need_no_large_constants():
    draw = tf.function(lambda k: noise.bits([2000, 500], k))
    definition = draw.get_concrete_function(tf.constant(key())).graph
    assert definition.as_graph_def().ByteSize() < 20_000


# Distributions.


def give_words(monkeypatch, words):
    """Lets `noise` draw these words."""
    monkeypatch.setattr(noise, "bits", lambda shape, key: tf.constant(words))


@pytest.mark.oldest
@pytest.mark.parametrize("mode", MODES)
def test_uniform_numbers_are_odd_multiples_within_zero_and_one(
    mode, monkeypatch
):
    words = np.r_[noise.bits([100_000], key()), [0, 511, 512, 2**32 - 1]]
    words = words.astype(np.uint32)
    give_words(monkeypatch, words)
    found = mode(lambda: noise.uniform([words.size], [1, 2]))()
    assert found.dtype == tf.float32
    expected = (2 * (words >> 9).astype(np.float64) + 1) / 2**24
    np.testing.assert_array_equal(found, expected)
    assert expected.min() == 2**-24
    assert expected.max() == 1 - 2**-24
    # What logarithms of u and 1 - u need.
    assert (1 - found.numpy()).min() > 0


def box_muller(words):
    words = np.int64(words)
    radius = np.sqrt(-2 * np.log(((words >> 16) + 0.5) / 2**16))
    return radius * np.sin(2 * np.pi * (words & 0xFFFF) / 2**16)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("redraws", [False, True])
def test_normal_numbers_are_box_and_mullers(mode, redraws, monkeypatch):
    halves = np.arange(2**16, dtype=np.uint32)
    others = np.random.default_rng(0).permutation(halves)
    # Every radius and every angle.
    words = halves << np.uint32(16) | others
    give_words(monkeypatch, words)
    with noise.redrawing(redraws):
        found = mode(lambda: noise.normal([words.size], [1, 2]))()
    assert found.dtype == tf.float32
    np.testing.assert_allclose(found, box_muller(words), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "shape, columns",
    [
        ((2, 3, 112, 64), 128),
        ((2, 144, 136), 256),
        # Swapping the last two axes would not need less padding.
        ((2, 3, 56, 64), 64),
        ((2, 3, 128, 128), 128),
        ((3, 20, 130), 130),
        ((2, 3, 0, 9), 9),
        # The batch fills tiles, or is the last axis but one.
        ((128, 1, 16, 3), 3),
        ((112, 64), 64),
    ],
    ids=str,
)
def test_normal_numbers_for_a_tpu_fill_tiles_and_are_the_same(shape, columns):
    k = key()
    # Sines of a CPU would differ in their last bits.
    with noise.redrawing(True):
        expected = noise.normal(shape, k)

    strategy = tpu_check.deviceless_strategy(2)

    @tf.function
    def draw():
        with strategy.scope():
            return noise.normal(shape, k)

    np.testing.assert_allclose(draw(), expected, rtol=1e-6, atol=1e-6)
    drawn = {
        tensor.shape[-1]
        for operation in draw.get_concrete_function().graph.get_operations()
        for tensor in operation.outputs
        if tensor.dtype == tf.uint32 and tensor.shape.rank == len(shape)
    }
    assert max(drawn) == columns


def test_normal_numbers_have_the_moments_of_all_words(monkeypatch):
    halves = np.arange(2**16, dtype=np.uint32)
    # A right angle shows the radius, and one radius the sine: all 2^32 numbers
    # are their products.
    right = np.uint32(2**14)
    words = np.concatenate([halves << np.uint32(16) | right, halves])
    give_words(monkeypatch, words)
    numbers = np.float64(noise.normal([words.size], key()))
    radius, sine = numbers[: 2**16], numbers[2**16 :]
    sine = sine / sine[right]

    def moment(power):
        return np.mean(radius**power) * np.mean(sine**power)

    for power in range(1, 13):
        # The angles are rounded to float32, which odd moments show.
        scale = quality.normal_moment(power + power % 2)
        expected = quality.normal_moment(power)
        assert moment(power) == pytest.approx(expected, abs=2e-6 * scale)
    # As the docstring says.
    assert moment(2) == pytest.approx(1 - 5e-6, abs=1e-6)
    assert moment(4) / moment(2) ** 2 == pytest.approx(2.9998, abs=5e-5)
    assert radius.max() == pytest.approx(4.85, abs=5e-3)


@pytest.mark.oldest
@pytest.mark.parametrize("function", [noise.uniform, noise.normal])
def test_numbers_are_the_same_with_and_without_xla(function):
    compiled = xla(function)
    for seed in (-5, 0, 12):
        k = tf.constant(key(seed))
        np.testing.assert_allclose(
            function([1001], k), compiled([1001], k), rtol=1e-6, atol=1e-6
        )


# Quality. The heavy tests are `python -m tests.support.noise_quality`.

NUMBERS, KEYS = 400_000, 30


def test_noise_quality_of_a_small_run_is_that_of_true_random_numbers(
    monkeypatch, capsys
):
    # One row, and rows of 64, as each shape takes a while.
    monkeypatch.setattr(quality, "COLUMNS", (64,))
    with pytest.raises(SystemExit) as stop:
        quality.main([f"--numbers={NUMBERS}", f"--keys={KEYS}"])
    output = capsys.readouterr().out
    assert stop.value.code == 0, output
    assert "bound of |z|: 5.9" in output


def test_noise_quality_of_a_linear_counter_multiplied_once_is_bad(monkeypatch):
    constant = noise._uint32
    once = {0xD35A2D97: 1}
    monkeypatch.setattr(noise, "_permuted", lambda x: x)
    monkeypatch.setattr(noise, "_uint32", lambda n: constant(once.get(n, n)))
    found = list(quality.one_stream([NUMBERS], 0))
    wrong = " ".join(score.name for score in quality.failures(found))
    for statistic in ("pairs of bits", "pairs of byte", "at all lags"):
        assert statistic in wrong


def test_noise_quality_of_keys_that_are_not_mixed_is_bad(monkeypatch):
    def sums(seed, name, step):
        return tf.stack([seed + noise.text_id(name), step])

    monkeypatch.setattr(noise, "key", sums)
    found = list(quality.many_streams(NUMBERS, KEYS))
    wrong = " ".join(score.name for score in quality.failures(found))
    for statistic in ("two streams", "position over streams", "shared words"):
        assert statistic in wrong


def test_noise_quality_reports_scores_out_of_bounds(monkeypatch, capsys):
    found = [
        quality.Score("g", "good", -6.0),
        quality.Score("g", "high", 7.5),
        quality.Score("g", "none", float("nan")),
    ]
    monkeypatch.setattr(quality, "scores", lambda numbers, keys: found)
    with pytest.raises(SystemExit) as stop:
        quality.main([])
    assert stop.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == ["g: high: z = 7.50", "g: none: z = nan"]


@pytest.mark.parametrize(
    "flag", ["--numbers=399_999", "--numbers=1_000_000_000", "--keys=9"]
)
def test_noise_quality_rejects_sizes_out_of_range(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        quality.main([flag])
    assert stop.value.code == 2
    assert "must be from" in capsys.readouterr().err


def assert_true_random(scores):
    scores = [quality.Score("", name, z) for name, z in scores]
    assert not quality.failures(scores)


@pytest.mark.parametrize("what", ["seed", "step"])
def test_streams_of_keys_that_differ_in_one_bit_are_independent(what):
    values = [0, *(1 << i for i in range(31)), -(2**31)]
    keys = [key(**{what: value}) for value in values]
    rows = [noise.normal([20_000], k).numpy() for k in keys]
    assert_true_random(quality.independence(np.float64(rows)))
    assert_true_random(quality.shifted([(rows[0], row) for row in rows[1:]]))
    words = [noise.bits([20_000], k).numpy() for k in keys]
    assert_true_random(quality.shared_words(words))


def test_keys_have_64_random_bits():
    draw = tf.function(lambda step: noise.key(0, "a", step))
    keys = np.stack([draw(tf.constant(step)) for step in range(2000)])
    ones = np.unpackbits(keys.view(np.uint8), axis=1)
    signs = 1 - 2.0 * ones
    assert_true_random(quality.family(signs.sum(0) / 2000**0.5))
    pairs = (signs.T @ signs)[np.triu_indices(64, 1)] / 2000**0.5
    assert_true_random(quality.family(pairs))
    # Neither half is the same in two layers, steps or replicas, as the start or
    # the step of their sequences would be.
    halves = [key(0, name, step) for name in "abcd" for step in range(100)]
    assert np.unique(halves).size == 800


def test_streams_of_replicas_are_independent():
    strategy = techniques.two_replicas()

    @tf.function
    def draw():
        return noise.normal([50_000], noise.key(0, "a", tf.constant(0)))

    rows = np.float64(strategy.experimental_local_results(strategy.run(draw)))
    np.testing.assert_array_equal(rows[0], noise.normal([50_000], key()))
    assert_true_random(quality.shifted([tuple(rows)]))


def test_posterior_sample_is_the_same_on_all_replicas():
    strategy = techniques.two_replicas()

    @tf.function
    def draw():
        with noise.posterior_sample(3):
            return noise.key(0, "a", noise.current_sample())

    first, second = strategy.experimental_local_results(strategy.run(draw))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    "bit, period", [(1, 1), (-(2**31), 2), (2**30, 4), (2**22, 1024)]
)
def test_streams_of_raw_keys_that_differ_in_one_bit_share_words(bit, period):
    # Why keys must come from `noise.key`.
    start, step = key()
    words, others = (
        np.ravel(noise.bits([4096, 1], [start, step ^ np.int32(b)]))
        for b in (0, bit)
    )
    equal = np.flatnonzero(words == others)
    np.testing.assert_array_equal(equal, np.arange(0, 4096, period))


# Redrawing.


def test_redraws_is_for_accelerators(monkeypatch):
    assert not noise.redraws()
    devices = tf.config.list_logical_devices
    monkeypatch.setattr(
        tf.config,
        "list_logical_devices",
        lambda kind=None: ["a GPU"] if kind == "GPU" else devices(kind),
    )
    assert noise.redraws()
    with noise.redrawing(False):
        assert not noise.redraws()


def test_redrawing_nests_and_closes():
    with noise.redrawing(True):
        assert noise.redraws()
        with pytest.raises(KeyError), noise.redrawing(False):
            assert not noise.redraws()
            raise KeyError
        assert noise.redraws()
        seen = []
        thread = threading.Thread(target=lambda: seen.append(noise.redraws()))
        thread.start()
        thread.join()
        assert seen == [False]
    assert not noise.redraws()


# Scopes.


def test_noise_scopes_nest_and_close():
    assert noise.current_noise_scope() == ""
    with sos.noise_scope("a"):
        first = noise.current_noise_scope()
        with sos.noise_scope("b"):
            nested = noise.current_noise_scope()
        assert noise.current_noise_scope() == first
    with pytest.raises(KeyError), sos.noise_scope("c"):
        raise KeyError
    assert noise.current_noise_scope() == ""
    with sos.noise_scope("b"):
        assert len({"", first, nested, noise.current_noise_scope()}) == 4


def test_noise_scope_belongs_to_one_thread():
    seen = []
    with sos.noise_scope("here"):
        thread = threading.Thread(
            target=lambda: seen.append(noise.current_noise_scope())
        )
        thread.start()
        thread.join()
    assert seen == [""]


def two_layers(name, seed=0):
    """Two wrappers alike but for the paths of their weights."""
    layers = []
    for path in ("x", "y"):
        layer = techniques.wrap(
            name,
            keras.layers.Dense(
                40, use_bias=False, name=path, kernel_initializer="ones"
            ),
            seed=seed,
        )
        layer.build((None, 40))
        for variable in layer.sparse_weights[0].state.values():
            variable.assign(tf.zeros_like(variable))
        layers.append(layer)
    return layers


def outputs(layer, step):
    techniques.bind(layer, step)
    return np.ravel(layer(tf.eye(40), training=True))


@pytest.mark.parametrize("name", NOISY)
def test_layers_draw_by_seed_weight_and_step(name):
    streams = []
    for seed in (0, 1):
        for layer in two_layers(name, seed):
            for step in (0, 1):
                streams.append(outputs(layer, step))
    # L0 shows its gates on the ones of the kernel, variational dropout its
    # noise around them; all elements have equal moments.
    correlation = np.corrcoef(streams) - np.eye(8)
    assert np.abs(correlation).max() < 5.5 / 40
    again = outputs(two_layers(name)[0], 0)
    np.testing.assert_array_equal(again, streams[0])


@pytest.mark.parametrize("name", NOISY)
def test_replicas_draw_for_themselves(name):
    strategy = techniques.two_replicas()
    with strategy.scope():
        layer, _ = two_layers(name)
        optimizer = keras.optimizers.SGD()
        optimizer.build(layer.trainable_variables)
    layer.step_counter.bind(optimizer)

    @tf.function
    def call():
        return strategy.run(lambda: layer(tf.eye(40), training=True))

    first, second = [
        np.ravel(v) for v in strategy.experimental_local_results(call())
    ]
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / 40
    repeated = strategy.experimental_local_results(call())
    np.testing.assert_array_equal(np.ravel(repeated[1]), second)


@pytest.mark.parametrize("name", NOISY)
def test_noise_scope_separates_the_uses_of_an_embedding(name):
    layer = techniques.wrap(name, keras.layers.Embedding(50, 20))
    layer.build((None,))
    techniques.bind(layer)
    for variable in layer.sparse_weights[0].state.values():
        variable.assign(tf.zeros_like(variable))
    layer.layer.embeddings.assign(tf.ones((50, 20)))
    ids = np.arange(50)
    unlabelled = np.ravel(layer(ids, training=True))
    np.testing.assert_array_equal(
        unlabelled, np.ravel(layer(ids, training=True))
    )
    with sos.noise_scope("decoder"):
        labelled = np.ravel(layer(ids, training=True))
    assert abs(np.corrcoef(unlabelled, labelled)[0, 1]) < 5 / np.sqrt(1000)
