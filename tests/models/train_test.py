"""The command line of `models.train`; what it does is tested elsewhere."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl import flags
from absl.testing import flagsaver

from models import train
from sos.experiments.run_files import read_masks
from tests.support import processes

CONFIG = (
    "--config=configs/fashion_mnist.py:magnitude,sparsity=0.9,train_steps=4"
)
QUICK = ("--config.batch_size=16", "--strategy=one_device")


@pytest.fixture(autouse=True)
def root(monkeypatch):
    """The config is named as from a checkout."""
    monkeypatch.chdir(processes.ROOT)
    yield
    # The program sets them for the process.
    keras.config.set_dtype_policy("float32")
    tf.config.optimizer.set_experimental_options({"remapping": True})


@pytest.fixture
def main(tmp_path, capfd):
    """Calls the program in this process; it returns code, output, errors."""

    def call(*arguments, workdir=tmp_path / "work"):
        if not any(a.startswith("--config=") for a in arguments):
            arguments = (CONFIG, *arguments)
        argv = ["train", f"--workdir={workdir}", *arguments]
        with flagsaver.flagsaver(), pytest.raises(SystemExit) as end:
            flags.FLAGS.unparse_flags()
            train.main(train._CONFIG.parse_flags(argv))
        out, err = capfd.readouterr()
        code = end.value.code
        if isinstance(code, str):
            # As the interpreter does when it ends.
            code, err = 1, f"{err}{code}\n"
        return code or 0, out, err

    yield call
    flags.FLAGS.unparse_flags()


def only_run(workdir):
    (directory,) = workdir.iterdir()
    return directory


# Mistakes.


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--config.stepz=3"], ["stepz", "Valid entries", "train_steps"]),
        (["--config.model.name=vgg"], ["config.model.name", "convnet", "vgg"]),
        (["--config.data.name=mnist"], ["config.data.name", "fashion_mnist"]),
        (["--config.sparsity.sparsity=1.5"], ["config.sparsity", "1.5"]),
        (["--config.train_steps=1"], ["end_step=2", "train_steps=1"]),
        (["--mode=trian"], ["mode", "trian", "train_and_eval"]),
        (["--strategy=pods"], ["strategy", "pods", "multi_worker"]),
        (["--steps_per_loop=0"], ["steps_per_loop", "0"]),
        (["--profile_steps=1"], ["profile_steps", "such as 100,110"]),
        (["--profile_steps=9,5"], ["`profile_steps`", "9,5"]),
        (["something"], ["only flags", "something"]),
        (
            ["--config.model.synchronized_batch_norm"],
            ["convnet", "synchronise"],
        ),
        ([*QUICK, "--tpu=mine"], ["`tpu`", "one_device"]),
        (
            [*QUICK, "--config.gradient_accumulation_steps=3"],
            ["gradient_accumulation_steps=3", "batch_size=16"],
        ),
    ],
)
def test_train_mistake_is_one_line(main, tmp_path, arguments, parts):
    code, out, err = main(*arguments)
    assert code == 1
    lines = [x for x in f"{out}{err}".splitlines() if x.startswith("FATAL")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    for part in parts:
        assert part in lines[0]
    assert not (tmp_path / "work").exists()


def test_train_bug_has_its_traceback(main, monkeypatch):
    def broken(*arguments, **options):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(train, "make_task", broken)
    with flagsaver.flagsaver(), pytest.raises(ZeroDivisionError):
        main(*QUICK)


# What is done.


def test_train_modes_train_evaluate_and_export(main, tmp_path):
    workdir = tmp_path / "work"
    code, out, err = main(*QUICK, "--mode=train")
    directory = only_run(workdir)
    assert directory.name.startswith("magnitude_pruning_sparsity-0.9_seed-0_")
    assert (code, err) == (0, f"{directory}\n")
    assert "step 4/4  loss" in out
    assert processes.checkpoint_steps(directory) == [0, 4]
    last = processes.records(directory)[-1]
    assert last["sparsity"] == pytest.approx(0.9, abs=1e-4)
    assert not (directory / "result.json").exists()

    assert main(*QUICK, "--mode=eval")[0] == 0
    first, record = processes.records(directory, "eval")
    assert (first["step"], record["step"]) == (0, 4)
    result = json.loads((directory / "result.json").read_text())
    assert result["metrics"] == record["metrics"]
    assert result["sparsity"] == record["sparsity"]

    code, out, err = main(*QUICK)
    assert (code, out) == (0, "")
    assert err.splitlines()[1:] == [
        f"The run is finished: {directory}/result.json"
    ]

    code, out, _ = main(*QUICK, "--mode=export")
    assert (code, out) == (0, f"Wrote {directory}/export/4\n")
    served = tf.saved_model.load(str(directory / "export" / "4"))
    assert served(tf.zeros((3, 28, 28, 1))).shape == (3, 10)


def test_train_branch_starts_from_the_directory_of_a_run(main, tmp_path):
    assert main(*QUICK)[0] == 0
    trunk = only_run(tmp_path / "work")
    argument = f"lottery_ticket,parent={trunk}"
    code, out, err = main(
        f"--config=configs/fashion_mnist.py:{argument}",
        "--strategy=one_device",
        workdir=tmp_path / "branches",
    )
    assert code == 0, err
    directory = only_run(tmp_path / "branches")
    assert directory.name.startswith("lottery_ticket_seed-0_")
    assert "step 4/4  loss" in out
    masks, expected = read_masks(str(directory)), read_masks(str(trunk))
    assert len(masks) == 5
    for path, mask in expected.items():
        np.testing.assert_array_equal(masks[path], mask)


def test_train_flags_reach_the_options(main, tmp_path):
    code, _, _ = main(
        *QUICK,
        "--mode=train_and_eval",
        "--steps_per_eval=2",
        "--save_checkpoints_steps=1",
        "--keep_checkpoint_max=1",
        "--keep_checkpoint_every_n_steps=2",
        "--profile_steps=1,2",
        "--steps_per_loop=1",
        "--config.keep=trunk",
    )
    assert code == 0
    directory = only_run(tmp_path / "work")
    assert processes.checkpoint_steps(directory) == [0, 4]
    records = processes.records(directory)
    assert [(r["kind"], r["step"]) for r in records] == [
        ("train", 1),
        ("train", 2),
        ("eval", 2),
        ("train", 3),
        ("train", 4),
        ("eval", 4),
    ]
    assert list((directory / "profile").rglob("*.xplane.pb"))


def test_train_execution_changes_neither_run_nor_much_of_its_values(
    main, tmp_path
):
    values = {}
    for name, arguments in {
        "one": [],
        "replicas": ["--strategy=mirrored"],
    }.items():
        workdir = tmp_path / name
        code, _, err = main(*QUICK, *arguments, workdir=workdir)
        assert code == 0, err
        values[name] = processes.checkpoint_values(only_run(workdir), 4)
    names = [only_run(tmp_path / name).name for name in values]
    assert len(set(names)) == 1
    assert values["replicas"].keys() == values["one"].keys()
    for key, value in values["one"].items():
        np.testing.assert_allclose(
            values["replicas"][key].astype(np.float64),
            value.astype(np.float64),
            rtol=1e-3,
            atol=1e-4,
            err_msg=key,
        )


@pytest.mark.slow
def test_train_two_workers_train_one_run(tmp_path):
    def run(log):
        programs = [
            processes.Program(
                "models.train",
                CONFIG,
                "--config.batch_size=16",
                f"--workdir={tmp_path}/work",
                log=tmp_path / f"{log}-{worker}.txt",
                environment={"TF_CONFIG": cluster},
            )
            for worker, cluster in enumerate(processes.cluster(2))
        ]
        for program in programs:
            assert program.wait() == 0, program.output
        return programs

    run("first")
    # A finished run is left alone before workers meet, as in one process.
    directory = only_run(tmp_path / "work")
    assert processes.checkpoint_steps(directory) == [0, 4]
    steps = [record["step"] for record in processes.records(directory)]
    assert steps == [1, 2, 4, 4]
    result = (directory / "result.json").read_text()
    # As if the chief had been killed before it wrote the result.
    (directory / "result.json").unlink()
    run("last")
    assert (directory / "result.json").read_text() == result


@pytest.mark.slow
def test_train_itself_writes_nothing_but_its_progress(tmp_path):
    output = processes.succeed(
        "models.train",
        CONFIG,
        *QUICK,
        f"--workdir={tmp_path}/work",
        log=tmp_path / "output.txt",
    )
    directory, *lines = output.splitlines()
    assert directory == str(only_run(tmp_path / "work"))
    assert lines
    assert all(line.startswith(("step ", "eval ")) for line in lines), output
