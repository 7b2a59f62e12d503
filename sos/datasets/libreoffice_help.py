"""English and German paragraphs of the help of LibreOffice.

They are embedded in the package: 20,267 training, 1,049 validation and 848 test
pairs of 4 to 30 English words. That suffices to train a small translation model
within half an hour on a laptop, without a network. The pairs are split by page
of the help, so that near-duplicates do not cross from training to test.
Copyright 2000, 2010 LibreOffice contributors and/or their affiliates, Oracle;
MPL-2.0 (see `data/libreoffice_help.NOTICE.txt`).

On the test pairs, copying the English scores sacreBLEU 4.6, and the translation
of the most similar training sentence 12.1.
"""

import importlib.resources

from sos.datasets.translation import Pairs, TranslationData
from sos.errors import StorageError

_DIRECTORY = importlib.resources.files("sos.datasets").joinpath("data")
# The file and the number of pairs of each split.
_FILES = {
    "train": ("libreoffice_help.train.en-de.tsv.xz", 20_267),
    "validation": ("libreoffice_help.dev.en-de.tsv.xz", 1_049),
    "test": ("libreoffice_help.test.en-de.tsv.xz", 848),
}


def load() -> TranslationData:
    """Reads the embedded pairs: English sources, German targets.

    Returns:
        20,267 training, 1,049 validation and 848 test pairs.

    Raises:
        StorageError: If the installation lacks a data file, or it is damaged.

    Example:
    >>> from sos.datasets import libreoffice_help
    >>> data = libreoffice_help.load()
    >>> len(data.train), data.train.source[0], data.train.target[0]
    (20267, 'The implemented macros include:', \
'Die bereitgestellten Makros enthalten:')
    """
    return TranslationData(
        **{split: _read(*file) for split, file in _FILES.items()}
    )


def _read(name: str, count: int) -> Pairs:
    # Some builds of Python lack it, and need it for nothing else.
    import lzma

    try:
        text = lzma.decompress(_DIRECTORY.joinpath(name).read_bytes()).decode()
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise _damaged(name, f"{type(error).__name__}: {error}") from error
    pairs = [line.split("\t") for line in text.removesuffix("\n").split("\n")]
    if len(pairs) != count or any(len(pair) != 2 for pair in pairs):
        raise _damaged(
            name,
            f"{len(pairs)} lines, where {count} with one tab each are expected",
        )
    source, target = map(list, zip(*pairs, strict=True))
    return Pairs(source, target)


def _damaged(name: str, cause: str) -> StorageError:
    return StorageError(
        f"The embedded file {name} cannot be read. It is part of the package: "
        f"install `state-of-sparsity` again. Cause: {cause}"
    )
