"""The training binary's command line; what it does is in tests/training."""

import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl import flags
from absl.testing import flagsaver

from models import config_flag, train
from tests.support import processes

# Of ml_collections.
pytestmark = pytest.mark.filterwarnings(
    "ignore:the load_module.*:DeprecationWarning"
)

CONFIG = "--config=configs/fashion_mnist.py"
RUN = "--run=magnitude_sparsity-0.9_seed-0"
QUICK = (
    "--config.techniques=magnitude",
    "--config.steps=4",
    "--config.batch_size=16",
    "--mode=train",
    "--strategy=one_device",
)


@pytest.fixture(autouse=True)
def root(monkeypatch):
    """The config is named as from a checkout."""
    monkeypatch.chdir(processes.ROOT)
    yield
    # The program sets them for the process.
    keras.config.set_dtype_policy("float32")
    tf.config.optimizer.set_experimental_options({"remapping": True})


@pytest.fixture
def main(tmp_path, capfd, monkeypatch):
    """Calls the program in this process; it returns code, output, errors."""

    def call(*arguments, workdir=tmp_path / "work"):
        argv = ["train", CONFIG, f"--workdir={workdir}", *arguments]
        # Where ml_collections looks for what replaces values of the config.
        monkeypatch.setattr(sys, "argv", argv)
        with flagsaver.flagsaver(), pytest.raises(SystemExit) as end:
            flags.FLAGS.unparse_flags()
            train.main(config_flag.parse_flags(argv))
        out, err = capfd.readouterr()
        code = end.value.code
        if isinstance(code, str):
            # As the interpreter does when it ends.
            code, err = 1, f"{err}{code}\n"
        return code, out, err

    yield call
    # As it was before the program, which defines no values of its own.
    flags.FLAGS.unparse_flags()


# Mistakes.


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--config.stepz=3"], ["stepz", "Valid names", "steps"]),
        ([RUN, "--config.model=vgg"], ["`config.model`", "convnet", "vgg"]),
        (["--config.dataset=mnist"], ["`config.dataset`", "fashion_mnist"]),
        (["--config.l0.penalties=-1,"], ["config.l0.penalties", "-1"]),
        (["--mode=trian"], ["mode", "trian", "train_and_eval"]),
        (["--strategy=pods"], ["strategy", "pods", "multi_worker"]),
        (["--steps_per_loop=0"], ["steps_per_loop", "0"]),
        (["--profile_steps=1"], ["profile_steps", "such as 100,110"]),
        ([RUN, "--profile_steps=9,5"], ["`profile_steps`", "9,5"]),
        (["something"], ["only flags", "something"]),
        ([RUN, "--synchronized_batch_norm"], ["convnet", "batch norm"]),
        ([RUN, *QUICK, "--tpu=mine"], ["`tpu`", "one_device"]),
        (
            [RUN, *QUICK, "--gradient_accumulation_steps=3"],
            ["micro", "batch_size=16"],
        ),
    ],
)
def test_mistakes_are_told_in_one_line(main, tmp_path, arguments, parts):
    code, out, err = main(*arguments)
    assert code == 1
    lines = [x for x in f"{out}{err}".splitlines() if x.startswith("FATAL")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    for part in parts:
        assert part in lines[0]
    assert not (tmp_path / "work" / "checkpoints").exists()


def test_the_run_must_be_one(main):
    code, _, err = main("--config.techniques=magnitude")
    assert code == 1
    assert "not of 10. Received: --run=. Runs of the config:" in err
    assert err.count("\n  magnitude_sparsity-") == 10
    code, _, err = main("--config.techniques=magnitude", "--run=l0")
    assert code == 1
    # What there is.
    assert "not of 0. Received: --run=l0." in err
    assert err.count("\n  magnitude_sparsity-") == 10
    code, _, err = main("--run=magnitude_sparsity-0.9_")
    assert code == 1
    # What it could be.
    assert "not of 2." in err
    assert err.count("\n  magnitude_sparsity-0.9_seed-") == 2


# What is done.


def test_trains_evaluates_and_exports(main, tmp_path):
    workdir = tmp_path / "work"
    code, out, err = main(RUN, *QUICK)
    assert (code, err) == (0, "")
    assert "step 4/4  loss" in out
    assert processes.checkpoint_steps(workdir) == [4]
    (last,) = [r for r in processes.records(workdir) if r["step"] == 4]
    assert last["sparsity"] == pytest.approx(0.9, abs=1e-4)
    assert set(last["metrics"]) == {"loss", "accuracy"}

    code, out, _ = main(RUN, *QUICK, "--mode=eval")
    assert code == 0
    (record,) = processes.records(workdir, "eval")
    assert record["step"] == 4
    assert record["sparsity"] == last["sparsity"]

    code, out, _ = main(RUN, *QUICK, "--mode=export")
    assert code == 0
    served = tf.saved_model.load(str(workdir / "export" / "4"))
    assert served(tf.zeros((3, 28, 28, 1))).shape == (3, 10)


def test_flags_reach_the_settings(main, tmp_path):
    workdir = tmp_path / "work"
    code, _, _ = main(
        RUN,
        *QUICK,
        "--mode=train_and_eval",
        "--steps_per_eval=2",
        "--save_checkpoints_steps=1",
        "--keep_checkpoint_max=1",
        "--keep_checkpoint_every_n_steps=2",
        "--profile_steps=1,2",
        "--steps_per_loop=1",
    )
    assert code == 0
    assert processes.checkpoint_steps(workdir) == [2, 4]
    records = processes.records(workdir)
    assert [(r["kind"], r["step"]) for r in records] == [
        ("train", 1),
        ("train", 2),
        ("eval", 2),
        ("train", 3),
        ("train", 4),
        ("eval", 4),
    ]
    assert list((workdir / "profile").rglob("*.xplane.pb"))


def test_how_it_is_computed_changes_little(main, tmp_path):
    values = {}
    for name, arguments in {
        "one": [],
        "replicas": ["--strategy=mirrored"],
        "parts": ["--gradient_accumulation_steps=2"],
    }.items():
        workdir = tmp_path / name
        code, _, err = main(RUN, *QUICK, *arguments, workdir=workdir)
        assert code == 0, err
        values[name] = processes.checkpoint_values(workdir, 4)
    for name in ("replicas", "parts"):
        found = values[name]
        assert found.keys() == values["one"].keys()
        for key, value in values["one"].items():
            np.testing.assert_allclose(
                found[key].astype(np.float64),
                value.astype(np.float64),
                rtol=1e-3,
                atol=1e-4,
                err_msg=key,
            )


def test_micro_batches_are_part_of_the_configuration(main):
    assert main(RUN, *QUICK)[0] == 0
    code, _, err = main(RUN, *QUICK, "--gradient_accumulation_steps=2")
    assert code == 1
    assert "gradient_accumulation_steps: 1 there, 2 now" in err


def test_bfloat16_is_for_computing_only(main, tmp_path):
    code, _, _ = main(RUN, *QUICK, "--bfloat16")
    assert code == 0
    values = processes.checkpoint_values(tmp_path / "work", 4)
    kinds = {str(value.dtype) for value in values.values()}
    assert "float32" in kinds
    assert "bfloat16" not in kinds


def test_the_residual_network(main, tmp_path):
    code, _, err = main(
        "--run=magnitude_sparsity-0.9_seed-0",
        *QUICK,
        "--config.model=residual",
        "--config.steps=2",
        "--strategy=mirrored",
        "--synchronized_batch_norm",
    )
    assert code == 0, err
    # The flag decides what is computed.
    code, _, err = main(
        "--run=magnitude_sparsity-0.9_seed-0",
        *QUICK,
        "--config.model=residual",
        "--config.steps=2",
        "--strategy=mirrored",
    )
    assert code == 1
    assert "synchronized_batch_norm: True there, False now" in err


def test_the_program_itself(tmp_path):
    # In a process of its own nothing but the records is written.
    output = processes.succeed(
        "models.train",
        CONFIG,
        RUN,
        *QUICK,
        f"--workdir={tmp_path}/work",
        log=tmp_path / "output.txt",
    )
    lines = output.splitlines()
    assert lines
    assert all(line.startswith("step ") for line in lines), output
