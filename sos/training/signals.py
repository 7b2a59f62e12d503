"""Stopping by a signal without losing what was computed."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from types import TracebackType
from typing import Protocol

#: The exit code of a training that SIGTERM stopped after it had saved
#: everything: run the same command again to continue. It is `os.EX_TEMPFAIL`,
#: which schedulers and scripts can tell from success and from errors.
EXIT_RESTART = 75

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# `timeout`, and launchers that hand on the Ctrl-C which their child gets as
# well, send a signal twice: within so many seconds it counts once.
_ONE_PRESS = 0.1


def exit_code(signum: signal.Signals) -> int:
    """The exit code of a process that was stopped by a signal and has saved.

    Args:
        signum: The signal.

    Returns:
        130 for SIGINT, as of any program that Ctrl-C ends, else `EXIT_RESTART`.
    """
    if signum == signal.SIGINT:
        return 128 + signal.SIGINT
    return EXIT_RESTART


class StopSource(Protocol):
    """What may ask training to stop, such as `sos.training.signals`."""

    @property
    def requested(self) -> signal.Signals | None:
        """The signal that asks for it, None while there is none."""


class StopRequest:
    """Turns SIGTERM and SIGINT (Ctrl-C) into a request to stop.

    Within the scope the first signal does nothing but set `requested`; whoever
    runs the loop looks at it between two calls, saves, and ends the process
    with the `exit_code` of that signal. A second one, of either kind, ends the
    process at once with the exit code 128 + its number (143 for SIGTERM, 130
    for SIGINT) and nothing saved, even while TensorFlow computes: Python's own
    handlers would wait for the end of that call, so that a thread watches in
    their place. A signal within 0.1 s after the first is taken for its echo.

    ```
    with StopRequest() as stop:
        while not stop.requested:
            ...
        save()
    sys.exit(exit_code(stop.requested))
    ```

    Enter the scope after the `tf.distribute` strategy is made:
    MultiWorkerMirroredStrategy takes SIGTERM for itself. Python has handlers in
    the main thread only; in another thread the scope does nothing and nothing
    is ever requested. A signal that was ignored before stays ignored.

    Attributes:
        requested: The first signal, None before there was one. It stays when
            the scope is left.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._event = threading.Event()
        self._previous: dict[signal.Signals, object] = {}
        self._watcher: threading.Thread | None = None
        self._announcer: threading.Thread | None = None

    def wait(self, seconds: float) -> bool:
        """Sleeps, at most until a stop is requested.

        Args:
            seconds: How long to sleep.

        Returns:
            Whether a stop is requested.
        """
        return self._event.wait(seconds)

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is not threading.main_thread():
            return self
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        # CPython's handler in C writes the signal's number here right away,
        # whatever the main thread is doing.
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
            # So that it does not come after what is said of the end.
            self._announcer.join(_ONE_PRESS)

    def _watch(self) -> None:
        """Reads the numbers of signals until the sender is closed."""
        first = 0.0
        while data := self._receiver.recv(1):
            if self._previous_fd >= 0:
                # For an event loop that had been listening.
                with contextlib.suppress(OSError):
                    os.write(self._previous_fd, data)
            if data[0] not in self._previous:
                continue
            now = time.monotonic()
            if self.requested is None:
                first = now
                self.requested = signal.Signals(data[0])
                self._event.set()
                # Not here: nobody may be reading, and a second signal would
                # have to wait for that.
                self._announcer = threading.Thread(
                    target=self._announce, daemon=True
                )
                self._announcer.start()
            elif now - first > _ONE_PRESS:
                os._exit(128 + data[0])

    def _announce(self) -> None:
        print(
            f"{self.requested.name} received: this ends after the running "
            "loop, and saves. Send it again to end at once without saving.",
            file=sys.stderr,
            flush=True,
        )


def _do_nothing(signum: int, frame: object) -> None:
    """Makes CPython write to the wakeup file descriptor, and no more."""
