"""An output file that appears when it is complete, and can be continued."""

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from sos import files
from sos.errors import StorageError, UsageError


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
        with self._storage_errors(), contextlib.ExitStack() as stack:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = stack.enter_context(self._partial.open("ab"))
            # Lock before reading: another process may still write the file, or
            # may just have renamed it.
            if not (files.lock_file(self._file) and self._is_current()):
                raise StorageError(
                    f"Another process is writing {self._partial}, or has just "
                    "finished it. Wait for it, or choose another --output."
                )
            state = self._read_state()
            if state is None:
                # Of a file that was finished, or that is gone.
                self._json.unlink(missing_ok=True)
                state = _State(model, 0, self._hash.hexdigest(), 0)
            self._state = state
            if self._state.model != model:
                raise UsageError(
                    f"{self._partial} was begun with another model. Use that "
                    f"one, remove {self._partial} and {self._json}, or choose "
                    "another --output."
                )
            # What an interrupted program had not finished.
            self._file.truncate(self._state.bytes)
            stack.pop_all()

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
            raise UsageError(
                f"{self._partial} was begun with another input: its first "
                f"{self.lines:,} lines were others. Use that input, remove "
                f"{self._partial} and {self._json}, or choose another --output."
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

    def _is_current(self) -> bool:
        """Returns whether the open file still has its name."""
        try:
            found = self._partial.stat()
        except FileNotFoundError:
            return False
        return os.path.samestat(os.fstat(self._file.fileno()), found)

    def _read_state(self) -> _State | None:
        if not (self._json.exists() and self._partial.stat().st_size):
            return None
        try:
            state = _State(**json.loads(self._json.read_text()))
            if self._partial.stat().st_size >= state.bytes:
                return state
            cause = f"{self._partial} is shorter than {self._json.name} says"
        except (OSError, TypeError, ValueError) as error:
            cause = f"{type(error).__name__}: {error}"
        raise StorageError(
            f"{self._json} is damaged: {cause}. Remove it and {self._partial} "
            "to begin again."
        )
