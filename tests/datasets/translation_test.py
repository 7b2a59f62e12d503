import functools
import importlib.util

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tensorflow as tf

from sos.datasets import libreoffice_help, subwords, translation
from sos.datasets.subwords import EOS, PAD
from sos.datasets.translation import PackedPairs, Pairs, TranslationData
from sos.errors import MissingPackageError, StorageError, UsageError

tfds = pytest.importorskip("tensorflow_datasets")


def context(hosts=1, host=0, replicas=1):
    return tf.distribute.InputContext(hosts, host, hosts * replicas)


class Numbers:
    """A vocabulary whose sentences are its tokens in decimal digits."""

    def __init__(self, size):
        self.size = size


def read_numbers(sentences, vocabulary, dtype):
    """Tokenizes without a graph, which is faster than tracing one."""
    tokens = [[*map(int, text.split()), EOS] for text in sentences]
    return (
        np.array(sum(tokens, []), dtype),
        np.array([len(sentence) for sentence in tokens], np.int32),
    )


def sentences(lengths, start=3):
    """Sentences with as many tokens with the end, and no two alike."""
    return [
        " ".join(str(start + (n * 7 + i) % 900) for i in range(length - 1))
        for n, length in enumerate(lengths)
    ]


def numbered(lengths):
    """Pairs of given lengths of source and target."""
    return Pairs(
        sentences([a for a, _ in lengths]),
        sentences([b for _, b in lengths], start=50),
    )


def packed(train, validation=((2, 2),), size=1000, **arguments):
    data = TranslationData(numbered(train), numbered(validation), numbered([]))
    defaults = {
        "seed": 0,
        "batch_size": 1,
        "source_length": 8,
        "target_length": 9,
        "eval_batch_size": 1,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(translation, "_tokenize", read_numbers)
        return PackedPairs(data, Numbers(size), **{**defaults, **arguments})


def read_rows(batches):
    """Returns the pairs in each row, and checks their segments and padding."""
    rows = []
    for batch in batches:
        batch = {name: value.numpy() for name, value in batch.items()}
        weights = batch.get("weight", np.ones(len(batch["source"])))
        for i in np.flatnonzero(weights):
            sides = []
            for side in ("source", "target"):
                tokens, segments = batch[side][i], batch[f"{side}_segments"][i]
                count = np.count_nonzero(tokens)
                # Padding comes last.
                assert (tokens[count:] == PAD).all()
                assert (segments[count:] == 0).all()
                found = []
                for segment in range(1, segments.max() + 1):
                    (places,) = np.nonzero(segments == segment)
                    # One piece, which ends where its sentence does.
                    assert (np.diff(places) == 1).all()
                    sentence = tokens[places].tolist()
                    assert sentence.index(EOS) == len(sentence) - 1
                    found.append(" ".join(map(str, sentence[:-1])))
                assert (np.diff(segments[:count]) >= 0).all()
                sides.append(found)
            rows.append(list(zip(*sides, strict=True)))
    return rows


def epoch(source, rows, batch_size=1):
    return source.train(context(), 0).take(rows // batch_size)


LENGTHS = st.lists(
    st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=40
)


@hypothesis.settings(max_examples=8)
@hypothesis.given(LENGTHS, st.integers(0, 2**32))
def test_train_rows_hold_every_pair_once_and_whole(lengths, seed):
    pairs = numbered(lengths)
    kept = sorted(
        (source, target)
        for source, target, (a, b) in zip(
            pairs.source, pairs.target, lengths, strict=True
        )
        if 1 < a <= 8 and 1 < b <= 9
    )
    if not kept:
        with pytest.raises(UsageError, match="at least one batch"):
            packed(lengths, seed=seed)
        return
    source = packed(lengths, seed=seed)
    rows = read_rows(epoch(source, source.train_rows))
    assert len(rows) == source.train_rows
    assert sorted(pair for row in rows for pair in row) == kept
    assert all(rows)
    assert source.train_pairs == len(kept)
    assert source.dropped_pairs == len(lengths) - len(kept)


@hypothesis.settings(max_examples=8)
@hypothesis.given(
    st.lists(st.tuples(st.integers(1, 8), st.integers(1, 9)), min_size=1),
    st.integers(1, 5),
)
def test_eval_rows_hold_every_pair_once_and_whole(lengths, batch_size):
    source = packed([(2, 2)], lengths, eval_batch_size=batch_size)
    batches = source.eval(context())
    rows = read_rows(batches)
    pairs = numbered(lengths)
    expected = sorted(zip(pairs.source, pairs.target, strict=True))
    assert sorted(pair for row in rows for pair in row) == expected
    assert (source.eval_pairs, source.eval_rows) == (len(lengths), len(rows))
    assert int(batches.cardinality()) == -(-len(rows) // batch_size)


@hypothesis.settings(max_examples=50)
@hypothesis.given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(0, 400),
    st.integers(0, 2**32),
    st.integers(1, 50),
    st.integers(1, 8),
)
def test_pack_puts_every_pair_where_it_fits(
    source_size, target_size, pairs, seed, group, open_rows
):
    generator = np.random.default_rng(seed)
    source = generator.integers(1, source_size, pairs, endpoint=True)
    target = generator.integers(1, target_size, pairs, endpoint=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(translation, "_GROUP", group)
        patch.setattr(translation, "_OPEN_ROWS", open_rows)
        rows = translation.pack(source, target, source_size, target_size)
        again = translation.pack(source, target, source_size, target_size)
    np.testing.assert_array_equal(rows, again)
    assert rows.shape == (pairs,)
    assert np.array_equal(np.unique(rows), np.arange(rows.max(initial=-1) + 1))
    for lengths, size in ((source, source_size), (target, target_size)):
        assert np.bincount(rows, lengths).max(initial=0) <= size


def test_pack_takes_the_row_with_the_fewest_places_left():
    # Each line: the lengths of a pair, and the row that it belongs to.
    pairs = [(6, 6, 0), (5, 5, 1), (4, 4, 0), (5, 2, 1), (9, 9, 2), (1, 1, 2)]
    source, target, expected = np.transpose(pairs)
    rows = translation.pack(source, target, 10, 10)
    assert rows.tolist() == expected.tolist()


def test_pack_respects_both_sides():
    # By their sources, all would fit into one row.
    rows = translation.pack(np.full(4, 1), np.full(4, 6), 10, 10)
    assert sorted(rows) == [0, 1, 2, 3]


def wmt_lengths(count, seed=0):
    """Lengths of 30 and 33 tokens on average, of correlation 0.95."""
    generator = np.random.default_rng(seed)
    source = np.exp(3.2 + 0.65 * generator.normal(size=count))
    target = source * np.exp(0.08 + 0.18 * generator.normal(size=count))
    return tuple(
        np.clip(side, 2, 256).astype(np.int32) for side in (source, target)
    )


def batch_fills(rows, lengths, sizes, batch_size, epochs=20):
    """Fractions of the places of batches that are tokens, in some epochs."""
    tokens = np.bincount(rows, lengths[0] + lengths[1])
    whole = len(tokens) // batch_size * batch_size
    for seed in range(epochs):
        order = np.random.default_rng(seed).permutation(len(tokens))[:whole]
        means = tokens[order].reshape(-1, batch_size).mean(axis=1)
        yield from means / sum(sizes)


@pytest.mark.parametrize(
    ("source_size", "fill"), [(256, (0.89, 0.98)), (236, (0.95, 0.96))]
)
def test_pack_fills_rows_of_lengths_like_those_of_wmt(source_size, fill):
    lengths = wmt_lengths(100_000)
    sizes = (source_size, 256)
    lengths = np.stack(lengths)[:, (lengths[0] <= source_size)]
    rows = translation.pack(*lengths, *sizes)
    found = lengths.sum(axis=1) / sizes / (rows.max() + 1)
    assert (found > fill).all()
    # Also that of every batch, except for the one with the last row.
    fills = np.array(list(batch_fills(rows, lengths, sizes, 8)))
    assert np.mean(fills < 0.9) < 1e-3
    assert fills.min() > 0.8
    assert min(batch_fills(rows, lengths, sizes, 64)) > 0.9


@functools.cache
def embedded():
    data = libreoffice_help.load()
    model = subwords.learn([*data.train.source, *data.train.target], 4000)
    return data, subwords.Subwords(model)


def test_packed_embedded_pairs_fill_their_rows():
    data, vocabulary = embedded()
    source = PackedPairs(
        data,
        vocabulary,
        seed=0,
        batch_size=8,
        source_length=224,
        eval_batch_size=8,
    )
    sizes = np.array([224, 256])
    assert min(source.fill) > 0.95
    assert (source.train_pairs, source.dropped_pairs) == (20_267, 0)
    # `fill` is what it says.
    batches = source.train(context(), 0).take(source.train_rows // 8)
    fills = [
        [np.mean(batch[side] != PAD) for side in ("source", "target")]
        for batch in batches
    ]
    np.testing.assert_allclose(np.mean(fills, axis=0), source.fill, atol=0.002)
    totals = np.dot(fills, sizes) / sizes.sum()
    # Only the batch with the last row may have fewer.
    assert np.sum(totals < 0.9) <= 1


@pytest.mark.oldest
def test_packed_embedded_pairs_come_back_as_text():
    data, vocabulary = embedded()
    small = TranslationData(
        Pairs(data.train.source[:300], data.train.target[:300]),
        data.validation,
        data.test,
    )
    source = PackedPairs(
        small, vocabulary, seed=3, batch_size=1, eval_batch_size=100
    )
    for batches, pairs in (
        (epoch(source, source.train_rows), small.train),
        (source.eval(context()), small.validation),
    ):
        found = [pair for row in read_rows(batches) for pair in row]
        tokens = tf.ragged.constant(
            [[int(token) for token in text.split()] for text in sum(found, ())]
        )
        texts = vocabulary.detokenize(tokens.to_tensor()).numpy()
        texts = [text.decode() for text in texts]
        found = zip(texts[::2], texts[1::2], strict=True)
        expected = zip(pairs.source, pairs.target, strict=True)
        assert sorted(found) == sorted(expected)


def test_packing_a_million_pairs_takes_seconds():
    import time

    lengths = wmt_lengths(1_000_000)
    start = time.process_time()
    rows = translation.pack(*lengths, 256, 256)
    assert time.process_time() - start < 10
    assert len(rows) == 1_000_000


def many(count=60, seed=0):
    generator = np.random.default_rng(seed)
    return [tuple(pair) for pair in generator.integers(2, 8, (count, 2))]


def as_lists(batches):
    return [
        {name: value.numpy().tolist() for name, value in batch.items()}
        for batch in batches
    ]


@pytest.mark.oldest
def test_train_batches_have_static_shapes_and_int32():
    batches = packed(many(), batch_size=4).train(context(replicas=2), 0)
    shapes = {"source": [2, 8], "target": [2, 9]}
    assert set(batches.element_spec) == {
        *("source", "source_segments", "target", "target_segments")
    }
    for name, spec in batches.element_spec.items():
        assert spec.dtype == tf.int32
        assert spec.shape == shapes[name.removesuffix("_segments")]


def test_eval_batches_have_static_shapes_and_weights():
    source = packed(many(), many(), eval_batch_size=5)
    batches = source.eval(context(replicas=2))
    assert batches.element_spec["source"].shape == [2, 8]
    assert batches.element_spec["weight"].shape == [2]
    assert batches.element_spec["weight"].dtype == tf.float32
    weights = sum(float(tf.reduce_sum(batch["weight"])) for batch in batches)
    assert weights == source.eval_rows


def test_train_again_is_the_same_and_another_seed_is_not():
    first, again = packed(many(), seed=1), packed(many(), seed=1)
    other = packed(many(), seed=2)
    expected = as_lists(first.train(context(), 0).take(10))
    assert as_lists(again.train(context(), 0).take(10)) == expected
    assert as_lists(other.train(context(), 0).take(10)) != expected
    rows = [
        sorted(sorted(row) for row in read_rows(epoch(each, each.train_rows)))
        for each in (first, other)
    ]
    # Other pairs share a row.
    assert rows[0] != rows[1]


def test_train_epochs_have_the_same_rows_in_other_orders():
    source = packed(many())
    count = source.train_rows
    rows = read_rows(source.train(context(), 0).take(2 * count))
    assert rows[:count] != rows[count:]
    assert sorted(rows[:count]) == sorted(rows[count:])


@pytest.mark.parametrize("step", [1, 3, 40])
def test_train_resumes_at_a_step(step):
    source = packed(many(), batch_size=2)
    expected = as_lists(source.train(context(), 0).take(step + 4))[step:]
    assert as_lists(source.train(context(), step).take(4)) == expected


def test_train_on_hosts_and_replicas_shares_the_batches():
    source = packed(many(), batch_size=4)
    whole = as_lists(source.train(context(), 2).take(3))
    hosts = [
        as_lists(source.train(context(2, host, replicas=2), 2).take(6))
        for host in range(2)
    ]
    for step, batch in enumerate(whole):
        parts = [
            hosts[host][2 * step + replica]
            for host in range(2)
            for replica in range(2)
        ]
        for name, rows in batch.items():
            assert rows == [row for part in parts for row in part[name]]


def test_eval_on_hosts_and_replicas_has_every_row_once():
    source = packed(many(), many(), eval_batch_size=8)
    expected = read_rows(source.eval(context()))
    found = []
    counts = set()
    for host in range(2):
        batches = source.eval(context(2, host, replicas=2))
        counts.add(int(batches.cardinality()))
        found += read_rows(batches)
    assert sorted(found) == sorted(expected)
    assert len(counts) == 1


def test_train_without_enough_rows_raises():
    with pytest.raises(
        UsageError, match="batch_size=3 rows.*1 are empty.*in 1"
    ):
        packed([(2, 2), (20, 3)], batch_size=3)
    with pytest.raises(UsageError, match="for 0 pairs"):
        packed([])


def test_long_validation_pair_raises_and_is_named():
    with pytest.raises(UsageError, match="pair 1, .* of 4 and 10 tokens; 2 pa"):
        packed([(2, 2)], [(8, 9), (4, 10), (9, 1)])


def test_empty_validation_pairs_have_no_rows():
    source = packed([(2, 2)], [])
    assert (source.eval_pairs, source.eval_rows) == (0, 0)


def test_one_pair_as_long_as_a_row_fills_it():
    source = packed([(8, 9)])
    assert source.fill == (1.0, 1.0)
    (batch,) = source.train(context(), 0).take(1)
    assert batch["source_segments"].numpy().tolist() == [[1] * 8]
    assert batch["target"].numpy()[0, -1] == EOS


@pytest.mark.parametrize(
    "name", ["batch_size", "source_length", "target_length", "eval_batch_size"]
)
def test_packed_pairs_argument_below_1_raises(name):
    with pytest.raises(UsageError, match=f"`{name}` must be at least 1"):
        packed([(2, 2)], **{name: 0})


@pytest.mark.parametrize(
    ("size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.int32)]
)
def test_rows_are_held_in_few_bytes(size, dtype):
    source = packed([(2, 2)], size=size)
    assert source._train["source"].dtype == dtype
    assert source._eval["target"].dtype == dtype


def test_blank_and_odd_sentences_are_dropped_or_replaced():
    _, vocabulary = embedded()
    # A lone surrogate has no encoding.
    pairs = Pairs(
        ["a", "", "a", " \t", "\ud800b"], ["b", "b", " ", "b", "c\x00"]
    )
    source = PackedPairs(
        TranslationData(pairs, Pairs(["a"], [""]), pairs),
        vocabulary,
        seed=0,
        batch_size=1,
        eval_batch_size=1,
    )
    assert (source.train_pairs, source.dropped_pairs) == (2, 3)
    (batch,) = source.train(context(), 0).take(1)
    texts = {
        vocabulary.detokenize(
            tf.where(batch[f"{side}_segments"] == segment, batch[side], PAD)
        ).numpy()[0]
        for side in ("source", "target")
        for segment in (1, 2)
    }
    assert texts == {b"a", b"b", b"?b", b"c\x00"}
    # An empty reference is evaluated.
    (row,) = read_rows(source.eval(context()))
    assert row[0][1] == ""


def test_pairs_of_other_numbers_raise():
    with pytest.raises(UsageError, match="2 sentences and 1 translations"):
        Pairs(["a", "b"], ["c"])


@pytest.fixture
def files(tmp_path):
    """Writes the files of a data set and returns their directory."""

    def write(**changed):
        contents = {
            "train_en": b"one\ntwo\n",
            "train_de": b"eins\nzwei\n",
            "validation_en": b"three\n",
            "validation_de": b"drei\n",
            "test_en": b"four\n",
            "test_de": b"vier\n",
            **changed,
        }
        for name, content in contents.items():
            path = tmp_path / name.replace("_", ".")
            if content is not None:
                path.write_bytes(content)
        return tmp_path

    return write


def test_load_files_reads_the_lines(files):
    data = translation.load_files(files())
    assert data.train.source == ["one", "two"]
    assert data.train.target == ["eins", "zwei"]
    assert (data.validation.source, data.test.target) == (["three"], ["vier"])
    reverse = translation.load_files(files(), source="de", target="en")
    assert reverse.train.source == ["eins", "zwei"]


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"a\nb", ["a", "b"]),
        (b"a\r\nb\r\n", ["a", "b"]),
        (b"\n\n", ["", ""]),
        (
            "a\u2028a\x0b\x0c\x85\nb\rb\n".encode(),
            ["a\u2028a\x0b\x0c\x85", "b\rb"],
        ),
        (b"\xef\xbb\xbfa\n b \n", ["a", " b "]),
        (b"a\n\n", ["a", ""]),
    ],
)
def test_load_files_ends_lines_at_line_feeds_only(files, content, lines):
    assert translation.load_files(files(train_en=content)).train.source == lines


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"test_de": None}, "Missing: .*test.de"),
        ({"train_en": b"one\n"}, "1 lines in .*train.en and 2 in .*train.de"),
        ({"train_de": b""}, "at least one line. Received: .*train.de"),
        (
            {"test_en": b"four\nfive\n", "test_de": b"vier\n \n"},
            "must not be empty.*test.de, line 2",
        ),
        ({"validation_en": b"\n"}, "validation.en, line 1"),
        ({"train_en": b"one\n\xfctwo"}, "train.en, in which line 2 .* 0xfc"),
    ],
    ids=str,
)
def test_load_files_of_invalid_ones_raises(files, changed, message):
    with pytest.raises(UsageError, match=message):
        translation.load_files(files(**changed))


def test_load_files_of_one_language_raises(files):
    with pytest.raises(UsageError, match="two languages"):
        translation.load_files(files(), source="en", target="en")


def test_load_files_of_an_unreadable_file_raises(files):
    directory = files(train_en=None)
    (directory / "train.en").mkdir()
    with pytest.raises(StorageError, match="train.en cannot be read"):
        translation.load_files(directory)


def test_load_chooses_by_the_name(files):
    embedded_pairs = translation.load("libreoffice_help")
    assert len(embedded_pairs.test) == 848
    reverse = translation.load("libreoffice_help", source="de", target="en")
    assert reverse.test.source == embedded_pairs.test.target
    assert translation.load(str(files())).test.source == ["four"]


def test_load_embedded_pairs_of_other_languages_raises():
    with pytest.raises(UsageError, match="'en' and 'de'. Received.*'fr'"):
        translation.load("libreoffice_help", target="fr")


def test_load_a_missing_directory_raises(tmp_path):
    with pytest.raises(UsageError, match="absent', which is none of these"):
        translation.load(str(tmp_path / "absent"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data directory with a tiny data set in the format of WMT'14."""
    directory = tmp_path_factory.mktemp("tfds")
    target = directory / "wmt14_translate" / "de-en" / "1.0.0"
    target.mkdir(parents=True)
    features = tfds.features.Translation(languages=("de", "en"))
    infos = []
    for split, count in (("train", 2500), ("validation", 3), ("test", 2)):
        path = target / f"wmt14_translate-{split}.tfrecord-00000-of-00001"
        with tf.io.TFRecordWriter(str(path)) as writer:
            for i in range(count):
                pair = {"en": f"{split} {i} cat", "de": f"{split} {i} Kätzchen"}
                writer.write(features.serialize_example(pair))
        infos.append(
            tfds.core.SplitInfo(name=split, shard_lengths=[count], num_bytes=1)
        )
    tfds.folder_dataset.write_metadata(
        data_dir=target,
        features=features,
        split_infos=infos,
        version="1.0.0",
        check_data=False,
    )
    return directory


def test_load_tfds_reads_wmt14(prepared):
    data = translation.load("wmt14_translate/de-en", prepared)
    assert [len(data.train), len(data.validation), len(data.test)] == [
        *(2500, 3, 2)
    ]
    assert data.train.source == [f"train {i} cat" for i in range(2500)]
    assert data.test.target == ["test 0 Kätzchen", "test 1 Kätzchen"]
    reverse = translation.load_tfds(
        directory=prepared, source="de", target="en"
    )
    assert reverse.validation.source[2] == "validation 2 Kätzchen"


def test_load_tfds_reads_the_directory_itself(prepared):
    path = prepared / "wmt14_translate" / "de-en" / "1.0.0"
    assert len(translation.load("", path).test) == 2
    assert len(translation.load(str(path)).test) == 2


def test_load_a_name_that_is_also_a_directory_is_that_of_tfds(
    prepared, monkeypatch
):
    monkeypatch.chdir(prepared)
    # It is not among the default data.
    with pytest.raises(UsageError, match="is not prepared"):
        translation.load("wmt14_translate/de-en")


def test_load_tfds_of_other_languages_raises(prepared):
    with pytest.raises(UsageError, match="target='fr'.*features de, en"):
        translation.load_tfds(directory=prepared, target="fr")


def test_load_tfds_without_a_split_raises(prepared, tmp_path):
    target = tmp_path / "pairs" / "1.0.0"
    target.mkdir(parents=True)
    (target / "pairs-train.tfrecord-00000-of-00001").write_bytes(b"")
    tfds.folder_dataset.write_metadata(
        data_dir=target,
        features=tfds.features.Translation(languages=("de", "en")),
        split_infos=[
            tfds.core.SplitInfo(name="train", shard_lengths=[1], num_bytes=1)
        ],
        version="1.0.0",
        check_data=False,
    )
    with pytest.raises(UsageError, match="validation, test.*the splits train"):
        translation.load_tfds("pairs", tmp_path)


def test_load_tfds_of_images_raises(tmp_path):
    target = tmp_path / "images" / "1.0.0"
    target.mkdir(parents=True)
    (target / "images-train.tfrecord-00000-of-00001").write_bytes(b"")
    tfds.folder_dataset.write_metadata(
        data_dir=target,
        features=tfds.features.FeaturesDict({"label": tf.int64}),
        split_infos=[
            tfds.core.SplitInfo(name="train", shard_lengths=[1], num_bytes=1)
        ],
        version="1.0.0",
        check_data=False,
    )
    with pytest.raises(UsageError, match="with the features label"):
        translation.load_tfds("images", tmp_path)


def test_load_tfds_that_is_not_prepared_says_how(tmp_path):
    with pytest.raises(UsageError, match="download_and_prepare.*'libreoffice"):
        translation.load("wmt14_translate/de-en", tmp_path)


def test_load_tfds_without_the_package_names_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match="tensorflow-datasets"):
        translation.load_tfds()
