"""Pairs of sentences for translation, and batches of packed rows of them.

`load` reads the embedded pairs, a directory of text files, or a data set of
TensorFlow Datasets such as WMT'14. `PackedPairs` tokenizes them and packs whole
pairs into rows of a fixed length, as Tensor2Tensor did for the study
(Gale, Elsen and Hooker 2019, arXiv 1902.09574). Shapes are static then, and
nearly all places hold tokens.

Difference from the authors' input: Tensor2Tensor filled one row after another
in the order of the pairs. Here a pair takes the best of 64 rows, which leaves
fewer places empty.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow as tf
from absl import logging

from sos.datasets import prepared
from sos.datasets.subwords import EOS, PAD, Subwords, encode
from sos.errors import StorageError, UsageError, reason
from sos.training import inputs

#: Name of the pairs that are part of the package.
EMBEDDED = "libreoffice_help"
_SPLITS = ("train", "validation", "test")

# Sentences that are tokenized at once.
_CHUNK = 1024
# A pair is put into the best of this many rows.
_OPEN_ROWS = 64
# Pairs are packed in groups of this many, all groups at the same time. Each
# group leaves some rows half empty.
_GROUP = 4096
# Rows of which one side is filled less than this are packed again.
_FULL = 0.9
# More places than a row has: a pair does not fit.
_NO_ROW = np.iinfo(np.int32).max
# Pairs whose tokens are copied at once, which bounds the memory for indices.
_COPIED = 65536


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """Sentences and their translations.

    Attributes:
        source: Sentences.
        target: The translation of each.

    Raises:
        UsageError: If their numbers differ.

    Example:
    >>> from sos.datasets import translation
    >>> len(translation.Pairs(["A cat."], ["Eine Katze."]))
    1
    """

    source: Sequence[str]
    target: Sequence[str]

    def __post_init__(self) -> None:
        if len(self.source) != len(self.target):
            raise UsageError(
                "Every sentence must have one translation. Received: "
                f"{len(self.source)} sentences and {len(self.target)} "
                "translations"
            )

    def __len__(self) -> int:
        return len(self.source)


@dataclasses.dataclass(frozen=True, eq=False)
class TranslationData:
    """Pairs to train with, to choose hyperparameters by, and to score.

    Attributes:
        train: Training pairs.
        validation: Validation pairs.
        test: Test pairs.
    """

    train: Pairs
    validation: Pairs
    test: Pairs


def load(
    name: str,
    directory: str | os.PathLike | None = None,
    *,
    source: str = "en",
    target: str = "de",
) -> TranslationData:
    """Reads the pairs of a data set by its name.

    Args:
        name: "libreoffice_help" for the embedded pairs; the path of a directory
            of text files, see `load_files`; or the name of a data set of
            TensorFlow Datasets, or its directory, see `load_tfds`.
        directory: Data directory of TensorFlow Datasets.
        source: Language of the sentences.
        target: Language of their translations.

    Returns:
        The pairs.

    Raises:
        UsageError: If there is no such data set, or it is invalid.
        StorageError: If a file cannot be read.
        MissingPackageError: If tensorflow-datasets is needed and not installed.

    Example:
    >>> from sos.datasets import translation
    >>> data = translation.load("libreoffice_help", source="de", target="en")
    >>> data.validation.source[0]
    'Minutenbeschriftung im Uhrzeitformat'
    """
    if name == EMBEDDED:
        # It imports this module.
        from sos.datasets import libreoffice_help

        data = libreoffice_help.load()
        languages = {"en": "source", "de": "target"}
        if {source, target} != set(languages):
            raise UsageError(
                f"The languages of {EMBEDDED!r} are 'en' and 'de'. Received: "
                f"source={source!r}, target={target!r}"
            )

        def select(pairs: Pairs) -> Pairs:
            return Pairs(
                getattr(pairs, languages[source]),
                getattr(pairs, languages[target]),
            )

        return TranslationData(
            *(select(getattr(data, split)) for split in _SPLITS)
        )
    path = os.path.expanduser(name)
    if directory is None and tf.io.gfile.isdir(path):
        info = "dataset_info.json"
        if tf.io.gfile.exists(os.path.join(path, info)):
            directory = path
        # "wmt14_translate/de-en" may also be a directory here, of versions.
        elif not tf.io.gfile.glob(os.path.join(path, "*", info)):
            return load_files(path, source=source, target=target)
    if directory is None and (os.path.isabs(path) or "://" in path):
        raise UsageError(
            f"The data must be {EMBEDDED!r}, a directory of text files, or the "
            "name or directory of a prepared data set of TensorFlow Datasets. "
            f"Received: {name!r}, which is none of these"
        )
    return load_tfds(name, directory, source=source, target=target)


def load_files(
    directory: str | os.PathLike, *, source: str = "en", target: str = "de"
) -> TranslationData:
    """Reads pairs from text files.

    The directory has the files train.en, train.de, validation.en,
    validation.de, test.en and test.de, with the names of other languages
    accordingly. They are UTF-8 with one sentence a line, and line n of one file
    is the translation of line n of the other. Only a line feed, which a
    carriage return may precede, ends a line.

    Empty lines in the training files are kept; `PackedPairs` drops them.

    Args:
        directory: The directory, which may be remote (`gs://`).
        source: Language of the sentences: what the names of their files end
            with.
        target: Language of their translations.

    Returns:
        The pairs.

    Raises:
        UsageError: If a file is missing, has no line or is not UTF-8, if the
            two files of a split have different numbers of lines, or if one of
            the validation or test files has an empty line.
        StorageError: If a file cannot be read.

    Example:
    >>> import pathlib
    >>> from sos.datasets import translation
    >>> for split in ("train", "validation", "test"):
    ...     for language, line in (("en", "A cat."), ("de", "Eine Katze.")):
    ...         _ = pathlib.Path(f"{split}.{language}").write_text(line)
    >>> translation.load_files(".").test.target
    ['Eine Katze.']
    """
    if source == target:
        raise UsageError(
            "`source` and `target` must be two languages. Received: "
            f"source={source!r}, target={target!r}"
        )
    directory = os.path.expanduser(os.fspath(directory))
    splits = []
    for split in _SPLITS:
        paths = [
            os.path.join(directory, f"{split}.{language}")
            for language in (source, target)
        ]
        lines = [_read_lines(path) for path in paths]
        if len(lines[0]) != len(lines[1]):
            raise UsageError(
                "Line n of one file must be the translation of line n of the "
                f"other. Received: {len(lines[0])} lines in {paths[0]} and "
                f"{len(lines[1])} in {paths[1]}"
            )
        if split != "train":
            for path, sentences in zip(paths, lines, strict=True):
                for number, sentence in enumerate(sentences, 1):
                    if not sentence.strip():
                        raise UsageError(
                            "Sentences for evaluation must not be empty. "
                            "Remove the line from both files of the split. "
                            f"Received: {path}, line {number}"
                        )
        splits.append(Pairs(*lines))
    return TranslationData(*splits)


def load_tfds(
    name: str = "wmt14_translate/de-en",
    directory: str | os.PathLike | None = None,
    *,
    source: str = "en",
    target: str = "de",
) -> TranslationData:
    """Reads pairs of a prepared data set of TensorFlow Datasets.

    Prepare WMT'14 once, with a network and about 4 GB of disk space:

    ```python
    import tensorflow_datasets as tfds

    tfds.builder("wmt14_translate/de-en").download_and_prepare()
    ```

    It has 4.5 million training pairs, newstest2013 (3,000 pairs) as
    "validation" and newstest2014 (3,003 pairs) as "test".

    Args:
        name: Name of the data set, with its config and, if needed, its version.
        directory: Data directory, `data_dir` of TensorFlow Datasets, which may
            be remote (`gs://`); by default its own, which the environment
            variable `TFDS_DATA_DIR` sets. It may also be the directory of the
            data set itself, which has a file dataset_info.json. Then `name` is
            not used.
        source: Language of the sentences.
        target: Language of their translations.

    Returns:
        The pairs, in the same order every time.

    Raises:
        UsageError: If the data set is unknown or not prepared, or lacks a split
            or a language.
        MissingPackageError: If tensorflow-datasets is not installed.
    """
    builder = prepared.find(name, directory, how_to_prepare=_how_to_prepare)
    features = builder.info.features
    languages = sorted(features) if hasattr(features, "keys") else []
    if source == target or not {source, target} <= set(languages):
        raise UsageError(
            "`source` and `target` must be two languages of the data set. "
            f"Received: source={source!r}, target={target!r} for "
            f"{builder.info.full_name} with the features "
            + (", ".join(languages) or repr(features))
        )
    missing = [s for s in _SPLITS if s not in builder.info.splits]
    if missing:
        raise UsageError(
            f"The data set {builder.info.full_name} in {builder.data_dir} must "
            f"have the splits {', '.join(_SPLITS)}. Received: the splits "
            f"{', '.join(sorted(builder.info.splits)) or 'none'}"
        )
    splits = []
    for split in _SPLITS:
        sentences: tuple[list[str], list[str]] = ([], [])
        # Unshuffled, the order is the same every time.
        dataset = builder.as_dataset(split=split, shuffle_files=False)
        dataset = dataset.map(
            lambda pair: (pair[source], pair[target]),
            num_parallel_calls=tf.data.AUTOTUNE,
        ).batch(_CHUNK)
        for batch in dataset.prefetch(2).as_numpy_iterator():
            for side, texts in zip(sentences, batch, strict=True):
                side.extend(text.decode("utf-8", "replace") for text in texts)
        splits.append(Pairs(*sentences))
    return TranslationData(*splits)


class PackedPairs:
    """Rows of tokenized pairs for training and evaluation.

    A row has several pairs: their sentences one after another on the side of
    the source, and their translations in the same order on that of the target.
    All pairs of an epoch are packed once, in an order that the seed determines.
    A pair goes to that of 64 rows in which it leaves the fewest places. Rows
    come in another order in every epoch.

    Pairs of which one sentence is empty, or longer than a row, are not trained
    with.

    The rows of all training pairs are held in memory, two bytes a token for
    vocabularies of up to 65,536 entries. They are made when an object is made,
    on every host.

    Args:
        data: The pairs.
        subwords: The vocabulary.
        seed: Seed of the packing and of the order of the rows.
        batch_size: Number of rows in one optimizer step, over all replicas.
        source_length: Number of tokens in a row on the side of the source.
        target_length: Number of tokens in a row on the side of the target.
        eval_batch_size: Maximum number of rows in an evaluation batch. It is
            lowered to a multiple of the number of replicas.

    Attributes:
        train_pairs: Number of training pairs in the rows.
        train_rows: Number of rows of training pairs.
        dropped_pairs: Number of training pairs that are not in the rows.
        eval_pairs: Number of evaluation pairs.
        eval_rows: Number of rows of evaluation pairs.
        fill: Fractions of the places in the training rows that hold a token,
            on the sides of the source and of the target.

    Raises:
        UsageError: If an argument is below 1, the training pairs do not fill
            one batch, or a validation pair is longer than a row.

    Example:
    >>> import tensorflow as tf
    >>> from sos.datasets import subwords, translation
    >>> pairs = translation.Pairs(["a cat", "a"], ["eine Katze", "eine"])
    >>> vocabulary = subwords.Subwords(
    ...     subwords.learn(pairs.source + pairs.target, size=271)
    ... )
    >>> source = translation.PackedPairs(
    ...     translation.TranslationData(pairs, pairs, pairs),
    ...     vocabulary,
    ...     seed=0,
    ...     batch_size=1,
    ...     source_length=16,
    ...     target_length=24,
    ...     eval_batch_size=1,
    ... )
    >>> source.train_pairs, source.train_rows
    (2, 1)
    >>> batch = next(iter(source.train(tf.distribute.InputContext(), step=0)))
    >>> batch["target"].shape
    TensorShape([1, 24])
    >>> int(tf.reduce_max(batch["target_segments"]))
    2
    """

    def __init__(
        self,
        data: TranslationData,
        subwords: Subwords,
        *,
        seed: int,
        batch_size: int,
        source_length: int = 256,
        target_length: int = 256,
        eval_batch_size: int,
    ) -> None:
        for name, value in {
            "batch_size": batch_size,
            "source_length": source_length,
            "target_length": target_length,
            "eval_batch_size": eval_batch_size,
        }.items():
            if value < 1:
                raise UsageError(
                    f"`{name}` must be at least 1. Received: {name}={value}"
                )
        self._seed = seed
        self._batch_size = batch_size
        self._eval_batch_size = eval_batch_size
        sizes = (source_length, target_length)

        train = _Tokens(data.train, subwords)
        used = np.flatnonzero(train.fits(sizes) & ~train.blank)
        self.train_pairs = len(used)
        self.dropped_pairs = len(data.train) - len(used)
        used = np.random.default_rng(seed).permutation(used)
        self._train = train.rows(used, sizes)
        del train
        self.train_rows = len(self._train["source"])
        self.fill = tuple(
            float(np.count_nonzero(rows) / max(1, rows.size))
            for rows in self._train.values()
        )
        if self.train_rows < batch_size:
            raise UsageError(
                "The training pairs must fill at least one batch. Lower the "
                "batch size or the length of a row. Received: "
                f"batch_size={batch_size} rows, source_length={source_length} "
                f"and target_length={target_length} for {len(data.train)} "
                f"pairs, of which {self.dropped_pairs} are empty or longer "
                f"than a row, in {self.train_rows} rows"
            )
        logging.info(
            "Packed %d training pairs into %d rows, of whose places %.1f %% "
            "(source) and %.1f %% (target) hold tokens. Dropped %d pairs that "
            "are empty or longer than a row.",
            self.train_pairs,
            self.train_rows,
            100 * self.fill[0],
            100 * self.fill[1],
            self.dropped_pairs,
        )

        validation = _Tokens(data.validation, subwords)
        (long,) = np.nonzero(~validation.fits(sizes))
        if len(long):
            lengths = validation.lengths[:, long[0]]
            raise UsageError(
                "Every validation pair must fit into a row, as all are "
                "evaluated. Raise `source_length` or `target_length`. "
                f"Received: source_length={source_length} and "
                f"target_length={target_length} for pair {long[0]}, counted "
                f"from 0, of {lengths[0]} and {lengths[1]} tokens; {len(long)} "
                "pairs are too long"
            )
        self.eval_pairs = len(data.validation)
        self._eval = validation.rows(np.arange(self.eval_pairs), sizes)
        self.eval_rows = len(self._eval["source"])

    def train(
        self, context: tf.distribute.InputContext, step: int
    ) -> tf.data.Dataset:
        """Returns training batches.

        Args:
            context: The share of the data that this host reads.
            step: Number of completed optimizer steps.

        Returns:
            Infinite batches with "source" and "target", the tokens, and
            "source_segments" and "target_segments": int32 of shape [batch,
            length]. Segments are 1 for the tokens of the first pair in a row,
            2 for those of the second, and so on; both are 0 for padding.
        """
        return inputs.array_batches(
            self._train,
            seed=self._seed,
            batch_size=self._batch_size,
            step=step,
            context=context,
        ).map(_with_segments)

    def eval(self, context: tf.distribute.InputContext) -> tf.data.Dataset:
        """Returns evaluation batches with every validation pair once.

        Args:
            context: The share of the data that this host reads.

        Returns:
            Batches as in training, and "weight", float32 of shape [batch],
            which is 0 for padding, a row that is repeated.
        """
        return inputs.array_eval_batches(
            self._eval,
            batch_size=inputs.whole_batch(self._eval_batch_size, context),
            context=context,
        ).map(_with_segments)


class _Tokens:
    """The tokens of pairs, one sentence after another.

    Attributes:
        lengths: Number of tokens of each sentence, of both sides, int32 of
            shape [2, pairs].
        blank: Whether one sentence of a pair has no text, of shape [pairs].
    """

    def __init__(self, pairs: Pairs, subwords: Subwords) -> None:
        self._dtype = np.uint16 if subwords.size <= 2**16 else np.int32
        sides = [
            _tokenize(sentences, subwords, self._dtype)
            for sentences in (pairs.source, pairs.target)
        ]
        self._tokens = [tokens for tokens, _ in sides]
        self.lengths = np.stack([lengths for _, lengths in sides])
        self.blank = np.fromiter(
            (
                not (source.strip() and target.strip())
                for source, target in zip(
                    pairs.source, pairs.target, strict=True
                )
            ),
            bool,
            len(pairs),
        )

    def fits(self, sizes: tuple[int, int]) -> np.ndarray:
        """Returns which pairs are not longer than a row."""
        return (self.lengths <= np.reshape(sizes, (2, 1))).all(axis=0)

    def rows(
        self, pairs: np.ndarray, sizes: tuple[int, int]
    ) -> dict[str, np.ndarray]:
        """Packs some pairs, in their order, into rows of tokens."""
        rows = pack(*self.lengths[:, pairs], *sizes)
        order = np.argsort(rows, kind="stable")
        pairs, rows = pairs[order], rows[order]
        arrays = [
            _fill(tokens, lengths, pairs, rows, size)
            for tokens, lengths, size in zip(
                self._tokens, self.lengths, sizes, strict=True
            )
        ]
        return dict(zip(("source", "target"), arrays, strict=True))


def pack(
    source_lengths: np.ndarray,
    target_lengths: np.ndarray,
    source_size: int,
    target_size: int,
) -> np.ndarray:
    """Assigns pairs to rows of two sizes.

    A pair is put into that of 64 rows in which the fewest places remain. If it
    fits into none of them, the fullest row is finished and a new one begun.
    Pairs are divided into groups of about 4,096, which have rows of their own
    and are packed at the same time. What the groups leave in rows that are not
    full is packed again.

    Args:
        source_lengths: Length of each pair's source, from 1 to `source_size`,
            integers of shape [pairs].
        target_lengths: Length of each pair's target, from 1 to `target_size`.
        source_size: Number of places of a row on the side of the source.
        target_size: Number of places of a row on the side of the target.

    Returns:
        The row of each pair, int64 of shape [pairs]: each of 0, 1, ...,
        number of rows - 1 at least once.

    Example:
    >>> import numpy as np
    >>> from sos.datasets.translation import pack
    >>> pack(np.array([6, 6, 4, 4]), np.array([5, 7, 2, 3]), 10, 10).tolist()
    [0, 1, 1, 0]
    """
    lengths = np.stack([source_lengths, target_lengths]).astype(np.int32)
    sizes = np.array([source_size, target_size], np.int32)
    rows = _pack_groups(lengths, sizes)
    fills = [
        np.bincount(rows, each) / size
        for each, size in zip(lengths, sizes, strict=True)
    ]
    (loose,) = np.nonzero((np.maximum(*fills) < _FULL)[rows])
    # If there are many, the pairs are such that rows cannot be full.
    if _GROUP < lengths.shape[1] and 0 < len(loose) < lengths.shape[1] // 2:
        again = pack(*lengths[:, loose], source_size, target_size)
        rows[loose] = rows.max() + 1 + again
        rows = np.unique(rows, return_inverse=True)[1]
    return rows


def _pack_groups(lengths: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Packs groups of pairs at the same time.

    Args:
        lengths: int32 of shape [2, pairs].
        sizes: int32 of shape [2].

    Returns:
        As of `pack`.
    """
    pairs = lengths.shape[1]
    groups = max(1, pairs // _GROUP)
    steps = -(-pairs // groups)
    # What fills the last group up has no length, so that it takes no place.
    lengths = np.pad(lengths, ((0, 0), (0, groups * steps - pairs)))
    # Group by group: of shape [steps, 2, groups, 1].
    lengths = lengths.reshape(2, groups, steps).transpose(2, 0, 1)[..., None]
    free = np.empty((2, groups, _OPEN_ROWS), np.int32)
    free[:] = sizes[:, None, None]
    names = np.arange(groups * _OPEN_ROWS).reshape(groups, _OPEN_ROWS)
    begun = names.size
    rows = np.empty((steps, groups), np.int64)
    every = np.arange(groups)
    for step, length in enumerate(lengths):
        remaining = free - length
        fits = (remaining[0] | remaining[1]) >= 0
        remaining = np.where(fits, remaining[0] + remaining[1], _NO_ROW)
        best = remaining.argmin(axis=1)
        (full,) = np.nonzero(~fits[every, best])
        if len(full):
            fullest = free[:, full].sum(axis=0).argmin(axis=1)
            best[full] = fullest
            free[:, full, fullest] = sizes[:, None]
            names[full, fullest] = begun + np.arange(len(full))
            begun += len(full)
        free[:, every, best] -= length[..., 0]
        rows[step] = names[every, best]
    rows = rows.T.reshape(-1)[:pairs]
    return np.unique(rows, return_inverse=True)[1]


def _fill(
    tokens: np.ndarray,
    lengths: np.ndarray,
    pairs: np.ndarray,
    rows: np.ndarray,
    size: int,
) -> np.ndarray:
    """Copies the tokens of pairs to their rows, one after another.

    Args:
        tokens: Tokens of all sentences, of shape [tokens].
        lengths: Number of tokens of each sentence, of shape [sentences].
        pairs: The sentences to copy, sorted by row.
        rows: The row of each.
        size: Number of places in a row.

    Returns:
        Of shape [rows, size], with `PAD` in the places that remain.
    """
    begins = (np.cumsum(lengths, dtype=np.int64) - lengths)[pairs]
    lengths = lengths[pairs].astype(np.int64)
    # How many tokens precede a pair: in all rows, and in its own.
    before = np.cumsum(lengths) - lengths
    first = np.searchsorted(rows, rows)
    starts = rows * size + before - before[first]
    count = int(rows[-1]) + 1 if len(rows) else 0
    filled = np.full(count * size, PAD, tokens.dtype)
    for begin in range(0, len(pairs), _COPIED):
        part = slice(begin, begin + _COPIED)
        length = lengths[part]
        within = np.arange(length.sum()) - np.repeat(
            before[part] - before[begin], length
        )
        places = np.repeat(starts[part], length) + within
        filled[places] = tokens[np.repeat(begins[part], length) + within]
    return filled.reshape(count, size)


def _tokenize(
    sentences: Sequence[str], subwords: Subwords, dtype: type
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens of all sentences, and the length of each."""

    def chunks() -> Iterator[list[bytes]]:
        for begin in range(0, len(sentences), _CHUNK):
            yield [encode(text) for text in sentences[begin : begin + _CHUNK]]

    def tokenize(chunk: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        tokens = subwords.tokenize(chunk)
        return (
            tf.cast(tokens.flat_values, dtype),
            tf.cast(tokens.row_lengths(), tf.int32),
        )

    dataset = tf.data.Dataset.from_generator(
        chunks, output_signature=tf.TensorSpec([None], tf.string)
    ).map(tokenize, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    parts = list(dataset.prefetch(tf.data.AUTOTUNE).as_numpy_iterator())
    return (
        np.concatenate([np.zeros(0, dtype), *(part[0] for part in parts)]),
        np.concatenate([np.zeros(0, np.int32), *(part[1] for part in parts)]),
    )


def _how_to_prepare(name: str, directory: str) -> str:
    return (
        f"{prepared.how_to_prepare(name, directory)}; or use the pairs of "
        f"{EMBEDDED!r}, or a directory of text files"
    )


def _with_segments(batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Adds the segments, which follow from the ends of the sentences."""
    result = dict(batch)
    for side in ("source", "target"):
        tokens = tf.cast(batch[side], tf.int32)
        ends = tf.cast(tokens == EOS, tf.int32)
        segments = 1 + tf.cumsum(ends, axis=1, exclusive=True)
        result[side] = tokens
        result[f"{side}_segments"] = tf.where(tokens == PAD, 0, segments)
    return result


def _read_lines(path: str) -> list[str]:
    """Reads the lines of a text file."""
    try:
        with tf.io.gfile.GFile(path, "rb") as file:
            content = file.read()
    except tf.errors.NotFoundError as error:
        raise UsageError(
            "A data set of text files needs train, validation and test files "
            f"of both languages. Missing: {path}"
        ) from error
    except (tf.errors.OpError, OSError) as error:
        raise StorageError(f"{path} cannot be read: {reason(error)}") from error
    try:
        # The mark with which some editors begin a file is no text.
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(
            "The file must be UTF-8. Convert it, or remove what is not. "
            f"Received: {path}, in which line {line} has the byte "
            f"{content[error.start]:#04x}"
        ) from error
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    if not lines:
        raise UsageError(
            f"The file must have at least one line. Received: {path}, which "
            "is empty"
        )
    return [line.removesuffix("\r") for line in lines]
