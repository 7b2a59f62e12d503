import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from sos.training.signals import EXIT_RESTART, StopRequest, exit_code

# How long a machine that does other things too may take to notice a signal.
PROMPT = 5.0

# One call of TensorFlow that takes long, as a loop of training steps does.
PROGRAM = """
import signal, sys
# A shell starts what it runs in the background with SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
import tensorflow as tf
from sos.training.signals import StopRequest, exit_code

@tf.function
def loop(seconds):
    start = tf.timestamp()
    return tf.while_loop(
        lambda x: tf.timestamp() - start < seconds,
        lambda x: [tf.matmul(x, x)],
        [tf.eye(64)],
    )

seconds = tf.constant(float(sys.argv[1]), tf.float64)
loop(tf.zeros_like(seconds))
with StopRequest() as stop:
    while stop.requested is None:
        print("running", flush=True)
        loop(seconds)
    print("saved", stop.requested.name, flush=True)
sys.exit(exit_code(stop.requested))
"""


class Program:
    """The program in a process of its own, in its first loop."""

    def __init__(self, seconds):
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(seconds)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        )

    def __enter__(self):
        assert self.process.stdout.readline() == "running\n"
        time.sleep(0.2)
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.communicate()

    def stop(self, signum):
        """Sends a signal and returns the line that answers it."""
        self.process.send_signal(signum)
        for line in self.process.stderr:
            if " received: " in line:
                return line
        raise AssertionError("The signal was not answered.")


def test_stop_request_lets_the_running_loop_finish():
    with Program(1.5) as program:
        line = program.stop(signal.SIGTERM)
        assert line.startswith("SIGTERM received: ")
        assert "ending after the running loop" in line
        # The answer does not wait for the loop; the end of the program does.
        begin = time.monotonic()
        out, _ = program.process.communicate(timeout=60)
        assert time.monotonic() - begin > 0.5
        assert out == "saved SIGTERM\n"
        assert program.process.returncode == EXIT_RESTART


# Two equal ones end the training of `restart_test`.
@pytest.mark.slow
def test_stop_request_twice_ends_the_process_at_once():
    with Program(600) as program:
        program.stop(signal.SIGTERM)
        time.sleep(0.3)
        program.process.send_signal(signal.SIGINT)
        out, _ = program.process.communicate(timeout=PROMPT)
        assert program.process.returncode == 130
        assert out == ""


# Within this process. SIGINT is Python's, which the shell may have changed.


@pytest.fixture(autouse=True)
def handlers():
    """Handlers that note what reaches them, put back afterwards."""
    seen = []
    signals = (signal.SIGTERM, signal.SIGINT)
    before = {
        signum: signal.signal(signum, lambda signum, frame: seen.append(signum))
        for signum in signals
    }
    yield seen
    for signum, handler in before.items():
        signal.signal(signum, handler)


def send(signum):
    os.kill(os.getpid(), signum)


def requested(stop):
    """What is requested, once the watching thread has seen it."""
    stop.wait(PROMPT)
    return stop.requested


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_stop_request_by_a_signal_is_requested_and_no_more(signum, handlers):
    with StopRequest() as stop:
        assert stop.requested is None
        send(signum)
        assert requested(stop) is signum
    assert stop.requested is signum
    assert handlers == []


def test_stop_request_with_an_echo_takes_it_for_one_signal():
    # Long enough for a machine that does other things too.
    with StopRequest(echo_seconds=60.0) as stop:
        for _ in range(3):
            send(signal.SIGTERM)
            send(signal.SIGINT)
        assert requested(stop) in (signal.SIGTERM, signal.SIGINT)
        time.sleep(0.3)


def test_stop_request_left_restores_everything(handlers):
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)
    before = signal.set_wakeup_fd(sender)
    threads = threading.active_count()
    try:
        with pytest.raises(KeyError), StopRequest() as stop:
            send(signal.SIGTERM)
            assert requested(stop) is signal.SIGTERM
            raise KeyError
        # Whoever listened before has heard of it.
        assert os.read(receiver, 9) == bytes([signal.SIGTERM])
        send(signal.SIGINT)
        assert handlers == [signal.SIGINT]
        assert os.read(receiver, 9) == bytes([signal.SIGINT])
    finally:
        assert signal.set_wakeup_fd(before) == sender
        os.close(receiver)
        os.close(sender)
    # That which prints the message may still be at it.
    assert threading.active_count() <= threads + 1


def test_stop_request_after_another_is_new():
    stop = StopRequest()
    for _ in range(2):
        with stop:
            pass
    with StopRequest() as other:
        send(signal.SIGTERM)
        assert requested(other) is signal.SIGTERM
    assert stop.requested is None


def test_stop_request_of_an_ignored_signal_ignores_it():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopRequest() as stop:
        send(signal.SIGINT)
        send(signal.SIGTERM)
        assert requested(stop) is signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_stop_request_in_another_thread_requests_nothing(handlers):
    inside, leave = threading.Event(), threading.Event()
    stop = StopRequest()

    def run():
        with stop:
            inside.set()
            leave.wait()

    thread = threading.Thread(target=run)
    thread.start()
    inside.wait()
    send(signal.SIGTERM)
    leave.set()
    thread.join()
    assert handlers == [signal.SIGTERM]
    assert stop.requested is None


def test_wait_ends_with_the_time_or_with_the_request():
    with StopRequest() as stop:
        assert not stop.wait(0.01)
        begin = time.monotonic()
        send(signal.SIGTERM)
        assert stop.wait(600)
        assert time.monotonic() - begin < PROMPT


def test_exit_code_of_each_signal_is_the_documented_one():
    assert EXIT_RESTART == os.EX_TEMPFAIL
    assert exit_code(signal.SIGTERM) == EXIT_RESTART
    assert exit_code(signal.SIGINT) == 130
