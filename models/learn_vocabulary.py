r"""Learns a vocabulary of subwords from the training pairs of a data set.

    python -m models.learn_vocabulary --data=libreoffice_help --size=4000 \
        --output=runs/libreoffice_help.model

    python -m models.learn_vocabulary --data=wmt14_translate/de-en \
        --output=runs/wmt14.en-de.33288.model

Both languages share the vocabulary. It is a model of sentencepiece, a function
of the sentences and the size, and every sentence comes back exactly; see
`sos.datasets.subwords`. The program prints its fingerprint, and how full rows
of tokens are when pairs are packed into them.

A file of the same content is kept, and one of another is not replaced, because
a checkpoint can be used with its own vocabulary only. Exit codes: 0 for
success; 1 for an error, whose message says what to do.
"""

import os
import sys
import time
from collections.abc import Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from sos import startup

with startup.quiet():
    import tensorflow as tf

    # The first listing of devices warns about missing GPUs.
    tf.config.list_physical_devices()

from absl import app, flags

from sos.datasets import subwords, translation
from sos.errors import UsageError
from sos.files import check_writable
from sos.training import main as training_main

# Pairs that are packed to print how full rows are.
_PACKED_PAIRS = 200_000

_DATA = flags.DEFINE_string(
    "data",
    None,
    'The pairs, required: "libreoffice_help" for the embedded ones, a '
    "directory with files such as train.en and train.de, or the name of a data "
    'set of TensorFlow Datasets such as "wmt14_translate/de-en".',
)
_DATA_DIRECTORY = flags.DEFINE_string(
    "data_directory", None, "Data directory of TensorFlow Datasets."
)
_SOURCE = flags.DEFINE_string("source", "en", "Language of the sentences.")
_TARGET = flags.DEFINE_string("target", "de", "Language of the translations.")
_SIZE = flags.DEFINE_integer(
    "size",
    33_288,
    "Number of entries; by default as many as in the study.",
    lower_bound=1,
)
_PAIRS = flags.DEFINE_integer(
    "pairs",
    None,
    "Learns from this many training pairs, evenly spaced, and not from all: "
    "takes less time and memory.",
    lower_bound=1,
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "The file to write, required. It may be remote (gs://)."
)
_SOURCE_LENGTH = flags.DEFINE_integer(
    "source_length",
    256,
    "Tokens of a row on the side of the source, to print how full rows are.",
    lower_bound=1,
)
_TARGET_LENGTH = flags.DEFINE_integer(
    "target_length",
    256,
    "Tokens of a row on the side of the target.",
    lower_bound=1,
)


def main(argv: Sequence[str]) -> None:
    """Learns a vocabulary and writes it.

    Args:
        argv: Arguments that are not flags.
    """
    training_main.end_process(
        training_main.exit_code_of(lambda: _run(argv[1:]))
    )


def _run(arguments: Sequence[str]) -> None:
    if arguments:
        raise UsageError(
            f"The program takes only flags. Received: {' '.join(arguments)}"
        )
    for flag, example in (
        (_DATA, "libreoffice_help"),
        (_OUTPUT, "runs/vocabulary.model"),
    ):
        if not flag.value:
            raise UsageError(
                f"--{flag.name} is required, such as --{flag.name}={example}. "
                f"Received: --{flag.name}={flag.value or ''}"
            )
    output = os.path.expanduser(_OUTPUT.value)
    if tf.io.gfile.isdir(output):
        raise UsageError(
            "--output must be a file, such as --output=runs/vocabulary.model. "
            f"Received: {output}, which is a directory"
        )
    # Before the work.
    check_writable(os.path.dirname(output) or ".")
    print(f"Reading {_DATA.value}", file=sys.stderr, flush=True)
    train = translation.load(
        _DATA.value,
        _DATA_DIRECTORY.value,
        source=_SOURCE.value,
        target=_TARGET.value,
    ).train
    pairs = _evenly_spaced(train, _PAIRS.value)
    print(f"Learning from {len(pairs):,} pairs", file=sys.stderr, flush=True)
    start = time.monotonic()
    model = subwords.learn([*pairs.source, *pairs.target], _SIZE.value)
    seconds = time.monotonic() - start
    vocabulary = subwords.Subwords(model)
    if tf.io.gfile.exists(output):
        if subwords.read_model(output) != model:
            raise UsageError(
                "A vocabulary is not replaced by another, as checkpoints need "
                "their own. Choose another --output, or remove the file. "
                f"Received: {output}, which has another content"
            )
        verb = "Kept"
    else:
        vocabulary.save(output)
        verb = "Wrote"
    print(
        f"{verb} {output}: {vocabulary.size:,} entries, fingerprint "
        f"{vocabulary.fingerprint}, learned from {len(pairs):,} pairs in "
        f"{seconds:.1f} s"
    )
    _print_fill(train, vocabulary)


def _print_fill(
    train: translation.Pairs, vocabulary: subwords.Subwords
) -> None:
    """Prints how long sentences are, and how full rows."""
    sizes = (_SOURCE_LENGTH.value, _TARGET_LENGTH.value)
    nothing = translation.Pairs([], [])
    try:
        packed = translation.PackedPairs(
            translation.TranslationData(
                _evenly_spaced(train, _PACKED_PAIRS), nothing, nothing
            ),
            vocabulary,
            seed=0,
            batch_size=1,
            source_length=sizes[0],
            target_length=sizes[1],
            eval_batch_size=1,
        )
    except UsageError:
        # The flags are valid, so no pair fits. The vocabulary is written.
        print(f"No pair fits into rows of {sizes[0]} and {sizes[1]} tokens")
        return
    tokens = [
        size * fill * packed.train_rows
        for size, fill in zip(sizes, packed.fill, strict=True)
    ]
    languages = (_SOURCE.value, _TARGET.value)
    print(
        "Tokens of a sentence: "
        + ", ".join(
            f"{count / packed.train_pairs:.1f} ({language})"
            for count, language in zip(tokens, languages, strict=True)
        )
    )
    fills = ", ".join(
        f"{fill:.1%} of {size} ({language})"
        for fill, size, language in zip(
            packed.fill, sizes, languages, strict=True
        )
    )
    total = sum(tokens) / (packed.train_rows * sum(sizes))
    print(
        f"Places of a row that hold tokens: {fills}, {total:.1%} of both "
        f"({packed.train_pairs:,} pairs in {packed.train_rows:,} rows; "
        f"{packed.dropped_pairs:,} dropped)"
    )


def _evenly_spaced(
    pairs: translation.Pairs, count: int | None
) -> translation.Pairs:
    """Returns some of the pairs, or all if they are not more."""
    if count is None or count >= len(pairs):
        return pairs
    chosen = [index * len(pairs) // count for index in range(count)]
    return translation.Pairs(
        [pairs.source[index] for index in chosen],
        [pairs.target[index] for index in chosen],
    )


if __name__ == "__main__":
    app.run(main)
