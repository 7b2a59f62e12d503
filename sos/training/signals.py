"""Stops training at a signal without losing steps."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from types import TracebackType
from typing import Protocol

#: Exit code of a program that SIGTERM stopped after saving everything: run the
#: same command again to continue. It is `os.EX_TEMPFAIL`, which schedulers and
#: scripts can distinguish from success and from errors.
EXIT_RESTART = 75

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def exit_code(signum: signal.Signals) -> int:
    """Returns the exit code of a program that a signal stopped after saving.

    Args:
        signum: The signal.

    Returns:
        130 for SIGINT, as usual after Ctrl-C, else `EXIT_RESTART`.
    """
    if signum == signal.SIGINT:
        return 128 + signal.SIGINT
    return EXIT_RESTART


class StopSource(Protocol):
    """Protocol of objects that request a stop, such as a `StopRequest`."""

    @property
    def requested(self) -> signal.Signals | None:
        """The signal that requests a stop, or None."""


class StopRequest:
    """Turns SIGTERM and SIGINT (Ctrl-C) into a request to stop.

    Within the scope the first signal only sets `requested`. The training loop
    checks it between two calls, saves, and ends the process with the signal's
    `exit_code`. A second signal, of either kind, ends the process at once
    without saving, with the exit code 128 + its number (143 for SIGTERM, 130
    for SIGINT). It does so even while TensorFlow computes, because a thread
    watches for signals: Python's handlers would wait for the end of that call.

    Enter the scope after creating the `tf.distribute` strategy, because
    MultiWorkerMirroredStrategy installs its own handler of SIGTERM. Python has
    signal handlers in the main thread only: in another thread the scope has no
    effect. A signal that was ignored before stays ignored.

    Args:
        echo_seconds: Seconds after the first signal within which further ones
            are ignored. `timeout`, and launchers that forward a Ctrl-C which
            their child receives as well, send every signal twice.
        announce: Whether to print a line when a stop is requested.

    Attributes:
        requested: The first signal, or None. Stays set after the scope.

    Example:
    >>> import sos.training
    >>> with sos.training.StopRequest() as stop:
    ...     for step in range(3):
    ...         if stop.requested:
    ...             break
    >>> stop.requested is None
    True
    """

    def __init__(
        self, *, echo_seconds: float = 0.1, announce: bool = True
    ) -> None:
        self._echo_seconds = echo_seconds
        self._announces = announce
        self.requested: signal.Signals | None = None
        self._event = threading.Event()
        self._previous: dict[signal.Signals, object] = {}
        self._watcher: threading.Thread | None = None
        self._announcer: threading.Thread | None = None

    def wait(self, seconds: float) -> bool:
        """Sleeps until a stop is requested.

        Args:
            seconds: Maximum number of seconds to sleep.

        Returns:
            Whether a stop is requested.
        """
        return self._event.wait(seconds)

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is not threading.main_thread():
            return self
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        # CPython's handler in C writes the signal's number to this socket at
        # once, even while the main thread is busy.
        self._previous_fd = signal.set_wakeup_fd(
            self._sender.fileno(), warn_on_full_buffer=False
        )
        for signum in _SIGNALS:
            if signal.getsignal(signum) is not signal.SIG_IGN:
                self._previous[signum] = signal.signal(signum, _do_nothing)
        self._watcher = threading.Thread(
            target=self._watch, name="StopRequest", daemon=True
        )
        self._watcher.start()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._watcher is None:
            return
        for signum, handler in self._previous.items():
            # None: a handler that was not installed from Python.
            signal.signal(signum, handler or signal.SIG_DFL)
        signal.set_wakeup_fd(self._previous_fd)
        self._sender.close()
        self._watcher.join()
        self._watcher = None
        self._receiver.close()
        if self._announcer is not None:
            # Prints its line before the program's last ones.
            self._announcer.join(0.1)

    def _watch(self) -> None:
        """Reads the numbers of signals until the sender is closed."""
        first = 0.0
        while data := self._receiver.recv(1):
            if self._previous_fd >= 0:
                # An event loop may be listening to the previous descriptor.
                with contextlib.suppress(OSError):
                    os.write(self._previous_fd, data)
            if data[0] not in self._previous:
                continue
            now = time.monotonic()
            if self.requested is None:
                first = now
                self.requested = signal.Signals(data[0])
                self._event.set()
                if self._announces:
                    # In a thread: printing may block, and this one must watch
                    # for a second signal.
                    self._announcer = threading.Thread(
                        target=self._announce, daemon=True
                    )
                    self._announcer.start()
            elif now - first > self._echo_seconds:
                os._exit(128 + data[0])

    def _announce(self) -> None:
        print(
            f"{self.requested.name} received: saving and ending after the "
            "running loop. Send it again to end at once without saving.",
            file=sys.stderr,
            flush=True,
        )


def _do_nothing(signum: int, frame: object) -> None:
    """Does nothing; CPython writes to the wakeup file descriptor."""
