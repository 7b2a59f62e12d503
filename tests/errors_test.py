import pathlib

import keras
import pytest

import sos
from sos.errors import NonFiniteLossError, in_a_line
from sos.files import atomic_write
from sos.training.checkpoints import CheckpointError, DamagedCheckpointError
from sos.training.inputs import array_batches
from sos.training.task import TaskError


def caught(call):
    """What a function raises."""
    with pytest.raises(Exception) as error:
        call()
    return error.value


def failing(error):
    def fail():
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (CheckpointError("damaged"), "damaged"),
        (DamagedCheckpointError("damaged"), "damaged"),
        (NonFiniteLossError("NaN at step 3", 3), "NaN at step 3"),
        (TaskError("`Mine.measure` must"), "`Mine.measure` must"),
    ],
)
def test_what_is_no_mistake_in_code_is_told(error, text):
    assert in_a_line(caught(failing(error))) == text


def test_what_the_package_refuses_is_told():
    def refused():
        array_batches(
            {"x": [1.0]}, seed=0, batch_size=2, step=0, context=Context
        )

    class Context:
        num_replicas_in_sync = 3

    assert "positive multiple" in in_a_line(caught(refused))
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    error = caught(lambda: sos.sparsify(model, "FixedMask", rules={"x": None}))
    assert "matches" in in_a_line(error)


@pytest.mark.parametrize(
    "kind", [ValueError, TypeError, RuntimeError, KeyError]
)
def test_mistakes_in_code_need_their_traceback(kind):
    error = caught(failing(kind("mine")))
    assert in_a_line(error) is None
    # Unless it is that of a program which knows what it refuses.
    told = in_a_line(error, packages=(__name__.split(".")[0],))
    assert told == (
        "mine" if issubclass(kind, (ValueError, RuntimeError)) else None
    )


def test_files_of_the_package_are_told_and_those_of_others_are_not(tmp_path):
    (tmp_path / "file").write_text("in the way")

    def ours():
        with atomic_write(tmp_path / "file" / "new"):
            pass

    assert "Errno" in in_a_line(caught(ours))
    error = caught(lambda: open(tmp_path / "nothing"))
    assert in_a_line(error) is None
    error = caught(lambda: pathlib.Path(tmp_path / "nothing").read_text())
    assert in_a_line(error) is None
    assert "nothing" in in_a_line(error, packages=(__name__.split(".")[0],))


def test_what_keras_refuses_needs_its_traceback():
    error = caught(lambda: keras.layers.Dense(-1))
    assert isinstance(error, ValueError)
    assert in_a_line(error) is None


def test_what_goes_wrong_in_the_package_by_itself_needs_its_traceback():
    # Nobody checked the type, and Python found it.
    error = caught(
        lambda: array_batches(None, seed=0, batch_size=2, step=0, context=None)
    )
    assert in_a_line(error) is None
