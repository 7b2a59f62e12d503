r"""Translates a text file or the standard input line by line.

With the newest checkpoint of a run of `models.wmt.Translation`, or with an
exported model:

    python -m models.translate --run=runs/translate/RUN \
        --input=input.txt --output=output.txt
    echo "Close the file." | python -m models.translate --model=EXPORT

Every line of the input gives one line of the output, in the same order; an
empty line gives an empty one. Lines end with a line feed, which a carriage
return may precede, and are UTF-8; other bytes become U+FFFD.

If the output is a file, it appears when it is complete. Until then its lines
are in OUTPUT.partial, and OUTPUT.partial.json says how many there are and what
they were made from. The same command continues after an interruption.

Exit codes: 0 for success; 1 for an error, whose message says what to do; 75 and
130 if SIGTERM or Ctrl-C stopped it.
"""

import argparse
import contextlib
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from sos import startup

with startup.quiet():
    import tensorflow as tf

    # The first listing of devices warns about missing GPUs.
    tf.config.list_physical_devices()

from absl import logging

from models.decoding import MAX_LENGTH, to_line
from models.partial_file import PartialFile
from models.translators import (
    ExportTranslator,
    OnBatch,
    RunTranslator,
    Translator,
)
from sos import files
from sos.errors import UsageError
from sos.training import main as training_main
from sos.training import signals

_STANDARD = "-"
# Seconds between two lines about the progress that are not on a terminal.
_REPORT_SECONDS = 10.0


class _Progress:
    """Prints the number of lines to stderr.

    Args:
        total: Number of lines; None if unknown.
        done: Number of lines that were translated before.
    """

    def __init__(self, total: int | None, done: int) -> None:
        self._total = total
        self._done = self._first = done
        self._shown: int | None = None
        self._begin = self._printed = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def __call__(self, lines: int) -> None:
        """Counts translated lines."""
        self._done += lines
        wait = 0.5 if self._terminal else _REPORT_SECONDS
        if time.monotonic() - self._printed >= wait:
            self._print("\r" if self._terminal else "")

    def close(self) -> None:
        """Prints the last number."""
        if self._shown != self._done:
            self._print("\r" if self._terminal else "")
        if self._terminal:
            print(file=sys.stderr)

    def _print(self, start: str) -> None:
        self._printed = time.monotonic()
        self._shown = self._done
        seconds = max(self._printed - self._begin, 1e-9)
        total = "" if self._total is None else f"/{self._total:,}"
        print(
            f"{start}{self._done:,}{total} lines, "
            f"{(self._done - self._first) / seconds:.1f} a second",
            end="  " if start else "\n",
            file=sys.stderr,
            flush=True,
        )


def translate_lines(
    translator: Translator,
    source: BinaryIO,
    write: Callable[[Sequence[bytes], bytes], None],
    *,
    chunk_lines: int,
    on_batch: OnBatch,
) -> None:
    """Translates the lines of a file in chunks.

    Args:
        translator: The translator.
        source: The file.
        write: Called for each chunk with its lines and their translations.
        chunk_lines: Number of lines in a chunk.
        on_batch: Called with the number of lines of each batch.
    """
    while lines := list(itertools.islice(source, chunk_lines)):
        texts = [
            line.removesuffix(b"\n")
            .removesuffix(b"\r")
            .decode(errors="replace")
            for line in lines
        ]
        translations = translator(texts, on_batch)
        write(
            lines,
            "".join(f"{to_line(text)}\n" for text in translations).encode(),
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Translates the input.

    Args:
        argv: Arguments; those of the process by default.

    Returns:
        The exit code.
    """
    return training_main.exit_code_of(lambda: _run(_parse(argv)))


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are reported as those of the other programs."""

    def error(self, message: str) -> NoReturn:
        """Raises `UsageError`."""
        raise UsageError(f"{message}. Run with --help for all arguments.")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m models.translate",
        description="Translates a text file or the standard input by lines.",
        allow_abbrev=False,
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--run",
        metavar="DIRECTORY",
        help="directory of a run, whose newest checkpoint translates",
    )
    model.add_argument(
        "--model",
        metavar="DIRECTORY",
        help="directory of an exported model",
    )
    parser.add_argument(
        "--input",
        default=_STANDARD,
        metavar="FILE",
        help="file to translate; - for the standard input (default)",
    )
    parser.add_argument(
        "--output",
        default=_STANDARD,
        metavar="FILE",
        help="file to write; - for the standard output (default)",
    )
    parser.add_argument(
        "--batch_size",
        type=_positive,
        default=64,
        metavar="LINES",
        help="lines that are translated at once (default: %(default)s); "
        "batches of lines with more than 64 subwords have fewer",
    )
    parser.add_argument(
        "--chunk_lines",
        type=_positive,
        default=2000,
        metavar="LINES",
        help="lines that are held in memory and sorted by length (default: "
        "%(default)s); an interrupted program continues after the last chunk",
    )
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(
            f"must be an integer of at least 1. Received: {text}"
        )
    return number


def _run(options: argparse.Namespace) -> int:
    logging.set_verbosity(logging.WARNING)
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(_open_input(options.input))
        stack.enter_context(_raising_at_sigterm())
        try:
            return _translate(options, source, stack)
        except (KeyboardInterrupt, _Terminated) as stopped:
            terminated = isinstance(stopped, _Terminated)
            signum = signal.SIGTERM if terminated else signal.SIGINT
            text = f"Stopped by {signum.name}."
            if options.output != _STANDARD:
                text += " Run the same command again to continue."
            print(f"\n{text}", file=sys.stderr, flush=True)
            return signals.exit_code(signum)
        except BrokenPipeError:
            # As by `head`. Python would fail again when it ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1


def _translate(
    options: argparse.Namespace, source: BinaryIO, stack: contextlib.ExitStack
) -> int:
    to_file = options.output != _STANDARD
    if to_file:
        # Before the model is loaded.
        _check_output(options.output)
    translator: Translator = (
        ExportTranslator(options.model, options.batch_size)
        if options.run is None
        else RunTranslator(options.run, options.batch_size)
    )
    # Also if it is stopped, as the next process counts its own lines alone.
    stack.callback(_warn, translator)
    done = 0
    write: Callable[[Sequence[bytes], bytes], None] = _write_standard
    if to_file:
        output = PartialFile(options.output, translator.fingerprint)
        stack.callback(output.close)
        write, done = output.write, output.lines
        output.skip(source)
        if done:
            print(f"Continuing after {done:,} lines.", file=sys.stderr)
    # Line by line, as somebody waits for each.
    interactive = source.isatty() and not to_file
    progress = _Progress(_count_lines(options.input), done)
    translate_lines(
        translator,
        source,
        write,
        chunk_lines=1 if interactive else options.chunk_lines,
        on_batch=(lambda lines: None) if interactive else progress,
    )
    if not interactive:
        progress.close()
    if to_file:
        output.finish()
        print(f"Wrote {options.output}", file=sys.stderr)
    return 0


def _warn(translator: Translator) -> None:
    """Prints how many lines were cut, or have no translation."""
    if translator.cut:
        print(
            f"{translator.cut:,} lines were cut to {MAX_LENGTH:,} subwords.",
            file=sys.stderr,
        )
    if translator.failed:
        print(
            f"{translator.failed:,} lines have no translation, as logits are "
            "NaN. Translate with an earlier checkpoint, or train with a lower "
            "learning rate.",
            file=sys.stderr,
        )


def _write_standard(lines: Sequence[bytes], translations: bytes) -> None:
    del lines
    sys.stdout.buffer.write(translations)
    sys.stdout.buffer.flush()


class _Terminated(BaseException):
    """SIGTERM was received."""


@contextlib.contextmanager
def _raising_at_sigterm() -> Iterator[None]:
    """Raises `_Terminated` at SIGTERM within the scope."""

    def terminate(*arguments: Any) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@contextlib.contextmanager
def _open_input(path: str) -> Iterator[BinaryIO]:
    if path == _STANDARD:
        yield sys.stdin.buffer
        return
    _check_local("input", path)
    try:
        file = Path(path).expanduser().open("rb")
    except OSError as error:
        raise UsageError(
            "`--input` must be a file that can be read, or - for the standard "
            f"input. Received: {path}. Cause: {error.strerror}"
        ) from error
    with file:
        yield file


def _check_local(argument: str, path: str) -> None:
    if "://" in path:
        raise UsageError(
            f"`--{argument}` must be a local file, or -. Copy remote files, or "
            f"use a pipe. Received: {path}"
        )


def _count_lines(path: str) -> int | None:
    """Returns the number of lines of a file; None for other inputs."""
    if path == _STANDARD or not Path(path).expanduser().is_file():
        return None
    count, last = 0, b"\n"
    with Path(path).expanduser().open("rb") as file:
        while block := file.read(1 << 20):
            count += block.count(b"\n")
            last = block
    return count + (not last.endswith(b"\n"))


def _check_output(path: str) -> None:
    _check_local("output", path)
    target = Path(path).expanduser()
    if target.is_dir():
        raise UsageError(
            "`--output` must be a file, or - for the standard output. "
            f"Received: {path}, a directory"
        )
    files.check_writable(target.parent)


if __name__ == "__main__":
    sys.exit(main())
