import functools
import hashlib
import importlib.util
import io

import hypothesis
import hypothesis.strategies as st
import pytest
import tensorflow as tf

from sos.datasets import libreoffice_help, subwords
from sos.errors import MissingPackageError, StorageError, UsageError

sentencepiece = pytest.importorskip("sentencepiece")
pytest.importorskip("tensorflow_text")

AWKWARD = [
    "",
    " ",
    "   leading, and  several  inside, and trailing   ",
    "\n",
    "a\nb\r\n",
    "\ttab\t",
    "😀 emoji 👩‍👩‍👧‍👦",
    "日本語の文章です。",
    "עברית وعربي",
    "Größe, u\u0308 and ü; ﬁ, ½, №",
    "\u00a0no-break\u2028separators\u3000\ufeff",
    "\x00a\x00",
    ". and .. at the beginning",
    "</s><pad> <unk> <0x0A>",
    "\ud7ff\ue000\uffff\U00010000\U0010ffff",
    "⁇, \ufffd and ▅",
    "ab" * 5000,
]


@functools.cache
def data():
    return libreoffice_help.load()


@functools.cache
def model():
    train = data().train
    return subwords.learn([*train.source, *train.target], 4000)


@functools.cache
def vocabulary():
    return subwords.Subwords(model())


@functools.cache
def reference():
    """The same vocabulary in sentencepiece itself."""
    return sentencepiece.SentencePieceProcessor(model_proto=model())


def round_trip(texts):
    tokens = vocabulary().tokenize(texts).to_tensor()
    return [text.decode() for text in vocabulary().detokenize(tokens).numpy()]


@pytest.mark.parametrize("size", [2000, 33_288])
def test_learn_has_exactly_as_many_entries(size):
    train = data().train
    learned = subwords.learn([*train.source, *train.target], size)
    processor = sentencepiece.SentencePieceProcessor(model_proto=learned)
    assert processor.vocab_size() == subwords.Subwords(learned).size == size
    # Each has a text of its own.
    assert len({processor.id_to_piece(i) for i in range(size)}) == size


def test_learn_again_gives_the_same_bytes():
    train = data().train
    sentences = (text for text in [*train.source, *train.target])
    assert subwords.learn(sentences, 4000) == model()


@pytest.mark.parametrize(
    ("sentences", "size", "message"),
    [
        ([], 300, "not empty. Received: none"),
        (["", ""], 300, "not empty. Received: none"),
        (["a"], 0, "`size` must be a positive"),
        (["a"], 300, r"size=300. Cause: Vocabulary size too high \(300\)"),
        (["a"], 3, "size=3. Cause: Vocabulary size is smaller than required"),
    ],
)
def test_learn_what_is_impossible_raises(sentences, size, message):
    with pytest.raises(UsageError, match=message):
        subwords.learn(sentences, size)


def test_subwords_describe_their_model():
    assert vocabulary().size == 4000
    assert vocabulary().model == model()
    expected = hashlib.sha256(model()).hexdigest()[:16]
    assert vocabulary().fingerprint == expected


@pytest.mark.oldest
def test_round_trip_of_2000_sentences_is_exact():
    sentences = data().train.source[:500] + data().train.target[:500]
    # None of these was learned from.
    sentences += data().validation.target[:500] + data().test.source[:500]
    assert len(sentences) == 2000
    assert round_trip(sentences) == sentences


@pytest.mark.oldest
def test_tokens_of_2000_sentences_are_those_of_sentencepiece():
    sentences = data().train.target[:1000] + data().validation.source[:1000]
    expected = [ids + [subwords.EOS] for ids in reference().encode(sentences)]
    tokens = vocabulary().tokenize(sentences)
    assert tokens.dtype == tf.int32
    assert tokens.to_list() == expected


@pytest.mark.oldest
@pytest.mark.parametrize("text", AWKWARD, ids=lambda text: ascii(text[:20]))
def test_round_trip_of_awkward_text_is_exact(text):
    assert round_trip([text]) == [text]
    expected = reference().encode(text) + [subwords.EOS]
    assert vocabulary().tokenize([text]).to_list() == [expected]


# sentencepiece writes a space as U+2581.
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\u2581"))


@hypothesis.settings(max_examples=50)
@hypothesis.given(
    st.lists(TEXTS | st.lists(TEXTS, max_size=5).map("  ".join), min_size=1)
)
def test_round_trip_of_any_text_is_exact(texts):
    assert round_trip(texts) == texts
    tokens = vocabulary().tokenize(texts).to_list()
    assert tokens == [reference().encode(t) + [subwords.EOS] for t in texts]
    # So that segments can be told by their ends.
    for sentence in tokens:
        assert subwords.PAD not in sentence
        assert sentence.index(subwords.EOS) == len(sentence) - 1


def test_round_trip_of_the_sign_for_a_space_is_a_space():
    assert round_trip(["a\u2581b"]) == ["a b"]


@hypothesis.settings(max_examples=50)
@hypothesis.given(st.binary())
def test_tokenize_invalid_utf8_replaces_it(content):
    tokens = vocabulary().tokenize([content]).to_tensor()
    text = vocabulary().detokenize(tokens).numpy()[0].decode()
    expected = content.decode("utf-8", "replace").replace("\u2581", " ")
    # They differ in how many signs replace several bytes.
    assert text.replace("\ufffd", "") == expected.replace("\ufffd", "")
    assert ("\ufffd" in text) == ("\ufffd" in expected)


@pytest.mark.oldest
def test_detokenize_drops_padding_and_all_after_the_end():
    a, b = reference().encode("a b")
    tokens = [
        [a, b, subwords.EOS, subwords.PAD],
        [subwords.PAD, a, subwords.EOS, b],
        [subwords.EOS, a, b, subwords.EOS],
        [a, subwords.PAD, b, b],
    ]
    expected = [b"a b", b"a", b"", b"a b b"]
    assert vocabulary().detokenize(tokens).numpy().tolist() == expected


@hypothesis.settings(max_examples=30)
@hypothesis.given(st.lists(st.integers(0, 3999), max_size=12))
def test_detokenize_of_any_tokens_is_that_of_sentencepiece(tokens):
    end = tokens.index(subwords.EOS) if subwords.EOS in tokens else None
    kept = [token for token in tokens[:end] if token != subwords.PAD]
    text = vocabulary().detokenize(tf.constant([tokens], tf.int32)).numpy()[0]
    assert text.decode() == reference().decode(kept)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (2, 3, 4), (2, 0, 4), (5,)])
def test_detokenize_keeps_the_leading_shape(shape):
    tokens = tf.fill(shape, reference().encode("a")[0])
    texts = vocabulary().detokenize(tokens)
    assert texts.shape == shape[:-1]
    expected = " ".join(["a"] * shape[-1]).encode()
    assert set(tf.reshape(texts, [-1]).numpy()) <= {expected}


def test_tokenize_keeps_the_shape():
    tokens = vocabulary().tokenize([["a", ""], ["a", "a"]])
    (a,) = reference().encode("a")
    end = subwords.EOS
    assert tokens.to_list() == [[[a, end], [end]], [[a, end], [a, end]]]
    assert vocabulary().tokenize("a").numpy().tolist() == [a, end]
    assert vocabulary().tokenize(tf.zeros([0], tf.string)).to_list() == []


@pytest.mark.oldest
def test_saved_model_contains_the_vocabulary(tmp_path):
    class Echo(tf.Module):
        def __init__(self):
            super().__init__()
            self.subwords = vocabulary()

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
        def __call__(self, texts):
            tokens = self.subwords.tokenize(texts).to_tensor()
            return self.subwords.detokenize(tokens)

    echo = Echo()
    tf.saved_model.save(echo, tmp_path / "echo")
    loaded = tf.saved_model.load(tmp_path / "echo")
    texts = [text.encode() for text in AWKWARD]
    assert loaded(texts).numpy().tolist() == texts


def test_subwords_made_in_the_scope_of_a_strategy_work():
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        found = subwords.Subwords(model())
    assert found.tokenize(["a"]).to_list() == [[reference().encode("a")[0], 1]]


def test_subwords_made_in_a_graph_work_in_it():
    @tf.function
    def trace(texts):
        return subwords.Subwords(model()).tokenize(texts).to_tensor()

    expected = vocabulary().tokenize(["a"]).to_list()
    assert trace(tf.constant(["a"])).numpy().tolist() == expected


def test_save_and_load_keep_the_vocabulary(tmp_path):
    path = tmp_path / "new" / "vocabulary.model"
    vocabulary().save(path)
    assert path.read_bytes() == model()
    assert subwords.Subwords.load(path).fingerprint == vocabulary().fingerprint
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_save_into_a_file_raises(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not be written"):
        vocabulary().save(tmp_path / "file" / "vocabulary.model")


def test_load_a_missing_file_raises(tmp_path):
    with pytest.raises(StorageError, match="models.learn_vocabulary"):
        subwords.Subwords.load(tmp_path / "absent.model")


def test_load_a_damaged_file_names_it(tmp_path):
    path = tmp_path / "vocabulary.model"
    path.write_bytes(model()[:1000])
    with pytest.raises(UsageError, match="vocabulary.model: .* 1000 bytes"):
        subwords.Subwords.load(path)


@pytest.mark.parametrize("content", [b"", b"text", None, 3])
def test_subwords_of_no_model_raises(content):
    with pytest.raises(UsageError, match="must be a model of sentencepiece"):
        subwords.Subwords(content)


def other_model(**changed):
    """Returns the model of a vocabulary with other settings."""
    settings = {
        "vocab_size": 600,
        "model_type": "bpe",
        "pad_id": 0,
        "eos_id": 1,
        "unk_id": 2,
        "bos_id": -1,
        "character_coverage": 1.0,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    }
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(data().test.source),
        model_writer=content,
        minloglevel=2,
        **{**settings, **changed},
    )
    return content.getvalue()


@pytest.mark.parametrize(
    "changed",
    [
        {"pad_id": -1, "eos_id": 0, "unk_id": 1},
        {"eos_id": 2, "unk_id": 1},
        {"pad_id": 3},
        {"pad_id": 1, "eos_id": 0},
        {"byte_fallback": False},
        {"eos_id": -1},
    ],
    ids=str,
)
def test_subwords_with_other_entries_raises(changed):
    with pytest.raises(UsageError, match="<pad> as entry 0, </s> as 1"):
        subwords.Subwords(other_model(**changed))


@pytest.mark.parametrize(
    "changed",
    [
        {"normalization_rule_name": "nmt_nfkc"},
        {"normalization_rule_name": "nfkc"},
        {"remove_extra_whitespaces": True},
    ],
    ids=str,
)
def test_subwords_that_normalize_raises(changed):
    with pytest.raises(UsageError, match="every sentence back exactly"):
        subwords.Subwords(other_model(**changed))


def test_subwords_of_a_unigram_model_work():
    found = subwords.Subwords(other_model(model_type="unigram"))
    tokens = found.tokenize(["  A sentence. "]).to_tensor()
    assert found.detokenize(tokens).numpy().tolist() == [b"  A sentence. "]


@pytest.mark.parametrize(
    ("call", "package"),
    [
        (lambda: subwords.learn(["a"], 300), "sentencepiece"),
        (lambda: subwords.Subwords(b""), "tensorflow-text"),
    ],
)
def test_missing_package_names_the_extra(monkeypatch, call, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = rf"{package}.*state-of-sparsity\[translation\]"
    with pytest.raises(MissingPackageError, match=message):
        call()
