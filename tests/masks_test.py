import fractions
import itertools
import math
import threading

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tensorflow as tf

from sos import masks

BFLOAT16 = tf.bfloat16.as_numpy_dtype
DTYPES = {
    "float16": (np.float16, np.int16),
    "bfloat16": (BFLOAT16, np.int16),
    "float32": (np.float32, np.int32),
    "float64": (np.float64, np.int64),
}
# Tensors that are ranked in one compiled call: the awkward sizes in one dtype,
# and one size in the others, whose bits are what differs.
COMPILED = (
    ("float16", 40),
    ("bfloat16", 40),
    ("float32", 0),
    ("float32", 1),
    ("float32", 2),
    ("float32", 7),
    ("float32", 40),
    ("float64", 40),
)


def oracle(scores, k):
    """Keeps the first k of a stable descending sort of the floats."""
    flat = scores.astype(np.float64).ravel()  # exact for all dtypes here
    mask = np.zeros(flat.size, np.uint8)
    mask[np.argsort(-flat, kind="stable")[:k]] = 1
    return mask.reshape(scores.shape)


def special_values(dtype, integer):
    """Zeros, denormals, infinities and neighbours, as bit patterns."""
    infinity = int(np.array(np.inf, dtype).view(integer))
    one = int(np.array(1, dtype).view(integer))
    positive = [0, 1, 2, 3, one, one + 1, infinity - 1, infinity]
    lowest = int(np.iinfo(integer).min)  # the bits of -0.0
    return positive + [lowest + bits for bits in positive]


def assert_masks_equal(found, arrays, counts):
    for mask, array, k in zip(found, arrays, counts, strict=True):
        np.testing.assert_array_equal(mask, oracle(array, k))


@st.composite
def scores_and_k(draw, name=None, size=None):
    fixed = size is not None
    if not fixed:
        name = draw(st.sampled_from(sorted(DTYPES)))
        size = draw(st.integers(0, 60))
    dtype, integer = DTYPES[name]
    limits = np.iinfo(integer)
    special = st.sampled_from(special_values(dtype, integer))
    anything = st.integers(int(limits.min), int(limits.max))
    element = draw(
        st.sampled_from(
            [
                anything,
                special,
                st.one_of(special, anything),
                # Few different values: many ties.
                st.sampled_from(draw(st.lists(special, min_size=1))),
            ]
        )
    )
    bits = draw(st.lists(element, min_size=size, max_size=size))
    scores = np.array(bits, integer).view(dtype)
    with np.errstate(invalid="ignore"):  # signalling NaNs warn
        scores[np.isnan(scores)] = np.inf
    if not fixed and size % 6 == 0:
        scores = scores.reshape(2, 3, size // 6)
    return scores, draw(st.integers(0, size))


def test_keep_count_of_percents_is_rounded_exactly():
    for size, percent in itertools.product(range(51), range(101)):
        exact = size * (1 - fractions.Fraction(percent, 100))
        k = masks.keep_count(size, percent / 100)
        assert k == int(np.round(size * (1.0 - percent / 100)))
        if abs(exact - math.floor(exact) - fractions.Fraction(1, 2)) > 1e-9:
            assert k == round(exact)


def test_keep_count_of_halves_rounds_to_even():
    assert [masks.keep_count(n, 0.5) for n in (1, 3, 5, 7)] == [0, 2, 2, 4]
    assert isinstance(masks.keep_count(np.int64(10), np.float32(0.5)), int)


def test_keep_count_of_a_large_size_is_exact_where_float32_is_not():
    size = 2**25 + 2  # times 0.5 needs 25 bits
    assert masks.keep_count(size, 0.5) == 2**24 + 1
    assert int(np.round(np.float32(size) * np.float32(0.5))) != 2**24 + 1


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, float("nan"), 90])
def test_keep_count_of_no_sparsity_raises(sparsity):
    with pytest.raises(ValueError, match=r"\[0, 1\].*Received: sparsity="):
        masks.keep_count(10, sparsity)


def test_keep_count_of_a_bad_size_raises():
    with pytest.raises(ValueError, match="Received: size=-1"):
        masks.keep_count(-1, 0.5)
    with pytest.raises(TypeError):
        masks.keep_count(1.5, 0.5)


@hypothesis.settings(max_examples=400)
@hypothesis.given(scores_and_k())
def test_top_k_mask_host_equals_a_stable_sort(case):
    scores, k = case
    mask = masks.top_k_mask_host(scores, k)
    assert mask.dtype == np.uint8
    assert mask.shape == scores.shape
    assert mask.sum() == k
    np.testing.assert_array_equal(mask, oracle(scores, k))


@hypothesis.settings(max_examples=20)
@hypothesis.given(scores_and_k())
def test_top_k_mask_device_in_eager_steps_equals_a_stable_sort(case):
    scores, k = case
    mask = masks.top_k_mask_device(tf.constant(scores), k)
    np.testing.assert_array_equal(mask, oracle(scores, k))


@pytest.mark.oldest
@hypothesis.settings(max_examples=25)
@hypothesis.given(
    st.tuples(*(scores_and_k(name, size) for name, size in COMPILED))
)
def test_top_k_masks_device_compiled_equals_the_hosts(cases):
    # As a tensor: Python numbers would be traced, and compiled, one by one.
    counts = tf.constant([k for _, k in cases], tf.int32)
    found, nans = masks.top_k_masks_device(
        [tf.constant(scores) for scores, _ in cases], counts
    )
    assert nans.numpy().tolist() == [0] * len(cases)
    for mask, (scores, k) in zip(found, cases, strict=True):
        assert mask.dtype == tf.uint8
        np.testing.assert_array_equal(mask, oracle(scores, k))
        np.testing.assert_array_equal(mask, masks.top_k_mask_host(scores, k))


@pytest.mark.parametrize("jit_compile", [False, True])
def test_top_k_masks_of_larger_tensors_agree_on_host_and_device(jit_compile):
    generator = np.random.default_rng(0)
    function = tf.function(masks.top_k_masks, jit_compile=jit_compile)
    normal = generator.normal(size=(3, 3, 8, 64))
    tiny = np.finfo(np.float16).tiny * normal
    for values in (normal, np.abs(normal), np.zeros_like(normal), tiny):
        arrays = [values.astype(dtype) for dtype, _ in DTYPES.values()]
        tensors = [tf.constant(array) for array in arrays]
        for sparsity in (0.0, 0.5, 0.9, 0.999, 1.0):
            counts = [masks.keep_count(values.size, sparsity)] * len(arrays)
            found, _ = function(tensors, tf.constant(counts))
            assert_masks_equal(found, arrays, counts)
            host = map(masks.top_k_mask_host, arrays, counts)
            assert_masks_equal(host, arrays, counts)
    assert function.experimental_get_tracing_count() == 1


def test_top_k_mask_device_in_a_graph_uses_no_sort():
    function = tf.function(masks.top_k_mask_device)
    graph = function.get_concrete_function(
        tf.TensorSpec([8], tf.float32), tf.TensorSpec([], tf.int32)
    ).graph.as_graph_def()
    used = {node.op for node in graph.node}
    used.update(n.op for f in graph.library.function for n in f.node_def)
    assert not {op for op in used if "Sort" in op or "TopK" in op}


def test_top_k_mask_device_of_k_out_of_range_takes_the_nearest_end():
    scores = tf.constant([1.0, -2.0, 3.0])
    assert masks.top_k_mask_device(scores, -1).numpy().tolist() == [0, 0, 0]
    for k in (9, tf.constant(2**40, tf.int64)):
        assert masks.top_k_mask_device(scores, k).numpy().tolist() == [1, 1, 1]


def test_top_k_masks_of_ties_keep_the_first():
    scores = np.array([[2, 1, 2], [1, 2, 0]], np.float32)
    expected = [[1, 1, 1], [0, 1, 0]]
    assert masks.top_k_mask_host(scores, 4).tolist() == expected
    device = masks.top_k_mask_device(tf.constant(scores), 4)
    assert device.numpy().tolist() == expected


def test_top_k_masks_of_strided_and_scalar_scores_have_their_shapes():
    scores = np.arange(12, dtype=np.float32).reshape(3, 4).T
    np.testing.assert_array_equal(
        masks.top_k_mask_host(scores, 5), oracle(scores, 5)
    )
    assert masks.top_k_mask_host(np.float32(1), 1).shape == ()
    assert masks.top_k_mask_device(tf.constant(1.0), 1).shape == ()


NAN_COUNTS = tf.function(masks.nan_counts, jit_compile=True)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_top_k_masks_of_nan_raise_on_the_host_and_count_on_the_device(
    name, sign
):
    dtype, _ = DTYPES[name]
    scores = np.array([1, np.nan, np.inf, -np.inf, np.nan], dtype)
    scores = np.copysign(scores, np.array(sign, dtype))
    for k in (0, 2, 5):
        with pytest.raises(ValueError, match="Received: 2 NaN"):
            masks.top_k_mask_host(scores, k)
    for nan_counts in (masks.nan_counts, NAN_COUNTS):
        assert nan_counts([tf.constant(scores)]).numpy().tolist() == [2]


@pytest.mark.parametrize("k", [-1, 4])
def test_top_k_mask_host_of_k_out_of_range_raises(k):
    with pytest.raises(ValueError, match=f"Received: k={k} for 3 scores"):
        masks.top_k_mask_host(np.ones(3, np.float32), k)


@pytest.mark.parametrize("dtype", [np.int32, ">f4", object, "S3"])
def test_top_k_mask_host_of_other_dtypes_raises(dtype):
    with pytest.raises(TypeError, match="Received: dtype="):
        masks.top_k_mask_host(np.ones(3).astype(dtype), 1)


def test_top_k_mask_device_of_other_dtypes_raises():
    with pytest.raises(TypeError, match="Received: dtype=int32"):
        masks.top_k_mask_device(tf.constant([1, 2]), 1)


@st.composite
def scores_of_few_values(draw):
    """Mostly equal ones, also NaN and both zeros, beyond the first few."""
    name = draw(st.sampled_from(sorted(DTYPES)))
    dtype, integer = DTYPES[name]
    nan = int(np.array(np.nan, dtype).view(integer))
    bits = st.sampled_from([*special_values(dtype, integer), nan])
    # More than the first few that are looked at before all others.
    size = draw(st.sampled_from((0, 1, 130) if name == "float32" else (130,)))
    scores = np.full(size, draw(bits), integer)
    if size and draw(st.booleans()):
        scores[draw(st.integers(0, size - 1))] = draw(bits)
    return scores.view(dtype)


ALL_EQUAL = tf.function(masks.all_equal_device, jit_compile=True)


@hypothesis.settings(max_examples=200)
@hypothesis.given(scores_of_few_values())
def test_all_equal_on_host_and_device_finds_the_same(scores):
    values = scores.astype(np.float64).tolist()  # exact for all dtypes here
    expected = bool(values) and all(value == values[0] for value in values)
    tensor = tf.constant(scores)
    assert masks.all_equal(scores) is expected
    assert masks.all_equal(tensor) is expected
    assert bool(masks.all_equal_device(tensor)) is expected
    assert bool(ALL_EQUAL(tensor)) is expected


def test_all_equal_of_any_shape_and_type_is_found():
    assert masks.all_equal(np.ones((3, 50, 2), np.float32)[:, ::2])
    assert masks.all_equal(np.float32(3)[None])
    assert masks.all_equal(tf.constant(3.0))
    assert not masks.all_equal(np.arange(130, dtype=np.float32).reshape(13, 10))
    # Of the ranking of a user.
    for scores in (np.full(130, 7), np.full(130, 0.5, ">f4")):
        assert masks.all_equal(scores)
        scores[-1] = 0
        assert not masks.all_equal(scores)
    assert masks.all_equal(tf.fill([130], 7))
    assert not masks.all_equal(tf.range(130) // 100)


# Rankings of many tensors.


def tensors_of_awkward_sizes(count, names=DTYPES, seed=0):
    """Arrays around the length of a row, with ties, and the k of each."""
    generator = np.random.default_rng(seed)
    shapes = [(), (0,), (1,), (7, 11), (1023,), (32, 32), (1025,), (3, 3, 400)]
    arrays, counts = [], []
    for i in range(count):
        shape = shapes[i % len(shapes)]
        values = generator.normal(size=shape)
        if i % 3:
            values = np.round(values, 1)
        dtype, _ = DTYPES[sorted(names)[i // len(shapes) % len(names)]]
        arrays.append(np.asarray(values, dtype))
        counts.append(int(generator.integers(0, arrays[-1].size + 1)))
    return arrays, counts


@pytest.mark.parametrize("count", [1, 54, 200])
def test_top_k_masks_of_many_tensors_equal_a_stable_sort(count):
    arrays, counts = tensors_of_awkward_sizes(count)
    found, nans = masks.top_k_masks(
        [tf.constant(array) for array in arrays], tf.constant(counts)
    )
    assert_masks_equal(found, arrays, counts)
    assert nans.numpy().tolist() == [0] * count


def test_top_k_masks_of_several_tables_equal_a_stable_sort(monkeypatch):
    arrays, counts = tensors_of_awkward_sizes(40, names=["float32", "float16"])
    monkeypatch.setattr(masks, "_MAX_TABLE_SIZE", 8 * masks._ROW)
    tensors = [tf.constant(array) for array in arrays]
    groups = masks._table_groups(tensors)
    assert len(groups) > 2
    assert sorted(itertools.chain(*groups)) == list(range(40))
    for group in groups:
        assert len({arrays[i].dtype for i in group}) == 1
        assert sum(arrays[i].size for i in group) <= 8 * masks._ROW
    found, _ = masks.top_k_masks(tensors, tf.constant(counts))
    assert_masks_equal(found, arrays, counts)


def test_top_k_masks_of_nan_count_them_by_tensor():
    arrays = [
        np.array([np.nan, -np.nan, 1, np.inf, -np.inf], dtype)
        for dtype, _ in DTYPES.values()
    ]
    arrays += [np.zeros(3, np.float32), np.full(1030, np.nan, np.float32)]
    _, nans = masks.top_k_masks(
        [tf.constant(array) for array in arrays],
        tf.zeros(len(arrays), tf.int32),
    )
    assert nans.numpy().tolist() == [2, 2, 2, 2, 0, 1030]


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ([2**16, 2**15], "fewer than 2\\*\\*31 elements"),
        ([None, 3], "static shape"),
    ],
)
def test_top_k_mask_device_of_a_shape_that_it_cannot_count_raises(
    shape, reason
):
    function = tf.function(masks.top_k_mask_device)
    with pytest.raises(ValueError, match=f"{reason}.*Received: shape="):
        function.get_concrete_function(
            tf.TensorSpec(shape, tf.float32), tf.TensorSpec([], tf.int32)
        )


def test_top_k_masks_in_a_graph_have_one_loop_and_small_constants():
    shapes = [(1000, 1000), (3, 3, 256, 256), (10,)]
    graph = (
        tf.function(masks.top_k_masks)
        .get_concrete_function(
            [tf.TensorSpec(shape, tf.float32) for shape in shapes],
            tf.TensorSpec([3], tf.int32),
        )
        .graph.as_graph_def()
    )
    assert sum("While" in node.op for node in graph.node) == 1
    # Of 1.6 million scores.
    assert graph.ByteSize() < 50_000


# As bounds from a sample can miss: all equal, few values, sorted, an outlier.
LARGE = {
    "normal": lambda generator, n: generator.normal(size=n),
    "rounded": lambda generator, n: np.round(generator.normal(size=n), 1),
    "two values": lambda generator, n: generator.integers(0, 2, size=n),
    "equal": lambda generator, n: np.ones(n),
    "sorted": lambda generator, n: np.arange(n),
    "outlier": lambda generator, n: np.arange(n) == n // 2,
}


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("kind", LARGE)
def test_top_k_mask_host_of_many_scores_equals_a_stable_sort(kind, name):
    generator = np.random.default_rng(0)
    scores = LARGE[kind](generator, 30_011).astype(DTYPES[name][0])
    for k in (1, 2, 300, 3_001, 15_000, 29_000, 30_010):
        mask = masks.top_k_mask_host(scores, k)
        np.testing.assert_array_equal(mask, oracle(scores, k))


def test_top_k_mask_host_of_a_misleading_sample_is_exact():
    size = 8_000
    scores = np.random.default_rng(0).normal(size=size).astype(np.float32)
    scores[:: round(size ** (1 / 3)) | 1] += 100  # All that are in the sample.
    keys = masks.ordered_integers_host(scores)
    for k in (1_000, 4_000):
        bounds = masks._likely_bounds(keys, k)
        assert masks._top_k_between(keys, k, *bounds) is None
        mask = masks.top_k_mask_host(scores, k)
        np.testing.assert_array_equal(mask, oracle(scores, k))


def test_top_k_masks_host_in_threads_equals_a_stable_sort(monkeypatch):
    monkeypatch.setattr(masks, "_SCORES_PER_THREAD", 100)
    monkeypatch.setattr(masks, "_cpu_count", lambda: 3)
    arrays, counts = tensors_of_awkward_sizes(54)
    threads = threading.active_count()
    found = masks.top_k_masks_host(arrays, counts)
    assert threading.active_count() == threads
    assert_masks_equal(found, arrays, counts)


def test_top_k_masks_host_in_threads_raises_the_first_error(monkeypatch):
    monkeypatch.setattr(masks, "_SCORES_PER_THREAD", 1)
    monkeypatch.setattr(masks, "_cpu_count", lambda: 2)
    arrays = [np.float32([1, 2, 3]), np.float32([np.nan]), np.ones(9)]
    threads = threading.active_count()
    with pytest.raises(ValueError, match="Received: 1 NaN"):
        masks.top_k_masks_host(arrays, [1, 1, 99])
    assert threading.active_count() == threads


def test_top_k_masks_host_of_a_small_model_starts_no_thread(monkeypatch):
    monkeypatch.setattr(
        masks.concurrent.futures, "ThreadPoolExecutor", pytest.fail
    )
    arrays, counts = tensors_of_awkward_sizes(8)
    assert_masks_equal(masks.top_k_masks_host(arrays, counts), arrays, counts)


def test_top_k_mask_host_leaves_the_scores_alone():
    scores = np.array([3.0, -0.0, 1.0, 2.0], np.float32)
    before = scores.copy()
    masks.top_k_mask_host(scores, 2)
    assert scores.tobytes() == before.tobytes()
