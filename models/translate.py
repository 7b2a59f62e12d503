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
import hashlib
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, Protocol

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from sos import startup

with startup.quiet():
    import tensorflow as tf

    # The first listing of devices warns about missing GPUs.
    tf.config.list_physical_devices()

import keras
import ml_collections
from absl import logging

from models.decoding import MAX_LENGTH, batches
from models.wmt import VOCABULARY, Translation
from sos import files, keras_compat
from sos.errors import MissingPackageError, StorageError, UsageError, reason
from sos.experiments import config as config_lib
from sos.experiments.run_files import CHECKPOINTS, read_config
from sos.experiments.trunk import with_parent_directory
from sos.training import main as training_main
from sos.training import signals, trainer
from sos.training.checkpoints import Checkpoints

_STANDARD = "-"
_SIGNATURE = "serving_default"
# Seconds between two lines about the progress that are not on a terminal.
_REPORT_SECONDS = 10.0

#: Called with the number of lines of each batch.
OnBatch = Callable[[int], None]


class Translator(Protocol):
    """Protocol of what translates lines.

    Attributes:
        fingerprint: Equal strings for those that translate equally.
        cut: Number of lines so far that were cut because of their length.
    """

    fingerprint: str
    cut: int

    def __call__(self, lines: Sequence[str], on_batch: OnBatch) -> list[str]:
        """Returns the translation of each line."""


class RunTranslator:
    """Translates with the newest checkpoint of a run.

    Args:
        directory: Directory of the run.
        batch_size: As for `models.decoding.Decoder`.

    Raises:
        UsageError: If there is no such run, or it is no translation.
        StorageError: If a file cannot be read.
        CheckpointError: If there is no checkpoint, or it does not fit.
    """

    def __init__(self, directory: str, batch_size: int) -> None:
        directory = os.path.expanduser(directory)
        config = _read_run(directory)
        vocabulary = os.path.join(directory, VOCABULARY)
        if tf.io.gfile.exists(vocabulary):
            # The run may have been moved away from the files that it names.
            config.data.vocabulary = vocabulary
        config.decode.batch_size = batch_size
        config = with_parent_directory(
            config, os.path.dirname(directory.rstrip("/"))
        )
        with (
            config_lib.dtype_policy(config.dtype_policy),
            keras_compat.new_name_counts(),
        ):
            task = config_lib.load_task(config.task)(config)
            model, optimizer = trainer.build(task)
            checkpoints = Checkpoints(
                os.path.join(directory, CHECKPOINTS),
                configuration=trainer.configuration(
                    task,
                    gradient_accumulation_steps=(
                        config.gradient_accumulation_steps
                    ),
                ),
            )
            if checkpoints.restore(model, optimizer) is None:
                raise UsageError(
                    "`--run` must be the directory of a run with a checkpoint. "
                    f"Received: {directory}, without one in "
                    f"{checkpoints.directory}"
                )
        # Kept, as the model loses the mean at the end of the scope.
        self._scope = contextlib.ExitStack()
        self._scope.enter_context(task.averaged(model, checkpoints))
        self._decoder = task.decoder(model)
        decode = config.decode
        self.fingerprint = _hash(
            [
                task.subwords.model,
                repr((decode.beam, decode.alpha, decode.extra_length)).encode(),
                *(
                    keras.ops.convert_to_numpy(variable).tobytes()
                    for variable in model.variables
                ),
            ]
        )

    @property
    def cut(self) -> int:
        """Number of lines so far that were cut."""
        return self._decoder.cut

    def __call__(self, lines: Sequence[str], on_batch: OnBatch) -> list[str]:
        """Returns the translation of each line."""
        return [found.text for found in self._decoder(lines, on_batch)]


class ExportTranslator:
    """Translates with a SavedModel of `models.wmt.TranslationServing`.

    Args:
        directory: Directory of the SavedModel.
        batch_size: As for `models.decoding.Decoder`.

    Raises:
        UsageError: If there is no such model.
        MissingPackageError: If tensorflow-text is missing.
    """

    # The model does not say.
    cut = 0

    def __init__(self, directory: str, batch_size: int) -> None:
        self._batch_size = batch_size
        directory = os.path.expanduser(directory)
        try:
            # It registers the operations of the tokenizer.
            import tensorflow_text  # noqa: F401
        except ImportError as error:
            raise MissingPackageError(
                "An exported translation model needs the package "
                "tensorflow-text: pip install 'state-of-sparsity[translation]'"
            ) from error
        if not tf.saved_model.contains_saved_model(directory):
            raise UsageError(
                "`--model` must be the directory of an exported model, such as "
                "RUN/export/STEP, which --mode=export of models.train writes. "
                f"Received: {directory}"
            )
        try:
            # Kept: its functions do not keep the model's variables.
            with startup.quiet():
                self._model = tf.saved_model.load(directory)
            self._translate = self._model.signatures[_SIGNATURE]
            _, inputs = self._translate.structured_input_signature
            outputs = self._translate.structured_outputs
        except (OSError, ValueError, KeyError, tf.errors.OpError) as error:
            raise UsageError(
                "`--model` must be an exported model that this version of "
                f"TensorFlow can load. Received: {directory}. "
                f"Cause: {type(error).__name__}: {reason(error)}"
            ) from error
        if "sentences" not in inputs or "translations" not in outputs:
            raise UsageError(
                "`--model` must be an exported translation model, which takes "
                "'sentences' and returns 'translations'. Received: one that "
                f"takes {sorted(inputs)} and returns {sorted(outputs)}"
            )
        paths = sorted(
            os.path.join(folder, name)
            for folder, _, names in tf.io.gfile.walk(directory)
            for name in names
        )
        self.fingerprint = _hash(map(_read, paths))

    def __call__(self, lines: Sequence[str], on_batch: OnBatch) -> list[str]:
        """Returns the translation of each line."""
        results = [""] * len(lines)
        # About the number of subwords: only the order of the lines and the
        # sizes of the batches depend on it.
        lengths = [1 + len(line.encode()) // 4 for line in lines]
        for rows in batches(lengths, self._batch_size):
            found = self._translate(
                sentences=tf.constant([lines[i].encode() for i in rows])
            )
            texts = found["translations"].numpy()
            for i, text in zip(rows, texts, strict=True):
                results[i] = text.decode(errors="replace")
            on_batch(len(rows))
        return results


class _State(NamedTuple):
    """Content of OUTPUT.partial.json.

    Attributes:
        model: Fingerprint of the translator.
        lines: Number of lines that are translated.
        input: Hash of these lines.
        bytes: Size of their translations in OUTPUT.partial.
    """

    model: str
    lines: int
    input: str
    bytes: int


class PartialFile:
    """An output file that appears when it is complete.

    Args:
        path: The file.
        model: Fingerprint of the translator.

    Attributes:
        lines: Number of lines that are written.

    Raises:
        UsageError: If another model began the file.
        StorageError: If it cannot be written.
    """

    def __init__(self, path: str, model: str) -> None:
        self._path = Path(path).expanduser()
        self._partial = self._path.with_name(f"{self._path.name}.partial")
        self._json = self._path.with_name(f"{self._path.name}.partial.json")
        self._hash = hashlib.sha256()
        self._state = self._read_state() or _State(model, 0, "", 0)
        if self._state.model != model:
            raise UsageError(
                f"{self._partial} was begun with another model. Use that one, "
                f"remove {self._partial} and {self._json}, or choose another "
                "--output."
            )
        with self._storage_errors():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._partial.open("ab")
            try:
                _lock(self._file, self._partial)
                # What an interrupted program had not finished.
                self._file.truncate(self._state.bytes)
            except BaseException:
                self._file.close()
                raise

    @property
    def lines(self) -> int:
        """Number of lines that are written."""
        return self._state.lines

    def skip(self, lines: Iterator[bytes]) -> None:
        """Reads the lines that are translated already.

        Args:
            lines: The lines of the input.

        Raises:
            UsageError: If they differ from those of the interrupted program.
        """
        count = 0
        for line in itertools.islice(lines, self.lines):
            self._hash.update(line)
            count += 1
        if (count, self._hash.hexdigest()) != (self.lines, self._state.input):
            if self.lines:
                raise UsageError(
                    f"{self._partial} was begun with another input: its first "
                    f"{self.lines:,} lines were others. Use that input, remove "
                    f"{self._partial} and {self._json}, or choose another "
                    "--output."
                )

    def write(self, lines: Sequence[bytes], translations: bytes) -> None:
        """Writes the translations of some lines.

        Args:
            lines: The lines of the input.
            translations: The lines of the output.

        Raises:
            StorageError: If they cannot be written. The lines before are kept.
        """
        for line in lines:
            self._hash.update(line)
        with self._storage_errors():
            self._file.write(translations)
            self._file.flush()
            os.fsync(self._file.fileno())
        state = self._state._replace(
            lines=self.lines + len(lines),
            input=self._hash.hexdigest(),
            bytes=self._state.bytes + len(translations),
        )
        files.write_text(str(self._json), json.dumps(state._asdict()) + "\n")
        self._state = state

    def finish(self) -> None:
        """Gives the complete file its name.

        Raises:
            StorageError: If it cannot be renamed.
        """
        with self._storage_errors():
            self._partial.replace(self._path)
            self._json.unlink(missing_ok=True)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _storage_errors(self) -> contextlib.AbstractContextManager:
        return files.storage_errors(f"{self._path} could not be written")

    def _read_state(self) -> _State | None:
        if not self._partial.exists() or not self._json.exists():
            return None
        try:
            state = _State(**json.loads(self._json.read_text()))
            if self._partial.stat().st_size >= state.bytes:
                return state
            cause = f"{self._partial} is shorter than it says"
        except (OSError, TypeError, ValueError) as error:
            cause = f"{type(error).__name__}: {error}"
        raise StorageError(
            f"{self._json} is damaged: {cause}. Remove it and {self._partial} "
            "to begin again."
        )


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
        translator: What translates them.
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
            "".join(
                # Bytes of the vocabulary may make any character.
                f"{' '.join(text.splitlines())}\n"
                for text in translations
            ).encode(errors="replace"),
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
    if translator.cut:
        print(
            f"{translator.cut} lines were cut to {MAX_LENGTH:,} subwords.",
            file=sys.stderr,
        )
    return 0


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
    try:
        file = Path(path).expanduser().open("rb")
    except OSError as error:
        raise UsageError(
            "`--input` must be a file that can be read, or - for the standard "
            f"input. Received: {path}. Cause: {error.strerror}"
        ) from error
    with file:
        yield file


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
    target = Path(path).expanduser()
    if target.is_dir():
        raise UsageError(
            "`--output` must be a file, or - for the standard output. "
            f"Received: {path}, a directory"
        )
    files.check_writable(target.parent)


def _read_run(directory: str) -> ml_collections.ConfigDict:
    """Returns the config of a run, unlocked."""
    stored = read_config(directory)
    if stored is None:
        raise UsageError(
            "`--run` must be the directory of a run, with a file config.json. "
            f"Received: {directory}"
        )
    config = config_lib.resolve(stored)
    if not issubclass(config_lib.load_task(config.task), Translation):
        raise UsageError(
            "`--run` must be the directory of a run that translates. "
            f"Received: {directory}, of the task {config.task}"
        )
    return ml_collections.ConfigDict(config.to_dict())


def _lock(file: BinaryIO, path: Path) -> None:
    """Locks a file against other processes until it is closed."""
    try:
        # Absent on Windows.
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StorageError(
            f"Another process is writing {path}. Stop it, or choose another "
            "--output."
        ) from None
    except OSError:
        # A file system without locks.
        return


def _hash(parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _read(path: str) -> bytes:
    with tf.io.gfile.GFile(path, "rb") as file:
        return file.read()


if __name__ == "__main__":
    sys.exit(main())
