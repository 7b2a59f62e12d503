"""The loop alone, with checkpoints and a clock of its own; see `main_test`."""

import signal

import pytest

from sos.errors import CheckpointError, DamagedCheckpointError, Stopped
from sos.training.continuous_evaluation import ContinuousEvaluation
from sos.training.reporting import Summary

LAST = 20


class FakeCheckpoints:
    """Steps of checkpoints, and what is wrong with some of them."""

    directory = "work/checkpoints"

    def __init__(self, trainer, *steps, damaged=(), removed=(), checked=None):
        self._trainer = trainer
        self.present = list(steps)
        self.damaged = set(damaged)
        self.removed = set(removed)
        self._checked = checked

    def steps(self):
        return sorted(self.present)

    def check(self, step, model, optimizer):
        if self._checked is not None:
            raise self._checked

    def restore_step(self, step, model, optimizer):
        if step in self.damaged:
            raise DamagedCheckpointError("half of it")
        self._trainer.step = step


class FakeTrainer:
    model = optimizer = None
    step = 0

    def restore_step(self, checkpoints, step):
        checkpoints.restore_step(step, self.model, self.optimizer)

    def evaluate(self, total_steps, *, checkpoints, stop):
        if self.step in checkpoints.removed:
            raise DamagedCheckpointError("it is gone")
        return Summary(
            step=self.step, total_steps=total_steps, kind="eval", seconds=1.0
        )


class FakeStop:
    """Time passes while waiting for it, and checkpoints appear."""

    def __init__(self, checkpoints, *arrivals, requested=lambda: None):
        self._checkpoints = checkpoints
        self._arrivals = list(arrivals)
        self._requested = requested
        self.waits = []
        self.now = 100.0

    @property
    def requested(self):
        return self._requested()

    def wait(self, seconds):
        self.waits.append(seconds)
        self.now += seconds
        if self._arrivals:
            self._checkpoints.present += self._arrivals.pop(0)
        return self._requested() is not None


class Evaluation:
    """An evaluation of fakes, and what came of it."""

    def __init__(self, *steps, arrivals=(), requested=None, **checkpoints):
        self.trainer = FakeTrainer()
        self.checkpoints = FakeCheckpoints(self.trainer, *steps, **checkpoints)
        self.stop = FakeStop(
            self.checkpoints,
            *arrivals,
            requested=lambda: requested(self) if requested else None,
        )
        self.steps, self.messages = [], []

    def run(self, evaluated=(), **arguments):
        evaluation = ContinuousEvaluation(
            self.trainer,
            self.checkpoints,
            last_step=LAST,
            timer=lambda: self.stop.now,
            **arguments,
        )
        evaluation.run(
            evaluated,
            on_summary=lambda summary: self.steps.append(summary.step),
            on_wait=self.messages.append,
            stop=self.stop,
        )


def test_evaluation_of_finished_training_visits_every_checkpoint_once():
    evaluation = Evaluation(5, 10, LAST)
    evaluation.run()
    assert evaluation.steps == [5, 10, LAST]
    assert evaluation.messages == evaluation.stop.waits == []


def test_evaluation_resumed_leaves_out_what_was_evaluated():
    evaluation = Evaluation(5, 10, LAST)
    evaluation.run(evaluated={5, LAST})
    assert evaluation.steps == [10]


def test_evaluation_of_running_training_waits_and_says_so_once():
    evaluation = Evaluation(arrivals=([], [5], [10, 15], [], [LAST]))
    evaluation.run(poll_seconds=3.0)
    assert evaluation.steps == [5, 10, 15, LAST]
    assert evaluation.stop.waits == [3.0] * 5
    (message,) = evaluation.messages
    assert (
        message == "Waiting for checkpoints in work/checkpoints up to step 20."
    )


@pytest.mark.parametrize(
    ("poll_seconds", "waits"), [(0.25, [0.25, 0.25, 0.1]), (5.0, [0.6])]
)
def test_evaluation_without_new_checkpoint_gives_up(poll_seconds, waits):
    evaluation = Evaluation(5)
    with pytest.raises(CheckpointError) as error:
        evaluation.run(timeout=0.6, poll_seconds=poll_seconds)
    assert evaluation.stop.waits == pytest.approx(waits)
    assert str(error.value) == (
        "No new checkpoint appeared in work/checkpoints within 0.6 seconds, "
        "and "
        "the last step, 20, has none. Check that training is running."
    )


def test_evaluation_timeout_counts_from_the_newest_checkpoint():
    evaluation = Evaluation(arrivals=([5], [10], [15], [LAST]))
    # Two seconds for each.
    evaluation.run(timeout=3.0, poll_seconds=2.0)
    assert evaluation.steps == [5, 10, 15, LAST]


def test_evaluation_asked_to_stop_ends_between_two_checkpoints():
    evaluation = Evaluation(
        5,
        10,
        LAST,
        requested=lambda evaluation: (
            signal.SIGTERM if evaluation.steps == [5, 10] else None
        ),
    )
    with pytest.raises(Stopped, match="SIGTERM at step 10, evaluated"):
        evaluation.run()
    assert evaluation.steps == [5, 10]


def test_evaluation_asked_to_stop_after_the_last_one_succeeds():
    evaluation = Evaluation(
        5,
        LAST,
        requested=lambda evaluation: (
            signal.SIGTERM if LAST in evaluation.steps else None
        ),
    )
    evaluation.run()
    assert evaluation.steps == [5, LAST]


def test_evaluation_asked_to_stop_while_waiting_ends():
    evaluation = Evaluation(
        5,
        requested=lambda evaluation: (
            signal.SIGINT if evaluation.stop.waits else None
        ),
    )
    with pytest.raises(Stopped, match="SIGINT at step 5, while waiting"):
        evaluation.run()


def test_evaluation_passes_over_damaged_checkpoints(caplog):
    evaluation = Evaluation(5, 10, damaged=[5], arrivals=([], [LAST]))
    evaluation.run()
    assert evaluation.steps == [10, LAST]
    # One warning, however often the directory is read.
    (warning,) = caplog.records
    assert "step 5 is damaged" in warning.getMessage()
    assert "half of it" in warning.getMessage()


def test_evaluation_of_a_checkpoint_removed_meanwhile_goes_on(caplog):
    # An evaluator that averages checkpoints finds none.
    evaluation = Evaluation(5, 10, LAST, removed=[5])
    evaluation.run()
    assert evaluation.steps == [10, LAST]
    assert "it is gone" in caplog.text


def test_evaluation_of_incomplete_checkpoint_waits_for_the_rest():
    # As on an object store, where files appear one after the other.
    evaluation = Evaluation(LAST, damaged=[LAST], arrivals=([], []))
    wait = evaluation.stop.wait

    def complete(seconds):
        evaluation.checkpoints.damaged.clear()
        return wait(seconds)

    evaluation.stop.wait = complete
    evaluation.run()
    assert evaluation.steps == [LAST]


def test_evaluation_of_another_configuration_raises_before_evaluating():
    error = CheckpointError("another configuration")
    evaluation = Evaluation(5, LAST, checked=error)
    with pytest.raises(CheckpointError, match="another configuration"):
        evaluation.run(evaluated={5, LAST})


def test_evaluation_of_damaged_newest_checkpoint_is_no_error():
    evaluation = Evaluation(
        5, LAST, checked=DamagedCheckpointError("half of it")
    )
    evaluation.run(evaluated={5, LAST})
    assert evaluation.steps == []
