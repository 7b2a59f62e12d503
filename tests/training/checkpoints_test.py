import doctest
import errno
import json
import os
import pathlib
import random
import resource
import shutil

import hypothesis
import hypothesis.strategies as st
import keras
import numpy as np
import pytest
import tensorflow as tf
from absl import logging

import sos
from sos.__main__ import main
from sos.errors import CheckpointError, UsageError
from sos.training import checkpoints as checkpoints_module
from sos.training.checkpoints import (
    Checkpoints,
    canonical_path,
    diff,
    remove_unfinished,
    variable_specs,
)
from tests.support import processes, techniques

CONFIGURATION = {"rate": 0.5, "seed": 1, "data": {"name": "toy", "size": 9}}


class Trained:
    """A model and its optimizer with values that tell the step.

    They are random, as are the states of their random generators.
    """

    def __init__(self, technique="MagnitudePruning", *, step=0, units=8):
        keras.utils.set_random_seed(0)
        layers = keras.layers
        self.model = sos.sparsify(
            keras.Sequential(
                [
                    keras.Input((6,)),
                    layers.Dense(units, name="a"),
                    layers.BatchNormalization(name="norm"),
                    layers.Dropout(0.5, name="drop"),
                    layers.Dense(2, name="b"),
                ],
                name="toy",
            ),
            technique,
            **techniques.arguments(technique),
        )
        self.optimizer = keras.optimizers.Adam(0.01)
        self.optimizer.build(self.model.trainable_variables)
        self.move_to(step)

    @property
    def variables(self):
        return [*self.model.variables, *self.optimizer.variables]

    def move_to(self, step):
        """Gives all variables the values that they have at a step."""
        generator = np.random.default_rng(step)
        for variable in self.variables:
            values = generator.random(variable.shape)
            if "int" in variable.dtype:
                values = generator.integers(2, size=variable.shape)
            variable.assign(values.astype(variable.dtype))
        self.optimizer.iterations.assign(step)

    def bits(self):
        return [
            keras.ops.convert_to_numpy(variable).tobytes()
            for variable in self.variables
        ]

    def is_at(self, step):
        """Whether all values are those of a step, bit for bit."""
        found = self.bits()
        before = [variable.numpy() for variable in self.variables]
        self.move_to(step)
        expected = self.bits()
        for variable, value in zip(self.variables, before, strict=True):
            variable.assign(value)
        return found == expected

    def save(self, checkpoints, *steps, **metadata):
        for step in steps:
            self.move_to(step)
            checkpoints.save(
                step, self.model, self.optimizer, metadata=metadata
            )

    def restore(self, checkpoints):
        self.move_to(987)
        return checkpoints.restore(self.model, self.optimizer)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "work" / "checkpoints"


@pytest.fixture
def make(folder):
    """Makes checkpoints in one directory."""

    def make(configuration=CONFIGURATION, **kwargs):
        return Checkpoints(folder, configuration=configuration, **kwargs)

    return make


@pytest.fixture(scope="module")
def trained():
    return Trained()


@pytest.fixture
def warnings(monkeypatch):
    """What is logged."""
    lines = []
    monkeypatch.setattr(
        logging, "warning", lambda text, *values: lines.append(text % values)
    )
    return lines


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# What is saved comes back.


@pytest.mark.oldest
@pytest.mark.parametrize("technique", techniques.NAMES)
def test_restore_of_every_technique_returns_all_bits(make, technique):
    Trained(technique).save(make(), 12, seconds=2.5)
    # Keras numbers what is made later differently.
    other = Trained(technique)
    assert any("seed_generator" in v.path for v in other.variables)
    found = other.restore(make())
    assert found == {"step": 12, "seconds": 2.5}
    assert other.is_at(12)


def test_restore_without_checkpoints_returns_none(make, trained, folder):
    assert trained.restore(make()) is None
    assert make().steps() == []
    assert not folder.exists()
    folder.mkdir(parents=True)
    assert trained.restore(make()) is None
    assert trained.is_at(987)


def test_restore_step_of_several_restores_it(make, trained):
    trained.save(make(), 1, 2, 3)
    found = make().restore_step(2, trained.model, trained.optimizer)
    assert found["step"] == 2
    assert trained.is_at(2)


@pytest.mark.oldest
def test_save_writes_what_tensorflow_alone_reads(make, trained):
    trained.save(make(), 3)
    other = Trained(step=50)
    prefix = os.path.join(make().path(3), "variables")
    read = tf.train.Checkpoint(model=other.model, optimizer=other.optimizer)
    read.read(prefix).assert_existing_objects_matched()
    trained.move_to(3)
    for name in ("weights", "trainable_variables"):
        for variable, expected in zip(
            getattr(other.model, name),
            getattr(trained.model, name),
            strict=True,
        ):
            np.testing.assert_array_equal(variable, expected)
    assert other.optimizer.iterations.numpy() == 3


class Stack(keras.layers.Layer):
    """A layer that has others in a list, which TensorFlow does not track."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.layers = [
            keras.layers.Dense(4, name="one"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Dropout(0.5, name="drop"),
            keras.layers.Dense(4, name="two"),
        ]

    def call(self, x, training=False):
        for layer in self.layers:
            x = (
                layer(x, training=training)
                if layer.name in ("norm", "drop")
                else layer(x)
            )
        return x


def stacked(technique):
    model = keras.Sequential([keras.Input((4,)), Stack(), Stack()])
    sos.sparsify(
        model, technique, copy=False, **techniques.arguments(technique)
    )
    optimizer = keras.optimizers.Adam()
    optimizer.build(model.trainable_variables)
    return model, optimizer


@pytest.mark.oldest
@pytest.mark.parametrize("technique", techniques.NAMES)
def test_layers_in_lists_are_saved_restored_averaged_and_reported(
    technique, make, capsys
):
    rng = np.random.default_rng(0)
    model, optimizer = stacked(technique)
    saved = []
    for step in (1, 2):
        for variable in (*model.variables, *optimizer.variables):
            values = rng.uniform(1, 2, variable.shape)
            if not keras.backend.is_float_dtype(variable.dtype):
                values = rng.integers(0, 2, variable.shape)
            variable.assign(keras.ops.cast(values, variable.dtype))
        optimizer.iterations.assign(step)
        make().save(step, model, optimizer)
        saved.append(techniques.values(model) + techniques.values(optimizer))
    other, its_optimizer = stacked(technique)
    assert make().restore(other, its_optimizer) == {"step": 2}
    found = techniques.values(other) + techniques.values(its_optimizer)
    for value, expected in zip(found, saved[1], strict=True):
        np.testing.assert_array_equal(value, expected)
    with make().average(other, last=2):
        found = techniques.values(other)
        for value, *expected in zip(
            found, *(values[: len(found)] for values in saved), strict=True
        ):
            if np.issubdtype(value.dtype, np.floating):
                np.testing.assert_allclose(value, np.mean(expected, 0), 1e-6)
            else:
                np.testing.assert_array_equal(value, expected[1])
    main(["report", make().path(2)])
    printed = capsys.readouterr().out
    report = sos.sparsity_report(other)
    assert f"{report.sparsity:.2%} of the weights" in printed
    for name in ("stack/one/kernel", "stack/two/kernel", "two (2)/kernel"):
        assert name in printed


def test_save_writes_metadata_of_its_contents(make, trained):
    trained.save(make(), 3, seconds=1.5)
    path = pathlib.Path(make().path(3), "metadata.json")
    metadata = json.loads(path.read_text())
    assert metadata["step"] == 3
    assert metadata["metadata"] == {"seconds": 1.5}
    assert metadata["configuration"] == CONFIGURATION
    assert metadata["versions"] == {
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
    }
    for name, size in metadata["files"].items():
        assert path.with_name(name).stat().st_size == size
    assert len(metadata["variables"]) == len(trained.variables)
    assert metadata["variables"]["a/kernel_mask"] == "uint8 6x8"


@pytest.mark.parametrize("name", ["variables", ".", "..", "../.."])
def test_save_writes_what_the_report_command_reads(
    name, trained, tmp_path, capsys
):
    checkpoints = Checkpoints(
        tmp_path / "checkpoints", configuration=CONFIGURATION
    )
    for step in (2, 3):
        trained.save(checkpoints, step)
    main(["report", os.path.join(checkpoints.path(3), name)])
    printed = capsys.readouterr().out
    for path, mask in techniques.sparse_state(trained.model).items():
        weight = path.removesuffix(":mask")
        (line,) = [line for line in printed.splitlines() if weight in line]
        assert f" {mask.size} " in line
        assert f"{1 - mask.mean():.2%}" in line


@pytest.mark.oldest
def test_restore_on_replicas_and_one_device_reads_the_others(make):
    with techniques.two_replicas().scope():
        two = Trained()
    two.save(make(), 4)
    one = Trained()
    assert one.restore(make())["step"] == 4
    assert one.is_at(4)
    one.save(make(), 5)
    assert two.restore(make())["step"] == 5
    assert two.is_at(5)
    for variable in two.variables:
        first, second = variable.value.values
        assert first.numpy().tobytes() == second.numpy().tobytes()


def test_steps_of_many_digits_sort_by_number(make, trained, folder):
    steps = [9, 99_999_999, 100_000_000, 123_456_789_012]
    trained.save(make(), *reversed(steps[1:]), steps[0])
    assert make().steps() == steps
    assert "step-00000009" in names(folder)
    assert trained.restore(make())["step"] == steps[-1]


# How many are kept.


@pytest.mark.parametrize(
    ("kept", "left"),
    [
        ({}, [3, 4, 5, 6, 7]),
        ({"keep": 2}, [6, 7]),
        ({"keep": 1}, [7]),
        ({"keep": 9}, [1, 2, 3, 4, 5, 6, 7]),
        ({"keep": 1, "keep_every": 3}, [3, 6, 7]),
        ({"keep": 2, "keep_every": 1}, [1, 2, 3, 4, 5, 6, 7]),
        ({"keep": 2, "keep_every": 100}, [6, 7]),
        ({"keep": 1, "keep_steps": (1, 4, 9)}, [1, 4, 7]),
        ({"keep": 1, "keep_every": 3, "keep_steps": [2]}, [2, 3, 6, 7]),
    ],
    ids=str,
)
def test_save_keeps_the_newest_and_every_kth(make, trained, folder, kept, left):
    for step in range(1, 8):
        trained.save(make(**kept), step)
    assert make().steps() == left
    assert names(folder) == [f"step-{step:08d}" for step in left]


def test_save_that_cannot_remove_an_old_one_succeeds(
    make, trained, monkeypatch
):
    trained.save(make(), 1, 2)
    rename = tf.io.gfile.rename

    def fail_for_the_old(source, target):
        if "old" in target:
            raise tf.errors.PermissionDeniedError(None, None, "no")
        return rename(source, target)

    monkeypatch.setattr(tf.io.gfile, "rename", fail_for_the_old)
    trained.save(make(keep=1), 3)
    assert make().steps() == [1, 2, 3]


def test_save_with_keep_steps_keeps_the_initial_one(make, trained):
    trained.save(make(keep=1, keep_steps=(0,)), 0, 1, 2)
    assert make().steps() == [0, 2]
    make().restore_step(0, trained.model, trained.optimizer)
    assert trained.is_at(0)


def test_remove_kept_step_removes_it(make, trained, folder):
    checkpoints = make(keep_steps=(1, 2))
    trained.save(checkpoints, 1, 2, 3)
    checkpoints.remove(2)
    assert names(folder) == ["step-00000001", "step-00000003"]
    # Again, and without any directory.
    checkpoints.remove(2)
    Checkpoints(folder / "absent", configuration={}).remove(2)
    assert checkpoints.steps() == [1, 3]


def test_remove_interrupted_leaves_no_damaged_checkpoint(
    make, trained, monkeypatch
):
    trained.save(make(), 1, 2)

    def fail(path):
        raise tf.errors.PermissionDeniedError(None, None, "no")

    with monkeypatch.context() as patch:
        patch.setattr(tf.io.gfile, "rmtree", fail)
        with pytest.raises(CheckpointError, match="step-00000002.*: no"):
            make().remove(2)
    assert trained.restore(make())["step"] == 1
    remove_unfinished(make().directory)
    assert names(pathlib.Path(make().directory)) == ["step-00000001"]


# Averages.


def means(trained, *steps):
    """The values of the model that is the mean of these steps."""
    values = []
    for step in steps:
        trained.move_to(step)
        values.append([v.numpy() for v in trained.model.variables])
    return [
        sum(v.astype(np.float64) for v in same) / len(steps)
        if "float" in str(same[0].dtype)
        else same[-1]
        for same in zip(*values, strict=True)
    ]


def check_mean(trained, *steps):
    found = [v.numpy() for v in trained.model.variables]
    for value, expected in zip(found, means(trained, *steps), strict=True):
        np.testing.assert_array_equal(value, expected.astype(value.dtype))


@pytest.mark.parametrize("technique", techniques.NAMES)
def test_average_of_every_technique_has_means_and_newest_masks(make, technique):
    trained = Trained(technique)
    trained.save(make(), 5, 10, 15, 20)
    trained.move_to(99)
    before = trained.bits()
    with make().average(trained.model, last=3) as steps:
        assert steps == (10, 15, 20)
        check_mean(trained, 10, 15, 20)
    trained.optimizer.iterations.assign(99)
    assert (
        trained.bits()[: len(trained.model.variables)]
        == (before[: len(trained.model.variables)])
    )


def test_average_of_one_is_the_newest_checkpoint(make, trained, warnings):
    trained.save(make(), 5, 10)
    trained.move_to(99)
    with make().average(trained.model, last=1) as steps:
        assert steps == (10,)
        check_mean(trained, 10)
    assert warnings == []


def test_average_after_an_exception_restores_all_bits(make, trained):
    trained.save(make(), 5, 10)
    trained.move_to(99)
    with pytest.raises(ZeroDivisionError), make().average(trained.model):
        raise ZeroDivisionError
    assert trained.is_at(99)


def test_average_of_fewer_checkpoints_says_how_many(
    make, trained, warnings, folder
):
    trained.save(make(), 5, 10)
    with make().average(trained.model) as steps:
        assert steps == (5, 10)
        check_mean(trained, 5, 10)
    assert warnings == [
        "Averaging 2 instead of 5 checkpoints, of steps 5, 10: there are no "
        f"others in {folder}."
    ]


def test_average_leaves_out_untrained_weights(make, trained, warnings):
    trained.save(make(), 0, 5)
    with make().average(trained.model, last=2) as steps:
        assert steps == (5,)
        check_mean(trained, 5)
    assert "Averaging 1 instead of 2" in warnings[0]
    trained.save(make(), 10)
    with make().average(trained.model, last=3, after=5) as steps:
        assert steps == (10,)
    # There are no others.
    with make().up_to(0).average(trained.model, last=2) as steps:
        assert steps == (0,)
    with make().up_to(5).average(trained.model, last=2, after=5) as steps:
        assert steps == (5,)


def test_average_skips_damaged_checkpoints(make, trained, warnings):
    trained.save(make(), 5, 10, 15, 20)
    for step, damage in (
        (10, cut("metadata.json", 10)),
        (20, flip("variables.data-00000-of-00001", 0.5)),
    ):
        damage(pathlib.Path(make().path(step)))
    with make().average(trained.model, last=2) as steps:
        assert steps == (5, 15)
        check_mean(trained, 5, 15)
    assert [line.split(" ")[2] for line in warnings] == [
        make().path(20),
        make().path(10),
    ]


def test_average_of_no_checkpoint_raises(make, trained, folder):
    trained.move_to(99)
    with (
        pytest.raises(CheckpointError, match=f"{folder} has no checkpoint"),
        make().average(trained.model),
    ):
        pass
    assert trained.is_at(99)


def test_average_of_another_configuration_or_model_raises(make, trained):
    trained.save(make(), 5)
    trained.move_to(99)
    with (
        pytest.raises(CheckpointError, match="rate: 0.5 saved, 0.1 now"),
        make({**CONFIGURATION, "rate": 0.1}).average(trained.model),
    ):
        pass
    assert trained.is_at(99)
    other = Trained(units=7)
    with (
        pytest.raises(CheckpointError, match="a/kernel"),
        make().average(other.model),
    ):
        pass


def test_average_of_less_than_one_raises(make, trained):
    with (
        pytest.raises(UsageError, match="last=0"),
        make().average(trained.model, last=0),
    ):
        pass


def test_average_of_equal_checkpoints_has_equal_bits(make, trained):
    # Three times a float32 may not be one.
    for step in (1, 2, 3):
        trained.move_to(7)
        trained.optimizer.iterations.assign(step)
        make().save(step, trained.model, trained.optimizer)
    trained.move_to(99)
    with make().average(trained.model, last=3):
        check_mean(trained, 7)


def test_average_of_bfloat16_variables_rounds_once(make, folder):
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(4, dtype="bfloat16")]
    )
    optimizer = keras.optimizers.SGD()
    optimizer.build(model.trainable_variables)
    kernels = []
    for step in range(1, 4):
        optimizer.iterations.assign(step)
        kernel = np.random.default_rng(step).normal(size=(3, 4))
        model.layers[0].kernel.assign(kernel)
        kernels.append(
            keras.ops.convert_to_numpy(model.layers[0].kernel).astype(float)
        )
        make().save(step, model, optimizer)
    with make().average(model, last=3):
        found = keras.ops.convert_to_numpy(model.layers[0].kernel)
    expected = np.mean(kernels, axis=0).astype(found.dtype)
    np.testing.assert_array_equal(found, expected)


def test_average_example_runs(tmp_path, monkeypatch):
    # Those of methods are not in docstrings_test.
    monkeypatch.chdir(tmp_path)
    (example,) = doctest.DocTestFinder().find(
        Checkpoints.average, "average", globs={}
    )
    assert doctest.DocTestRunner().run(example).failed == 0


def test_up_to_leaves_out_later_checkpoints(make, trained):
    trained.save(make(), 5, 10, 15)
    assert make().up_to(10).steps() == [5, 10]
    assert make().up_to(4).steps() == []
    with make().up_to(10).average(trained.model, last=1) as steps:
        assert steps == (10,)


@pytest.mark.parametrize("units", [8, 4_000])
def test_nbytes_estimates_the_size_on_disk(make, units):
    trained = Trained(units=units)
    trained.save(make(), 3)
    files = pathlib.Path(make().path(3)).iterdir()
    size = sum(file.stat().st_size for file in files)
    estimate = Checkpoints.nbytes(trained.model, trained.optimizer)
    # A small model's index and metadata are larger than its values.
    tolerance = 0.5 if units == 8 else 0.05
    assert estimate == pytest.approx(size, rel=tolerance)


@pytest.mark.parametrize("name", ["keep", "keep_every"])
def test_checkpoints_keeping_less_than_one_raise(make, name):
    with pytest.raises(UsageError, match=f"`{name}`.*Received: {name}=0"):
        make(**{name: 0})


# Damage.


def cut(name, size):
    def damage(path):
        os.truncate(path / name, size)

    return damage


def flip(name, place):
    def damage(path):
        data = bytearray((path / name).read_bytes())
        data[int(place * len(data))] ^= 16
        (path / name).write_bytes(data)

    return damage


def write(name, text):
    def damage(path):
        (path / name).write_text(text)

    return damage


def remove(name):
    def damage(path):
        (path / name).unlink()

    return damage


def empty(path):
    shutil.rmtree(path)
    path.mkdir()


def change(**values):
    def damage(path):
        metadata = json.loads((path / "metadata.json").read_text())
        (path / "metadata.json").write_text(json.dumps({**metadata, **values}))

    return damage


DATA = "variables.data-00000-of-00001"
INDEX = "variables.index"
DAMAGES = {
    "data_cut": cut(DATA, 100),
    "data_of_no_bytes": cut(DATA, 0),
    "data_flipped_early": flip(DATA, 0.1),
    "data_flipped_late": flip(DATA, 0.9),
    "data_missing": remove(DATA),
    "index_cut": cut(INDEX, 64),
    "index_flipped": flip(INDEX, 0.3),
    "index_missing": remove(INDEX),
    "index_of_text": write(INDEX, "no index"),
    "metadata_missing": remove("metadata.json"),
    "metadata_cut": cut("metadata.json", 50),
    "metadata_of_no_bytes": cut("metadata.json", 0),
    "metadata_of_bytes": lambda path: (path / "metadata.json").write_bytes(
        b"\xff\x00\x80"
    ),
    "metadata_of_a_list": write("metadata.json", "[1]"),
    "metadata_of_nothing": write("metadata.json", "{}"),
    "metadata_of_odd_files": change(files=[1]),
    "metadata_of_odd_variables": change(variables=3),
    "metadata_of_another_step": change(step=4),
    "metadata_of_another_place": change(files={"../x": 3}),
    "empty": empty,
}


@pytest.mark.parametrize("name", DAMAGES)
def test_restore_of_a_damaged_one_uses_the_one_before(
    make, trained, warnings, monkeypatch, name
):
    trained.save(make(), 5, 10)
    DAMAGES[name](pathlib.Path(make().path(10)))
    assert trained.restore(make())["step"] == 5
    assert trained.is_at(5)
    (line,) = warnings
    assert f"{make().path(10)} is damaged and not used: " in line


def test_restore_of_a_copy_under_another_step_uses_the_one_before(
    make, trained, warnings
):
    trained.save(make(), 5)
    shutil.copytree(make().path(5), make().path(7))
    change(step=7)(pathlib.Path(make().path(7)))
    assert trained.restore(make())["step"] == 5
    assert "its variables are of step 5" in warnings[0]


def test_restore_of_damaged_ones_alone_raises(make, trained, warnings):
    trained.save(make(), 5, 10)
    for step in (5, 10):
        empty(pathlib.Path(make().path(step)))
    with pytest.raises(CheckpointError, match=r"damaged.*\[5, 10\]"):
        trained.restore(make())
    assert len(warnings) == 2


def test_restore_of_any_flipped_bit_raises_or_is_exact(make, trained, warnings):
    """Whatever the bit: the values are those saved, or it is an error."""
    trained.save(make(), 5)
    expected = trained.bits()
    chance = random.Random(0)
    refused = 0
    for name in (DATA, INDEX):
        path = pathlib.Path(make().path(5), name)
        data = path.read_bytes()
        # Near its end the index tells where the rest is.
        ends = range(len(data) - 60, len(data)) if name == INDEX else ()
        for place in [*chance.sample(range(len(data)), 60), *ends]:
            changed = bytearray(data)
            changed[place] ^= 1 << chance.randrange(8)
            path.write_bytes(changed)
            try:
                trained.restore(make())
            except CheckpointError as error:
                assert "are damaged" in str(error)
                refused += 1
            else:
                assert trained.bits() == expected
        path.write_bytes(data)
    assert refused > 100
    assert trained.restore(make())["step"] == 5


@pytest.mark.parametrize(
    "error",
    [
        tf.errors.UnavailableError(None, None, "try later"),
        tf.errors.DeadlineExceededError(None, None, "try later"),
        tf.errors.PermissionDeniedError(None, None, "try later"),
        PermissionError("try later"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("where", ["metadata", "variables"])
def test_restore_of_unreadable_ones_raises(
    make, trained, warnings, monkeypatch, where, error
):
    trained.save(make(), 5, 10)

    def fail(*arguments, **kwargs):
        raise error

    if where == "metadata":
        monkeypatch.setattr(tf.io.gfile, "GFile", fail)
    else:
        monkeypatch.setattr(tf.train.Checkpoint, "read", fail)
    with pytest.raises(CheckpointError, match="try later"):
        trained.restore(make())
    # The older one is not used in its place.
    assert warnings == []
    assert not trained.is_at(5)


@pytest.mark.parametrize(
    ("workers", "error"),
    [(1, CheckpointError), (2, tf.errors.UnavailableError)],
)
def test_save_tells_a_lost_worker_from_a_failing_disk(
    make, trained, folder, monkeypatch, workers, error
):
    trained.save(make(), 5)

    def fail(*arguments, **kwargs):
        raise tf.errors.UnavailableError(None, None, "no answer")

    monkeypatch.setenv("TF_CONFIG", processes.cluster(workers)[0])
    monkeypatch.setattr(tf.train.Checkpoint, "write", fail)
    with pytest.raises(error, match="no answer"):
        trained.save(make(), 10)
    assert names(folder) == ["step-00000005"]


def test_save_over_a_damaged_one_writes_it_again(make, trained, folder):
    checkpoints = make()
    trained.save(checkpoints, 5, 10)
    empty(folder / "step-00000010")
    trained.restore(checkpoints)
    trained.save(checkpoints, 10)
    assert trained.restore(make())["step"] == 10
    assert trained.is_at(10)


def test_save_over_one_that_cannot_be_replaced_keeps_it(
    make, trained, monkeypatch
):
    checkpoints = make()
    trained.save(checkpoints, 5)
    rename = tf.io.gfile.rename

    def fail(source, target):
        if ".writing-00000005" in source:
            raise tf.errors.ResourceExhaustedError(None, None, "no space left")
        rename(source, target)

    monkeypatch.setattr(tf.io.gfile, "rename", fail)
    with pytest.raises(CheckpointError, match="no space left"):
        trained.save(checkpoints, 5)
    assert trained.restore(make())["step"] == 5


@pytest.mark.parametrize("keep", [1, 2])
def test_save_beside_damaged_ones_keeps_good_ones(
    make, trained, folder, warnings, keep
):
    trained.save(make(), 10, 20, 30)
    for step in (20, 30):
        empty(folder / f"step-{step:08d}")
    assert trained.restore(make())["step"] == 10
    # A save on the way to what is damaged.
    trained.save(make(keep=keep), 15)
    assert trained.restore(make())["step"] == 15


# Checkpoints of something else.


@pytest.mark.parametrize(
    ("now", "line"),
    [
        ({"rate": 0.25}, "rate: 0.5 saved, 0.25 now"),
        ({"rate": None}, "rate: 0.5 saved, None now"),
        ({"seed": "1"}, "seed: 1 saved, '1' now"),
        ({"new": [1]}, "new: not saved, [1] now"),
        ({"data": {"name": "toy"}}, "data.size: 9 saved, absent now"),
        (
            {"data": {"name": "all", "size": 9}},
            "data.name: 'toy' saved, 'all' now",
        ),
        ({"data": 3}, "data: {'name': 'toy', 'size': 9} saved, 3 now"),
    ],
    ids=str,
)
def test_restore_of_another_configuration_raises(make, trained, now, line):
    trained.save(make(), 5)
    with pytest.raises(CheckpointError, match="another configuration") as error:
        trained.restore(make({**CONFIGURATION, **now}))
    assert str(error.value).splitlines()[1:] == [f"  {line}"]
    assert make().path(5) in str(error.value)
    # Nothing was restored.
    assert trained.is_at(987)


def test_restore_of_a_key_that_is_gone_raises(make, trained):
    trained.save(make({**CONFIGURATION, "old": True}), 5)
    with pytest.raises(CheckpointError, match="old: True saved, absent now"):
        trained.restore(make())


def test_restore_of_many_differences_lists_some(make, trained):
    trained.save(make({f"{i:02d}": i for i in range(25)}), 5)
    with pytest.raises(CheckpointError) as error:
        trained.restore(make({f"{i:02d}": -1 for i in range(25)}))
    lines = str(error.value).splitlines()[1:]
    assert len(lines) == 21
    assert lines[7] == "  07: 7 saved, -1 now"
    assert lines[-1] == "  and 5 more"


def test_restore_of_other_variables_raises(make, trained):
    trained.save(make(), 5)
    with pytest.raises(CheckpointError) as error:
        Trained(units=9).restore(make())
    lines = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert "a/kernel: 'float32 6x8' saved, 'float32 6x9' now" in lines
    assert "a/kernel_mask: 'uint8 6x8' saved, 'uint8 6x9' now" in lines
    assert all("seed" not in line for line in lines)
    with pytest.raises(CheckpointError) as error:
        Trained("L0Regularization").restore(make())
    text = str(error.value)
    assert "a/kernel_mask: 'uint8 6x8' saved, absent now" in text
    assert "a/kernel_log_alpha: not saved, 'float32 6x8' now" in text


def test_restore_of_names_that_keras_counts_up_succeeds(make):
    class Unnamed(Trained):
        def __init__(self):
            self.model = keras.Sequential(
                [
                    keras.Input((6,)),
                    keras.layers.Dense(3),
                    keras.layers.Dense(3),
                    keras.layers.Dropout(0.5),
                ]
            )
            self.optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
            self.optimizer.build(self.model.trainable_variables)

    first, second = Unnamed(), Unnamed()
    paths = [[v.path for v in each.model.variables] for each in (first, second)]
    assert paths[0] != paths[1]
    first.save(make(), 5)
    assert second.restore(make())["step"] == 5
    assert second.is_at(5)


def test_restore_of_another_optimizer_raises(make, trained):
    trained.save(make(), 5)
    other = Trained()
    other.optimizer = keras.optimizers.Adam(
        keras.optimizers.schedules.CosineDecay(0.1, 9), amsgrad=True
    )
    other.optimizer.build(other.model.trainable_variables)
    with pytest.raises(CheckpointError) as error:
        other.restore(make())
    text = str(error.value)
    assert "optimizer/learning_rate: 'float32 scalar' saved, absent" in text
    assert "a_kernel_velocity_hat: not saved, 'float32 6x8' now" in text


def test_restore_of_an_unfit_newest_raises_even_if_an_older_fits(make, trained):
    trained.save(make(), 5)
    trained.save(make({"rate": 1}), 10)
    with pytest.raises(CheckpointError, match="another configuration"):
        trained.restore(make())


def test_restore_compares_configurations_as_files_hold_them(make, trained):
    trained.save(make({"sizes": (1, 2), "rates": {1: 0.1}}), 5)
    found = trained.restore(make({"rates": {1: 0.1}, "sizes": [1, 2]}))
    assert found["step"] == 5


# What killed processes leave.


def test_remove_unfinished_of_leftovers_removes_them(make, trained, folder):
    trained.save(make(), 5)
    for name in (".writing-00000010", ".writing-00000010-77", ".writing-old"):
        (folder / name).mkdir()
        (folder / name / "variables.index").write_text("half of it")
    (folder / "notes.txt").write_text("mine")
    (folder / "step-5").mkdir()
    assert make().steps() == [5]
    assert trained.restore(make())["step"] == 5
    remove_unfinished(folder)
    assert names(folder) == ["notes.txt", "step-00000005", "step-5"]


def test_remove_unfinished_of_nothing_succeeds(folder):
    remove_unfinished(folder)
    assert not folder.exists()


# Where nothing can be written.


def test_save_on_a_full_disk_leaves_what_was_there(make, folder, trained):
    trained.save(make(), 5)
    large = Trained(units=20_000)
    # What a file may hold; the system says so in the midst of writing.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, limits[1]))
    try:
        with pytest.raises(CheckpointError) as error:
            large.save(make(), 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "of step 10 could not be written" in str(error.value)
    assert "The newest checkpoint is of step 5." in str(error.value)
    assert names(folder) == ["step-00000005"]
    assert trained.restore(make())["step"] == 5
    # With room again it goes on.
    trained.save(make(), 10)
    assert trained.restore(make())["step"] == 10


@pytest.mark.parametrize("where", ["_write_metadata", "fsync", "rename"])
def test_save_failing_at_any_point_leaves_what_was_there(
    make, folder, trained, monkeypatch, where
):
    trained.save(make(), 5)

    def full(*arguments):
        if where == "rename":
            raise tf.errors.ResourceExhaustedError(None, None, "no space left")
        raise OSError(errno.ENOSPC, "no space left")

    owner = {
        "_write_metadata": checkpoints_module.Checkpoints,
        "fsync": os,
        "rename": tf.io.gfile,
    }[where]
    monkeypatch.setattr(owner, where, full)
    with pytest.raises(CheckpointError, match="no space left.*step 5"):
        trained.save(make(keep=1), 10)
    assert names(folder) == ["step-00000005"]
    assert trained.restore(make())["step"] == 5


def test_save_of_a_first_one_that_cannot_be_written_raises(tmp_path, trained):
    (tmp_path / "file").write_text("")
    checkpoints = Checkpoints(tmp_path / "file" / "work", configuration={})
    with pytest.raises(CheckpointError, match="step 1"):
        trained.save(checkpoints, 1)


def test_save_of_a_worker_that_is_not_the_chief_leaves_nothing(
    make, trained, folder
):
    trained.save(make(), 5)
    trained.move_to(6)
    make(keep=1).save(6, trained.model, trained.optimizer, chief=False)
    assert names(folder) == ["step-00000005"]


# Variable specs and differences.


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("dense/kernel", "dense/kernel"),
        ("sequential_1/dense_12/kernel", "sequential/dense/kernel"),
        ("sequential_1_dense_2_kernel_momentum", "sequential_dense_kernel_mom"),
        ("seed_generator_3/seed_generator_state", "seed_generator/seed_gen"),
        ("stage1_block2/conv1/kernel", "stage1_block2/conv1/kernel"),
        ("a/gate_1", "a/gate"),
    ],
)
def test_canonical_path_leaves_out_the_numbers_of_keras(path, expected):
    assert canonical_path(path).startswith(expected)
    assert canonical_path(canonical_path(path)) == canonical_path(path)


def network(units=2):
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(units),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(2),
        ]
    )
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    optimizer.build(model.trainable_variables)
    return model, optimizer


def test_variable_specs_of_a_second_model_are_equal():
    first, second = variable_specs(*network()), variable_specs(*network())
    assert first == second
    assert first["sequential/dense/kernel"] == "float32 3x2"
    assert first["sequential/dense/kernel (2)"] == "float32 2x2"
    assert first["optimizer/iteration"].endswith("scalar")
    assert sum("momentum" in name for name in first) == 4
    assert any("seed_generator" in name for name in first)
    # Each variable has its line.
    model, optimizer = network()
    assert len(first) == len(model.variables) + len(optimizer.variables)


def test_variable_specs_of_other_shapes_differ():
    lines = list(diff(variable_specs(*network()), variable_specs(*network(5))))
    assert (
        "sequential/dense/kernel: 'float32 3x2' saved, 'float32 3x5' now"
        in lines
    )
    # Kernels and the first bias, each with its momentum.
    assert len(lines) == 6


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.text(max_size=2),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=5,
)
CONFIGURATIONS = st.dictionaries(st.sampled_from("abc"), VALUES, max_size=3)


@hypothesis.given(CONFIGURATIONS, CONFIGURATIONS)
def test_diff_of_any_values_is_empty_only_if_they_are_equal(saved, now):
    lines = list(diff(saved, now))
    assert bool(lines) == (saved != now)
    assert len(lines) == len(list(diff(now, saved)))
    assert list(diff(saved, saved)) == []


def test_diff_of_nested_values_names_their_places():
    saved = {"rate": 0.1, "data": {"name": "toy", "size": 9}, "old": None}
    now = {"rate": 0.2, "data": {"name": "toy", "size": 8}, "new": [1]}
    assert list(diff(saved, now)) == [
        "data.size: 9 saved, 8 now",
        "new: not saved, [1] now",
        "old: None saved, absent now",
        "rate: 0.1 saved, 0.2 now",
    ]
