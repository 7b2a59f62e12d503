"""Hides the lines that TensorFlow prints while it starts.

TensorFlow 2.21 prints about a dozen lines on the standard error when it is
imported and when its devices are first listed (CPU features, oneDNN, no GPU).
They are written before its logging is set up, so that TF_CPP_MIN_LOG_LEVEL,
which should hide them, has no effect. Here it has.
"""

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Iterator

_LOG_LEVEL = "TF_CPP_MIN_LOG_LEVEL"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides what is written to the standard error while TensorFlow starts.

    It has an effect only if the environment variable TF_CPP_MIN_LOG_LEVEL is at
    least 1. Use it around the first import of TensorFlow and the first listing
    of its devices:

    ```
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

    from sos import startup  # `import sos` imports TensorFlow in this scope.

    with startup.quiet():
        import tensorflow as tf

        tf.config.list_physical_devices()
    ```

    If the scope is left with an error, the hidden text is written after all.
    Ctrl-C ends a program with one line and the exit code 130; in an interactive
    session it raises KeyboardInterrupt as always.

    Raises:
        SystemExit: If Ctrl-C interrupts a program.
    """
    if not _wanted():
        yield
        return
    try:
        # Native code writes to the file descriptor, whatever `sys.stderr` is.
        stderr = os.dup(2)
    except OSError:
        # It is closed, as in a service: there is nothing to hide.
        yield
        return
    try:
        hidden = tempfile.TemporaryFile()
    except OSError:
        # The disk is full, which is no reason to fail here.
        os.close(stderr)
        yield
        return
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sys.stderr.flush()
    with hidden:
        os.dup2(hidden.fileno(), 2)
        try:
            yield
        except KeyboardInterrupt:
            if hasattr(sys, "ps1"):
                raise
            os.write(stderr, b"\nInterrupted while TensorFlow was starting.\n")
            # An interrupt within `exec` of a string, as of named tuples, sets a
            # flag that makes Python end by SIGINT. The next `exec` resets it.
            exec("")
            sys.exit(128 + signal.SIGINT)
        except Exception:
            with contextlib.suppress(AttributeError, OSError, ValueError):
                sys.stderr.flush()
            hidden.seek(0)
            os.write(stderr, hidden.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def _command_starts() -> bool:
    """Returns whether `sos`, `python -m sos` or `-m sos.NAME` is starting."""
    package = __name__.partition(".")[0]
    # `runpy` replaces "-m" by the path of the module once it has found it, for
    # which it imports the package. Until then, the name of the module is the
    # last argument of the interpreter.
    if sys.argv[:1] == ["-m"]:
        module = sys.orig_argv[-len(sys.argv) :][0].removeprefix("-m")
        return module.partition(".")[0] == package
    # The script that is installed with the package.
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    return name in (package, f"{package}.exe")


def _wanted() -> bool:
    try:
        return int(os.environ.get(_LOG_LEVEL, "0")) >= 1
    except ValueError:
        return False


if _command_starts():
    os.environ.setdefault(_LOG_LEVEL, "2")
