"""Files of records, and which host reads which of them."""

import concurrent.futures
import dataclasses
import heapq
import os
import posixpath
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf
from absl import logging

from sos.errors import StorageError, UsageError, reason

#: Maps the path of a file, a string scalar, to a data set of its records.
Read = Callable[[tf.Tensor], tf.data.Dataset]


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of records.

    Attributes:
        path: Path of the file, in any file system that TensorFlow can read.
        examples: Number of records in the file.

    Example:
    >>> import sos.training
    >>> sos.training.Shard("train-00000-of-01024", 1251).examples
    1251
    """

    path: str
    examples: int


def list_shards(
    files: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    counts: Sequence[int] | None = None,
    read: Read = tf.data.TFRecordDataset,
) -> list[Shard]:
    """Lists files of records with the number of records in each.

    TensorFlow Datasets knows the numbers:

    ```python
    split = tfds.builder("imagenet2012").info.splits["train"]
    shards = list_shards(split.filepaths, counts=split.shard_lengths)
    ```

    Args:
        files: A glob pattern, whose matches are sorted, or paths.
        counts: Number of records in each file. By default all files are read to
            count their records.
        read: Opens a file to count its records.

    Returns:
        One `Shard` per file. The list must be the same on all hosts.

    Raises:
        UsageError: If no file matches, a file is missing or listed twice, or
            the number of counts differs from the number of files.
        StorageError: If a file cannot be read.

    Example:
    >>> import sos.training
    >>> import tensorflow as tf
    >>> for index in range(2):
    ...     with tf.io.TFRecordWriter(f"train-{index}") as writer:
    ...         for record in (b"a", b"b", b"c"):
    ...             writer.write(record)
    >>> shards = sos.training.list_shards("train-*")
    >>> [shard.examples for shard in shards]
    [3, 3]
    """
    if isinstance(files, str | os.PathLike):
        pattern = os.fspath(files)
        paths = sorted(tf.io.gfile.glob(pattern))
        if not paths:
            raise UsageError(
                "The pattern of an input's files must match at least one file. "
                f"Received: {pattern!r}, which matches none"
            )
    else:
        paths = [os.fspath(path) for path in files]
    _check_paths(paths)
    if counts is None:
        logging.info("Counting the records of %d files.", len(paths))
        with concurrent.futures.ThreadPoolExecutor() as pool:
            counts = list(pool.map(lambda path: _count(path, read), paths))
    elif len(counts) != len(paths):
        raise UsageError(
            "`counts` must have one number per file. Received: "
            f"{len(counts)} numbers for {len(paths)} files"
        )
    return [
        Shard(path, int(examples))
        for path, examples in zip(paths, counts, strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class Part:
    """The records that a host reads: every `stride`-th of some files.

    Attributes:
        numbers: Index of each file among all.
        paths: Path of each file.
        counts: Number of records in each file.
        offsets: Position of the first record to take from each file.
        stride: Distance between two records to take.
    """

    numbers: list[int]
    paths: list[str]
    counts: list[int]
    offsets: list[int]
    stride: int

    @property
    def lengths(self) -> list[int]:
        """Number of records to take from each file."""
        return [
            len(range(offset, count, self.stride))
            for offset, count in zip(self.offsets, self.counts, strict=True)
        ]

    @property
    def examples(self) -> int:
        """Number of records."""
        return sum(self.lengths)


def strided_part(
    shards: Sequence[Shard], hosts: int = 1, host: int = 0
) -> Part:
    """Returns every `hosts`-th record of all files."""
    begins = np.cumsum([0] + [shard.examples for shard in shards])
    return Part(
        numbers=list(range(len(shards))),
        paths=[shard.path for shard in shards],
        counts=[shard.examples for shard in shards],
        # As if all files were one.
        offsets=[int((host - begin) % hosts) for begin in begins[:-1]],
        stride=hosts,
    )


def divide_among_hosts(shards: Sequence[Shard], hosts: int) -> list[Part]:
    """Divides the records among hosts."""
    if not shards:
        raise UsageError(
            "An input needs at least one file of records. Received: no shards"
        )
    _check_unique([shard.path for shard in shards])
    for shard in shards:
        if shard.examples < 0:
            raise UsageError(
                "The number of records in a file must be at least 0. "
                f"Received: {shard}"
            )
    if sum(shard.examples > 0 for shard in shards) < hosts:
        return [strided_part(shards, hosts, host) for host in range(hosts)]
    # The largest file first, each to the host with the fewest records. Files of
    # equal size go to the hosts in turns.
    numbers: list[list[int]] = [[] for _ in range(hosts)]
    loads = [(0, host) for host in range(hosts)]
    for number in sorted(
        range(len(shards)), key=lambda number: -shards[number].examples
    ):
        load, host = heapq.heappop(loads)
        numbers[host].append(number)
        heapq.heappush(loads, (load + shards[number].examples, host))
    return [
        Part(
            numbers=sorted(files),
            paths=[shards[number].path for number in sorted(files)],
            counts=[shards[number].examples for number in sorted(files)],
            offsets=[0] * len(files),
            stride=1,
        )
        for files in numbers
    ]


def _count(path: str, read: Read) -> int:
    try:
        records = read(tf.constant(path))
        return int(records.reduce(np.int64(0), lambda count, _: count + 1))
    except tf.errors.OpError as error:
        raise StorageError(
            f"The records of {path} cannot be read. Restore the file or remove "
            f"it from the input. Cause: {reason(error)}"
        ) from error


def _check_paths(paths: Sequence[str]) -> None:
    if not paths:
        raise UsageError(
            "An input needs at least one file of records. Received: no paths"
        )
    _check_unique(paths)
    check_files(paths)


def _check_unique(paths: Sequence[str]) -> None:
    if len(set(paths)) < len(paths):
        duplicate = next(path for path in paths if paths.count(path) > 1)
        raise UsageError(
            "The files of an input must differ. "
            f"Received: {duplicate} more than once"
        )


def check_files(paths: Sequence[str]) -> None:
    """Raises `UsageError` if a file is missing."""
    # A remote file system lists a directory in one request. One per file would
    # take minutes.
    listed: dict[str, set[str]] = {}
    missing = []
    for path in paths:
        directory, name = posixpath.split(path)
        if directory not in listed:
            try:
                names = tf.io.gfile.listdir(directory or ".")
            except (tf.errors.NotFoundError, tf.errors.FailedPreconditionError):
                names = []
            listed[directory] = {entry.rstrip("/") for entry in names}
        if name not in listed[directory]:
            missing.append(path)
    if missing:
        raise UsageError(
            "All files of an input must exist. Restore them or remove them "
            f"from the input. Received: {len(paths)} files, of which "
            f"{len(missing)} are missing, {missing[0]} first"
        )
