"""Stops training at a signal without losing what was computed."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from types import TracebackType
from typing import Protocol

#: Exit code of a training that saved everything and ended at SIGTERM: run the
#: same command again to continue. It is `os.EX_TEMPFAIL`, which schedulers and
#: scripts can distinguish from success and from errors.
EXIT_RESTART = 75

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def exit_code(signum: signal.Signals) -> int:
    """Returns the exit code of a process that saved and ended at a signal.

    Args:
        signum: The signal.

    Returns:
        130 for SIGINT, as of any program that Ctrl-C ends, else `EXIT_RESTART`.
    """
    if signum == signal.SIGINT:
        return 128 + signal.SIGINT
    return EXIT_RESTART


class StopSource(Protocol):
    """Asks training to stop, for example a `StopRequest`."""

    @property
    def requested(self) -> signal.Signals | None:
        """The signal that asks for it; None while there is none."""


class StopRequest:
    """Turns SIGTERM and SIGINT (Ctrl-C) into a request to stop.

    Within the scope the first signal only sets `requested`; the training loop
    checks it between two calls, saves, and ends the process with the signal's
    `exit_code`. A second signal, of either kind, ends the process at once
    without saving, with the exit code 128 + its number (143 for SIGTERM, 130
    for SIGINT), even while TensorFlow computes: a thread watches for signals,
    as Python's own handlers would wait for the end of that call.

    ```
    with StopRequest() as stop:
        while not stop.requested:
            ...
        save()
    sys.exit(exit_code(stop.requested))
    ```

    Enter the scope after creating the `tf.distribute` strategy:
    MultiWorkerMirroredStrategy takes SIGTERM for itself. Python has handlers in
    the main thread only; in another thread the scope does nothing, and nothing
    is ever requested. A signal that was ignored before stays ignored.

    Args:
        echo_seconds: Seconds after the first signal within which further ones
            count as its echo: `timeout`, and launchers that pass on a Ctrl-C
            which their child receives as well, send it twice.
        announce: Whether to print a line when a stop is requested.

    Attributes:
        requested: The first signal; None before there is one. Stays set when
            the scope is left.
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
        """Sleeps until a stop is requested or the time is over.

        Args:
            seconds: Seconds to sleep at most.

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
            # Its line comes before the program's last ones.
            self._announcer.join(0.1)

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
                if self._announces:
                    # Not here: nobody may be reading, and a second signal
                    # would have to wait for that.
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
    """Makes CPython write to the wakeup file descriptor, and no more."""
