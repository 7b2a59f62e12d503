import collections
import json
import pathlib
import shutil
import signal

import keras
import numpy as np
import pytest
import tensorflow as tf

from sos.errors import (
    CheckpointError,
    DirectoryInUseError,
    NonFiniteLossError,
    Stopped,
    StorageError,
    UsageError,
)
from sos.experiments import config as config_lib
from sos.experiments import runs
from sos.experiments.launchers import TrainerCache
from sos.experiments.runs import read_result, run, run_directory
from sos.experiments.scores import ACCURACY, BLEU
from sos.files import lock_directory
from tests.experiments.config_test import add_default
from tests.support import processes, toy_experiment

STEPS = 12


class StopAt:
    """Asks to stop once a step is reached."""

    def __init__(self, step):
        self.step = step
        self.requested = None

    def __call__(self, summary):
        if summary.step >= self.step:
            self.requested = signal.SIGTERM


def fail(config):
    raise AssertionError("Nothing was to be trained.")


def directory_of(technique, workdir, **overrides):
    config = config_lib.resolve(toy_experiment.config(technique, **overrides))
    return pathlib.Path(run_directory(config, workdir))


#: Of each technique: what tests do not share is traced anew.
TRAINERS = collections.defaultdict(TrainerCache)


def train(technique, workdir, *, stop_at=None, trainers=None, **options):
    overrides = options.pop("overrides", {})
    stop = StopAt(stop_at) if stop_at else None
    # A stop is as if in another process, which goes step by step at first.
    trainers = trainers or (TrainerCache() if stop else TRAINERS[technique])
    return run(
        toy_experiment.config(technique, **overrides),
        workdir,
        make_trainer=trainers,
        stop=stop,
        on_summary=[stop] if stop else [],
        quiet=True,
        **options,
    )


def values(directory):
    return processes.checkpoint_values(directory, STEPS)


@pytest.fixture
def one(finished, tmp_path):
    """A copy of one finished run, and its work directory."""
    name = directory_of("magnitude", finished).name
    shutil.copytree(finished / name, tmp_path / "runs" / name)
    return tmp_path / "runs" / name


def test_run_leaves_config_checkpoints_log_and_result(one):
    assert {path.name for path in one.iterdir()} >= {
        "config.json",
        "checkpoints",
        "train.jsonl",
        "result.json",
    }
    stored = json.loads((one / "config.json").read_text())
    assert stored == config_lib.plain(
        config_lib.resolve(toy_experiment.config("magnitude"))
    )
    result = read_result(str(one))
    assert result.step == STEPS
    assert set(result.metrics) == {"accuracy", "loss"}
    # Of 6 x 16 and 16 x 3 weights, each of which keeps a fifth.
    assert result.sparsity == pytest.approx(1 - (19 + 10) / 144)
    assert [(w.path, w.size, w.kind) for w in result.weights] == [
        ("a/kernel", 96, None),
        ("b/kernel", 48, None),
    ]
    assert result.score == ACCURACY
    assert result.score_value == 100 * result.metrics["accuracy"]
    assert result.texts == {}
    assert result.parameters == 96 + 16 + 48 + 3
    (last,) = [
        record for record in processes.records(one) if record["kind"] == "eval"
    ]
    assert last["metrics"] == result.metrics


def test_run_dense_network_has_no_sparsity(finished):
    directory = str(directory_of("dense", finished))
    result = read_result(directory)
    assert result.sparsity is None
    assert result.model_sparsity == 0
    assert runs.read_masks(directory) is None


# One whose masks are variables, one without.
@pytest.mark.parametrize("technique", ["magnitude", "variational_dropout"])
def test_run_stores_the_masks_of_evaluation(technique, finished):
    directory = str(directory_of(technique, finished))
    masks = runs.read_masks(directory)
    weights = read_result(directory).weights
    assert list(masks) == [weight.path for weight in weights]
    for weight in weights:
        mask = masks[weight.path]
        assert mask.dtype == np.uint8
        assert 1 - mask.mean() == pytest.approx(weight.sparsity)
        assert 0 < mask.sum() < mask.size == weight.size


def test_run_counts_multiply_adds_and_describes_the_machine(one):
    result = read_result(str(one))
    assert result.dense_multiply_adds == 96 + 48
    assert result.multiply_adds == 19 + 10
    assert set(result.machine) == {
        "platform",
        "processor",
        "cores",
        "device",
        "devices",
    }
    assert (result.machine["device"], result.machine["devices"]) == ("CPU", "1")


def test_read_result_of_an_earlier_version_takes_defaults(one):
    stored = json.loads((one / "result.json").read_text())
    for name in ("multiply_adds", "dense_multiply_adds", "machine"):
        del stored[name]
    (one / "result.json").write_text(json.dumps(stored))
    result = read_result(str(one))
    assert (result.multiply_adds, result.dense_multiply_adds) == (None, None)
    assert dict(result.machine) == {}


@pytest.mark.parametrize("content", [b"", b"PK", b"\xff" * 100])
def test_read_masks_damaged_file_raises(one, content):
    (one / "masks.npz").write_bytes(content)
    with pytest.raises(StorageError, match=r"masks\.npz"):
        runs.read_masks(str(one))


def test_read_masks_damaged_byte_raises_or_is_not_noticed(one):
    path = one / "masks.npz"
    content = path.read_bytes()
    errors = 0
    for position in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[position] ^= 0x5D
        path.write_bytes(damaged)
        try:
            runs.read_masks(str(one))
        except StorageError:
            errors += 1
    assert errors > len(content) / 3 / 2


def test_run_finished_run_is_not_repeated(one):
    result = run(
        toy_experiment.config("magnitude"), one.parent, make_trainer=fail
    )
    assert result == read_result(str(one))


def test_run_without_result_reads_the_evaluation_that_was_done(one):
    expected = read_result(str(one))
    before = (one / "train.jsonl").read_bytes()
    (one / "result.json").unlink()
    result = train("magnitude", one.parent)
    assert result.metrics == expected.metrics
    assert result.weights == expected.weights
    assert (one / "train.jsonl").read_bytes() == before


# One that has masks, one with noise and a penalty.
@pytest.mark.parametrize("technique", ["magnitude", "variational_dropout"])
def test_run_stopped_run_resumes_to_the_same_bits(
    technique, finished, tmp_path
):
    with pytest.raises(Stopped):
        train(technique, tmp_path, stop_at=5)
    directory = directory_of(technique, tmp_path)
    assert read_result(str(directory)) is None
    train(technique, tmp_path)
    expected = values(directory_of(technique, finished))
    assert processes.differences(values(directory), expected) == []


def test_run_new_entry_with_default_resumes_to_the_same_bits(
    finished, tmp_path, monkeypatch
):
    with pytest.raises(Stopped):
        train("magnitude", tmp_path, stop_at=5)
    add_default(monkeypatch, "model.depth", 1)
    train("magnitude", tmp_path)
    (directory,) = tmp_path.iterdir()
    expected = values(directory_of("magnitude", finished))
    assert processes.differences(values(directory), expected) == []
    # The stored config has the entry from now on.
    stored = json.loads((directory / "config.json").read_text())
    assert stored["model"]["depth"] == 1


def test_run_changed_default_raises_with_the_difference(one, monkeypatch):
    before = {p: p.read_bytes() for p in one.rglob("*") if p.is_file()}
    add_default(monkeypatch, "model.units", 32)
    with pytest.raises(UsageError, match=r"model\.units: 16 saved, 32 now"):
        run(toy_experiment.config("magnitude"), one.parent, make_trainer=fail)
    assert {p: p.read_bytes() for p in one.rglob("*") if p.is_file()} == before


def test_run_new_label_replaces_the_stored_one(one):
    overrides = {"label": "another name"}
    train("magnitude", one.parent, overrides=overrides)
    stored = json.loads((one / "config.json").read_text())
    assert stored["label"] == "another name"


@pytest.mark.parametrize(
    ("keep", "keep_steps", "steps"),
    [
        ("all", [], [0, 4, 8, 12]),
        ("trunk", [], [0, 12]),
        ("trunk", [6], [0, 6, 12]),
        ("none", [], []),
        ("none", [6], [6]),
    ],
)
def test_run_keep_decides_which_checkpoints_stay(
    keep, keep_steps, steps, tmp_path
):
    overrides = {"keep": keep, "keep_steps": keep_steps}
    train("dense", tmp_path, overrides=overrides, save_checkpoints_steps=4)
    directory = directory_of("dense", tmp_path)
    assert processes.checkpoint_steps(directory) == steps
    # It is the same run.
    run(
        toy_experiment.config("dense", keep="all"),
        tmp_path,
        make_trainer=fail,
    )


def test_run_in_use_raises(tmp_path):
    directory = directory_of("dense", tmp_path)
    directory.mkdir(parents=True)
    with (
        lock_directory(directory, "run"),
        pytest.raises(DirectoryInUseError, match=directory.name),
    ):
        train("dense", tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b""),
        ("config.json", b"[]"),
        ("config.json", b"\xff"),
        ("result.json", b""),
        ("result.json", b"[]"),
        ("result.json", b"\xff"),
        ("result.json", b'{"step": 1}'),
    ],
)
def test_run_damaged_file_raises(one, name, content):
    (one / name).write_bytes(content)
    with pytest.raises(StorageError, match=name):
        run(toy_experiment.config("magnitude"), one.parent, make_trainer=fail)


def test_run_workdir_that_is_a_file_raises(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        train("dense", tmp_path / "file")


def test_run_empty_workdir_raises():
    with pytest.raises(UsageError, match="`workdir`"):
        train("dense", "")


def test_run_loss_not_finite_raises_and_leaves_no_result(tmp_path):
    overrides = {"task": "tests.support.toy_experiment:Failing"}
    with pytest.raises(NonFiniteLossError, match="step 1"):
        train("dense", tmp_path, overrides=overrides)
    directory = directory_of("dense", tmp_path, **overrides)
    assert not (directory / "result.json").exists()


def test_run_task_without_evaluation_data_has_a_result(tmp_path):
    overrides = {"task": "tests.support.toy_experiment:WithoutEvaluation"}
    result = train("dense", tmp_path, overrides=overrides, mode="train")
    assert (result.step, result.metrics) == (STEPS, {})


def test_run_train_and_eval_modes_give_the_result_together(finished, tmp_path):
    assert train("magnitude", tmp_path, mode="train") is None
    directory = directory_of("magnitude", tmp_path)
    assert not (directory / "result.json").exists()
    result = train("magnitude", tmp_path, mode="eval")
    expected = read_result(str(directory_of("magnitude", finished)))
    assert result.metrics == expected.metrics
    assert result.sparsity == expected.sparsity
    assert result.seconds > 0
    assert read_result(str(directory)) == result
    assert processes.checkpoint_steps(directory) == [0, STEPS]


def test_run_eval_mode_evaluated_before_writes_the_result(one):
    expected = read_result(str(one))
    train("magnitude", one.parent, mode="eval")
    # As if it had been killed before the result was written.
    (one / "result.json").unlink()
    result = train("magnitude", one.parent, mode="eval")
    assert result.metrics == expected.metrics
    assert result.seconds == expected.seconds


def test_run_eval_mode_finished_run_without_checkpoints_returns(one):
    shutil.rmtree(one / "checkpoints")
    result = run(
        toy_experiment.config("magnitude"),
        one.parent,
        make_trainer=fail,
        mode="eval",
    )
    assert result == read_result(str(one))


class Averaged(toy_experiment.ToyExperiment):
    """Scores the mean of more checkpoints than are kept by default."""

    averaged_checkpoints = 7

    def evaluators(self, checkpoints):
        def score(model):
            with self.averaged_weights(model, checkpoints) as steps:
                return {"steps": " ".join(map(str, steps))}

        return {"averaged": score}


@pytest.mark.parametrize(
    ("keep", "before", "after"),
    [
        ("trunk", [0, 6, 7, 8, 9, 10, 11, 12], [0, 6, 7, 8, 9, 10, 11, 12]),
        ("none", [6, 7, 8, 9, 10, 11, 12], []),
    ],
)
def test_run_keeps_and_exports_the_checkpoints_that_it_scores(
    keep, before, after, tmp_path, monkeypatch
):
    config = toy_experiment.config(
        "dense", task=f"{__name__}:Averaged", keep=keep
    )

    def killed(result, masks, directory):
        raise InterruptedError

    def start():
        return runs.run(config, tmp_path, quiet=True, save_checkpoints_steps=1)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "write_result", killed)
        with pytest.raises(InterruptedError):
            start()
    (directory,) = tmp_path.iterdir()
    assert processes.checkpoint_steps(directory) == before
    kernels = [
        processes.checkpoint_values(directory, step)["toy/b/kernel"]
        for step in range(6, 13)
    ]
    result = start()
    assert result.texts == {"steps": "6 7 8 9 10 11 12"}
    assert processes.checkpoint_steps(directory) == after
    if keep == "trunk":
        runs.run(config, tmp_path, quiet=True, mode="export")
        export = tf.saved_model.load(str(directory / "export" / "12"))
        (kernel,) = (w for w in export.weights if w.shape == (16, 3))
        np.testing.assert_allclose(kernel, np.mean(kernels, 0), rtol=1e-6)


@pytest.mark.parametrize("keep", ["trunk", "none"])
def test_run_killed_before_the_result_needs_no_training(
    keep, tmp_path, monkeypatch
):
    def killed(result, masks, directory):
        raise InterruptedError

    overrides = {"keep": keep}
    with monkeypatch.context() as patch:
        patch.setattr(runs, "write_result", killed)
        with pytest.raises(InterruptedError):
            train("dense", tmp_path, overrides=overrides)
    directory = directory_of("dense", tmp_path)
    before = processes.records(directory)
    assert train("dense", tmp_path, overrides=overrides).step == STEPS
    assert processes.records(directory) == before
    kept = {"trunk": [0, STEPS], "none": []}[keep]
    assert processes.checkpoint_steps(directory) == kept


def test_run_invalid_call_leaves_no_directory(tmp_path):
    workdir = tmp_path / "runs"
    with pytest.raises(UsageError, match="mode"):
        train("dense", workdir, mode="trian")
    with pytest.raises(UsageError, match=r"config\.parent"):
        train("dense", workdir, overrides={"parent": "other"})
    assert not workdir.exists()


def test_run_prepares_its_task_first_and_not_to_export_it(
    tmp_path, monkeypatch
):
    def fail(task):
        raise UsageError("There is no data.")

    config = toy_experiment.config("dense")
    with monkeypatch.context() as patch:
        patch.setattr(toy_experiment.ToyExperiment, "prepare", fail)
        with pytest.raises(UsageError, match="no data"):
            runs.run(config, tmp_path, quiet=True)
        assert not list(tmp_path.iterdir())
        # Which needs a checkpoint.
        with pytest.raises(CheckpointError, match="no checkpoint to export"):
            runs.run(config, tmp_path, quiet=True, mode="export")


def test_run_rules_with_a_technique_alone_have_a_sparsity(tmp_path):
    rules = [["^a/", toy_experiment.MAGNITUDE]]
    overrides = {"sparsity": {"technique": None, "rules": rules}}
    result = train("dense", tmp_path, overrides=overrides)
    assert result.sparsity == pytest.approx(1 - 19 / 96)


def test_run_keeps_steps_that_the_caller_asks_for(tmp_path):
    train(
        "dense",
        tmp_path,
        overrides={"keep": "all"},
        keep_checkpoint_steps=(5,),
    )
    directory = directory_of("dense", tmp_path)
    assert processes.checkpoint_steps(directory) == [0, 5, STEPS]


def test_run_dtype_policy_is_that_of_the_config(tmp_path):
    before = keras.config.dtype_policy().name
    trainers = TrainerCache()
    overrides = {"dtype_policy": "mixed_bfloat16"}
    train("dense", tmp_path, overrides=overrides, trainers=trainers)
    assert keras.config.dtype_policy().name == before
    directory = directory_of("dense", tmp_path, **overrides)
    kinds = {str(value.dtype) for value in values(directory).values()}
    assert "bfloat16" not in kinds
    dense = directory_of("dense", tmp_path)
    assert directory != dense


def test_run_with_a_sparsity_alone_lays_the_schedule_over_its_steps(tmp_path):
    sparsity = {"technique": "MagnitudePruning", "sparsity": 0.75}
    overrides = {"overrides": {"sparsity": sparsity}}
    result = train("magnitude", tmp_path / "whole", **overrides)
    assert result.sparsity == 0.75
    with pytest.raises(Stopped):
        train("magnitude", tmp_path / "parts", stop_at=5, **overrides)
    assert train("magnitude", tmp_path / "parts", **overrides) is not None
    config = config_lib.resolve(toy_experiment.config(sparsity=sparsity))
    whole, parts = (
        values(run_directory(config, tmp_path / name))
        for name in ("whole", "parts")
    )
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(value, parts[name])


def test_run_with_a_schedule_that_does_not_fit_raises(tmp_path):
    sparsity = {
        "technique": "MagnitudePruning",
        "sparsity": 0.75,
        "begin_step": 11,
    }
    with pytest.raises(
        UsageError, match="config.sparsity.*begin_step=11, train_steps=12"
    ):
        train("magnitude", tmp_path, overrides={"sparsity": sparsity})


class Translated(toy_experiment.ToyExperiment):
    """Has another score, kinds of layers, and a text among its results."""

    score = BLEU
    layer_kinds = (("first", "^a/"), ("any", "kernel"))
    ignored_entries = ("data.path",)

    def evaluators(self, checkpoints):
        return {
            "bleu": lambda model: {
                "bleu": 27.3,
                "bleu_signature": f"steps {checkpoints.steps()[-1]}",
            }
        }


@pytest.mark.parametrize("modes", [["train_and_eval"], ["train", "eval"]])
def test_run_stores_the_score_and_the_kinds_of_its_task(modes, tmp_path):
    config = toy_experiment.config(
        "magnitude", task=f"{__name__}:Translated", keep="none"
    )
    for mode in modes:
        result = runs.run(config, tmp_path, mode=mode, quiet=True)
    (directory,) = tmp_path.iterdir()
    assert read_result(str(directory)) == result
    assert (result.score, result.score_value) == (BLEU, 27.3)
    assert result.texts == {"bleu_signature": f"steps {STEPS}"}
    assert [w.kind for w in result.weights] == ["first", "any"]
    assert result.ignored_entries == ("data.path",)
