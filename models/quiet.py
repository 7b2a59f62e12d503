"""Keeps TensorFlow's start-up notes away from the terminal."""

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Holds back what native code writes to the standard error.

    TensorFlow writes a dozen lines about CPU features and absent GPUs while it
    is imported, which no log level turns off. If the scope is left with an
    error, what was held back is written after all. Ctrl-C ends the process with
    the exit code 130, as nothing has begun yet.

    Yields:
        Nothing.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as held_back:
        os.dup2(held_back.fileno(), 2)
        try:
            yield
        except KeyboardInterrupt:
            os.write(stderr, b"\nInterrupted before anything began.\n")
            # At once, as the import of a native library is no place to unwind.
            os._exit(128 + signal.SIGINT)
        except Exception:
            held_back.seek(0)
            os.write(stderr, held_back.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
