"""Subwords: sentences as sequences of integers, and back.

A vocabulary is learned by byte-pair encoding (Sennrich, Haddow and Birch 2016,
arXiv 1508.07909) with the package sentencepiece. `Subwords` applies it inside a
TensorFlow graph, by tensorflow-text: in an input pipeline, and in a SavedModel
whose inputs and outputs are strings.

Every sentence comes back exactly, with one exception: sentencepiece writes a
space as "▁" (U+2581), so that this character comes back as a space. Characters
that the vocabulary lacks become their bytes in UTF-8.

Difference from the study: it used the subword tokenizer of Tensor2Tensor, whose
vocabulary of 33,288 entries is not published in a format of today. This one
has as many when asked for.
"""

import hashlib
import importlib
import importlib.util
import io
import itertools
import os
from collections.abc import Iterable
from typing import Any

import tensorflow as tf

from sos import startup
from sos.errors import MissingPackageError, StorageError, UsageError, reason
from sos.files import write_bytes

#: Padding, the end of a sentence, and an unknown part of one. As characters
#: fall back to bytes, tokenization never gives the last.
PAD, EOS, UNKNOWN = 0, 1, 2

# A byte of an ASCII character, which every vocabulary of `learn` has.
_BYTE, _CHARACTER = "<0x2E>", "."
# Spaces at both ends, several and other ones, a ligature, decomposed umlauts
# and the last code point: what normalization would change.
_PROBE = "  \t½ ﬁ  u\u0308\u00a0\n\U0010ffff  "


def learn(sentences: Iterable[str], size: int) -> bytes:
    """Learns a vocabulary of subwords by byte-pair encoding.

    The result is a function of the sentences and the size. Texts are taken as
    they are: nothing is normalized, and every character of the sentences is an
    entry, except that sentences of more than 4,192 bytes in UTF-8 are not
    learned from.

    Args:
        sentences: Sentences of all languages that share the vocabulary. They
            are all held in memory.
        size: Number of entries, among them padding, the end of a sentence, the
            unknown, and 256 bytes.

    Returns:
        The model, a protocol buffer of sentencepiece, for `Subwords`.

    Raises:
        UsageError: If there is no text; or if the sentences have too many
            characters, or too few different parts, for exactly `size` entries.
        MissingPackageError: If sentencepiece is not installed.

    Example:
    >>> from sos.datasets import subwords
    >>> model = subwords.learn(["a cat", "a cab"] * 10, size=269)
    >>> subwords.Subwords(model).size
    269
    """
    sentencepiece = _import("sentencepiece", "sentencepiece")
    if size < 1:
        raise UsageError(
            f"`size` must be a positive number of entries. Received: {size}"
        )
    texts = (encode(text) for text in sentences if text)
    first = next(texts, None)
    if first is None:
        raise UsageError(
            "A vocabulary is learned from at least one sentence that is not "
            "empty. Received: none"
        )

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain([first], texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=size,
            pad_id=PAD,
            eos_id=EOS,
            unk_id=UNKNOWN,
            bos_id=-1,
            # The following make sentences come back exactly.
            character_coverage=1.0,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            # Errors only, which are raised.
            minloglevel=2,
        )
    except RuntimeError as error:
        # The message begins with the place in the source and the condition.
        message = str(error).rpartition("] ")[2].partition(". Increase")[0]
        raise UsageError(
            "The sentences must have enough different parts, and few enough "
            f"characters, for a vocabulary of exactly `size` entries. Received:"
            f" size={size}. Cause: {message.strip(' .') or error}"
        ) from error
    return model.getvalue()


def read_model(path: str | os.PathLike) -> bytes:
    """Reads the model of a vocabulary, without looking into it.

    Args:
        path: The model file; may be remote, such as a `gs://` path.

    Raises:
        StorageError: If the file cannot be read.
    """
    path = os.path.expanduser(os.fspath(path))
    try:
        with tf.io.gfile.GFile(path, "rb") as file:
            return file.read()
    except (tf.errors.OpError, OSError) as error:
        raise StorageError(
            f"The vocabulary {path} cannot be read: {reason(error)}. "
            "Correct the path, or learn one with models.learn_vocabulary."
        ) from error


def fingerprint(model: bytes) -> str:
    """Returns the fingerprint of a vocabulary, 16 hexadecimal digits.

    They are the first ones of the SHA-256 of its model.
    """
    return hashlib.sha256(model).hexdigest()[:16]


def encode(sentence: str) -> bytes:
    """Encodes a sentence in UTF-8, lone surrogates, which have none, as "?"."""
    return sentence.encode("utf-8", "replace")


class Subwords(tf.Module):
    """A vocabulary of subwords that tokenizes strings inside a graph.

    A SavedModel of a module that has this one as an attribute contains the
    vocabulary. The process that loads it must import tensorflow_text first.

    Args:
        model: The content of a model file of sentencepiece, such as `learn`
            returns.

    Attributes:
        model: The same.
        size: Number of entries.
        fingerprint: That of `model`, as `fingerprint` returns it.

    Raises:
        UsageError: If `model` is not a model of sentencepiece, has other
            indices for padding, the end or the unknown than `PAD`, `EOS` and
            `UNKNOWN`, or does not give sentences back exactly.
        MissingPackageError: If tensorflow-text is not installed.

    Example:
    >>> from sos.datasets import subwords
    >>> vocabulary = subwords.Subwords(
    ...     subwords.learn(["a cat", "a cab"] * 10, size=269)
    ... )
    >>> tokens = vocabulary.tokenize(["a cat", ""]).to_tensor()
    >>> tokens[:, -1].numpy().tolist(), tokens[1].numpy().tolist()[:2]
    ([1, 0], [1, 0])
    >>> vocabulary.detokenize(tokens).numpy().tolist()
    [b'a cat', b'']
    """

    def __init__(self, model: bytes) -> None:
        super().__init__(name="subwords")
        text = _import("tensorflow_text", "tensorflow-text")
        # The resource belongs to no graph, and the operations run on the host.
        with tf.init_scope(), tf.device("CPU:0"):
            try:
                # It prints that nothing is normalised, for every model.
                with startup.quiet():
                    self._tokenizer = text.SentencepieceTokenizer(
                        model=model, out_type=tf.int32, add_eos=True
                    )
            except (tf.errors.OpError, TypeError, ValueError) as error:
                raise UsageError(
                    "A vocabulary must be a model of sentencepiece, such as "
                    "models.learn_vocabulary writes. Received: "
                    f"{_describe(model)}. Cause: {reason(error)}"
                ) from error
            self.model = model
            self.size = int(self._tokenizer.vocab_size())
            self.fingerprint = fingerprint(model)
            self._byte = self._check_entries()
            (probe,) = self.detokenize(self.tokenize([_PROBE]).to_tensor())
            found = probe.numpy().decode()
        if found != _PROBE:
            raise UsageError(
                "A vocabulary must give every sentence back exactly. Learn it "
                "with models.learn_vocabulary, which sets byte_fallback=True, "
                "normalization_rule_name='identity' and "
                "remove_extra_whitespaces=False. "
                f"Received: a vocabulary that makes {found!r} of {_PROBE!r}"
            )

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Subwords":
        """Reads a vocabulary from a file.

        Args:
            path: The model file; may be remote, such as a `gs://` path.

        Raises:
            StorageError: If the file cannot be read.
            UsageError: If its content is no vocabulary; see the class.
        """
        model = read_model(path)
        try:
            return cls(model)
        except UsageError as error:
            raise UsageError(f"{os.fspath(path)}: {error}") from error

    def save(self, path: str | os.PathLike) -> None:
        """Writes the model to a file, completely or not at all.

        Args:
            path: The file. If it is a `gs://` path, its directory must exist.

        Raises:
            StorageError: If the file cannot be written.
        """
        write_bytes(os.path.expanduser(os.fspath(path)), self.model)

    def tokenize(self, sentences: tf.Tensor) -> tf.RaggedTensor:
        """Converts sentences to tokens.

        Args:
            sentences: Strings of shape [...] in UTF-8. What is not valid UTF-8
                becomes the replacement character, U+FFFD.

        Returns:
            int32 of shape [..., (length)]. Each sentence ends with `EOS`; an
            empty one has nothing else. A tensor for a scalar.
        """
        with tf.device("CPU:0"):
            return self._tokenizer.tokenize(
                tf.strings.unicode_transcode(
                    sentences, "UTF-8", "UTF-8", errors="replace"
                )
            )

    def detokenize(self, tokens: tf.Tensor) -> tf.Tensor:
        """Converts tokens to sentences.

        Args:
            tokens: int32 of shape [..., length], at least one axis. The first
                `EOS` and all that follows is dropped, and so is `PAD`.

        Returns:
            Strings in UTF-8 of shape [...].

        Raises:
            tf.errors.OutOfRangeError: If a token is not below `size`.
        """
        with tf.device("CPU:0"):
            tokens = tf.convert_to_tensor(tokens, tf.int32)
            shape = tf.shape(tokens)
            rows = tf.reshape(
                tokens, tf.stack([tf.reduce_prod(shape[:-1]), shape[-1]])
            )
            # tensorflow-text drops all spaces at the beginning, and not only
            # the one that tokenization adds. So it must not be the beginning.
            start = tf.fill([tf.shape(rows)[0], 1], self._byte)
            rows = tf.concat([start, rows], 1)
            ends = tf.cast(rows == EOS, tf.int32)
            kept = (tf.cumsum(ends, axis=1) == 0) & (rows != PAD)
            texts = self._tokenizer.detokenize(
                tf.ragged.boolean_mask(rows, kept)
            )
            texts = tf.strings.regex_replace(
                texts, rf"\A\{_CHARACTER} ?", "", replace_global=False
            )
            result = tf.reshape(texts, shape[:-1])
            result.set_shape(tokens.shape[:-1])
            return result

    def _check_entries(self) -> int:
        """Checks the entries that are needed; returns the index of `_BYTE`."""
        # The index of the unknown, where there is no such entry.
        indices = self._tokenizer.string_to_id(
            ["<pad>", "</s>", "<unk>", _BYTE]
        ).numpy()
        if indices.tolist()[:3] != [PAD, EOS, UNKNOWN] or indices[3] == UNKNOWN:
            raise UsageError(
                f"A vocabulary must have <pad> as entry {PAD}, </s> as {EOS}, "
                f"<unk> as {UNKNOWN}, and an entry for every byte, as those "
                "that models.learn_vocabulary writes. Received: a vocabulary "
                f"of {self.size} entries, whose first are "
                + ", ".join(
                    entry.decode(errors="replace")
                    for entry in self._tokenizer.id_to_string(
                        list(range(min(4, self.size)))
                    ).numpy()
                )
            )
        return int(indices[3])


def _import(module: str, package: str) -> Any:
    """Imports an optional package."""
    if importlib.util.find_spec(module) is None:
        raise MissingPackageError(
            f"Subwords need the package {package}, which is not installed: "
            "pip install 'state-of-sparsity[translation]'"
        )
    return importlib.import_module(module)


def _describe(model: Any) -> str:
    if isinstance(model, bytes):
        return f"{len(model)} bytes that begin with {model[:8]!r}"
    return repr(model)
