import doctest
import json
import pathlib
import shutil
import signal

import keras
import numpy as np
import pytest
import tensorflow as tf

import sos
from sos.errors import CheckpointError, Stopped, UsageError
from sos.experiments import branch, branch_registry, run_files, runs
from sos.experiments import config as config_lib
from sos.experiments.launchers import TrainerCache
from sos.experiments.runs import read_masks, run, run_directory
from sos.experiments.task import make_task
from sos.experiments.trunk import Trunk, with_parent_directory
from sos.training import trainer as trainer_lib
from sos.training.checkpoints import Checkpoints
from sos.training.strategies import make_strategy
from sos.training.trainer import Trainer
from sos.wrappers.base import find_wrappers, weights_by_path
from sos.wrappers.masked import update_masks
from tests.support import branch_tasks, processes, techniques, toy_experiment
from tests.support.toy_experiment import CONFIG, MAGNITUDE

STEPS = 12
# From step 6 on its masks are final.
TRUNK = {"sparsity": {**MAGNITUDE, "end_step": 6}, "keep_steps": [6]}
PROFILE = {"sparsity": 0.8, "end_step": 8, "frequency": 2}
#: Branches that keep a mask, with their options.
FIXED = {
    "scratch": {},
    "augmented_init": {},
    "lottery_ticket": {},
    "rewound": {"step": 6},
    "random_mask": {},
}
#: They share one compiled step.
TRAINERS = TrainerCache()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Finished trunks; read only."""
    workdir = tmp_path_factory.mktemp("trunks")
    train(trunk_of(), workdir, make_trainer=TrainerCache())
    store(trunk_of("dense"), {}, workdir)
    generator = np.random.default_rng(0)
    for technique in ("variational_dropout", "l0"):
        masks = {
            "a/kernel": generator.integers(2, size=(6, 16), dtype="uint8"),
            "b/kernel": generator.integers(2, size=(16, 3), dtype="uint8"),
        }
        store(trunk_of(technique), masks, workdir)
        save_step_0(trunk_of(technique), workdir)
    return workdir


@pytest.fixture
def copy(workdir, tmp_path):
    """A copy of them, to be changed."""
    return shutil.copytree(workdir, tmp_path / "copy")


def trunk_of(technique="magnitude", **overrides):
    values = TRUNK if technique == "magnitude" else {}
    config = toy_experiment.config(technique, **{**values, **overrides})
    return config_lib.resolve(config)


def branch_of(name, trunk=None, *, overrides=(), **options):
    name = {"rewound": "lottery_ticket"}.get(name, name)
    values = branch(trunk or trunk_of(), name, **options)
    return config_lib.resolve({**values, **dict(overrides)})


def directory_of(config, workdir):
    return pathlib.Path(run_directory(config, workdir))


def train(config, workdir, **options):
    options = {"make_trainer": TRAINERS, "quiet": True, **options}
    return run(config, workdir, **options)


def start(config, workdir):
    """The model and the optimizer of a run before its first step."""
    config = with_parent_directory(config, workdir)
    keras.utils.set_random_seed(config.seed)
    task = make_task(config)
    model, optimizer = trainer_lib.build(task)
    task.initialize(model, optimizer)
    return model, optimizer


def arrays(variables):
    return [keras.ops.convert_to_numpy(variable) for variable in variables]


def dense_values(model):
    """The values of a model by path, without the variables of techniques."""
    return {
        v.path: keras.ops.convert_to_numpy(v)
        for v in model.variables
        if not v.path.endswith("_mask")
    }


def store(config, masks, workdir):
    """Makes a finished run without a training."""
    config = config_lib.resolve(config)
    directory = run_directory(config, workdir)
    result = runs.Result(
        step=1,
        metrics={},
        sparsity=0.5,
        model_sparsity=0.5,
        seconds=1.0,
        parameters=1,
        weights=(),
        versions={},
    )
    tf.io.gfile.makedirs(directory)
    run_files.write_config(config_lib.plain(config), directory)
    run_files.write_result(result, masks, directory)
    return config


def save_step_0(config, workdir):
    """Saves the first checkpoint of a run."""
    keras.utils.set_random_seed(config.seed)
    trainer = Trainer(make_task(config), strategy=make_strategy("one_device"))
    directory = directory_of(config, workdir) / "checkpoints"
    configuration = trainer.configuration()
    trainer.save(Checkpoints(directory, configuration=configuration))


# The config of a branch.


def test_branch_has_the_entries_of_the_trunk_and_fixed_masks():
    trunk = trunk_of(seed=3, model={"units": 8}, batch_size=4)
    values = branch(trunk, "scratch")
    assert values["model"] == {"units": 8}
    assert (values["batch_size"], values["train_steps"]) == (4, STEPS)
    assert values["parent"] == config_lib.run_name(trunk)
    assert values["branch"] == {"name": "scratch"}
    assert values["seed"] == 1003
    assert values["keep_steps"] == []
    assert values["sparsity"] == {"technique": "FixedMask", "rules": []}
    assert config_lib.resolve(values).label == "scratch-e"


@pytest.mark.parametrize(
    ("name", "options", "label"),
    [
        ("scratch", {}, "scratch-e"),
        ("scratch", {"multiplier": 2}, "scratch-b"),
        ("scratch", {"multiplier": 1.5}, "scratch-b, 1.5 times as long"),
        ("augmented_init", {}, "augmented init"),
        ("augmented_init", {"multiplier": 2}, "augmented init, scratch-b"),
        ("lottery_ticket", {}, "lottery ticket"),
        ("lottery_ticket", {"step": 6}, "lottery ticket, rewound to 6"),
        ("random_mask", {}, "random mask"),
        (
            "transferred_profile",
            {"technique": "RandomPruning"},
            "random pruning, profile of magnitude pruning",
        ),
    ],
)
def test_branch_label_names_the_experiment(name, options, label):
    config = branch_of(name, **options)
    assert config_lib.label(config) == label
    assert config_lib.run_name(config).startswith(f"{name}_")


@pytest.mark.parametrize("name", branch_registry.branches())
def test_branch_seed_is_the_trunks_for_its_own_weights_only(name):
    ticket = name == "lottery_ticket"
    assert (branch(trunk_of(), name)["seed"] == 0) == ticket
    assert branch(trunk_of(), name, seed=5)["seed"] == 5
    if not ticket:
        with pytest.raises(UsageError, match="seed=0"):
            branch(trunk_of(), name, seed=0)


@pytest.mark.parametrize("name", ["scratch", "augmented_init"])
@pytest.mark.parametrize(
    ("variant", "boundaries"),
    [
        ("scale", [8, 10]),
        ("hold", [8, 10]),
        ("drop", [8, 10, 18]),
        ("drop_from_start", [8, 16]),
    ],
)
def test_branch_longer_training_lengthens_the_learning_rate(
    name, variant, boundaries
):
    rate = {
        "schedule": "piecewise",
        "base": 0.1,
        "boundaries": [8, 10],
        "factors": [0.1, 0.01],
    }
    trunk = trunk_of(learning_rate=rate)
    values = branch(trunk, name, multiplier=2, learning_rate=variant)
    assert values["train_steps"] == 24
    assert values["learning_rate"]["boundaries"] == boundaries
    scaled = variant == "scale"
    assert values["learning_rate"].get("reference_steps") == (
        STEPS if scaled else None
    )
    variant = "" if scaled else f", {variant.replace('_', ' ')}"
    assert values["label"].endswith(f"scratch-b{variant}")


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ([["^a/", None]], [["^a/", None]]),
        ([["^a/", {"sparsity": 0.5}]], [["^a/", "FixedMask"]]),
    ],
)
def test_branch_rules_of_the_trunk_lose_their_hyperparameters(rules, expected):
    trunk = trunk_of(sparsity={**MAGNITUDE, "rules": rules})
    assert branch(trunk, "scratch")["sparsity"]["rules"] == expected


def test_branch_of_a_directory_reads_its_config(workdir):
    directory = directory_of(trunk_of(), workdir)
    values = branch(directory, "scratch")
    assert values["parent"] == str(directory)
    # Its name does not depend on the path.
    assert config_lib.run_name(
        config_lib.resolve(values)
    ) == config_lib.run_name(branch_of("scratch"))


def test_branch_of_a_directory_in_the_home_directory(workdir, monkeypatch):
    monkeypatch.setenv("HOME", str(workdir))
    name = config_lib.run_name(trunk_of())
    values = branch(f"~/{name}/", "scratch")
    config = with_parent_directory(config_lib.resolve(values), "elsewhere")
    assert config.parent == f"{workdir}/{name}/"


def test_branch_of_a_renamed_directory_raises(copy):
    directory = directory_of(trunk_of(), copy)
    parent = str(directory.rename(copy / "best"))
    with pytest.raises(UsageError, match=directory.name):
        branch(parent, "scratch")
    config = branch_of("scratch", overrides={"parent": parent})
    initialize_fails(config, copy, directory.name)


def test_branch_of_a_config_of_another_version_of_the_task_raises(copy):
    path = directory_of(trunk_of(), copy) / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "dropped": 1}))
    with pytest.raises(UsageError, match=f"{path.parent}.*'dropped'"):
        branch(path.parent, "scratch")


@pytest.mark.parametrize(
    ("parent", "directories", "expected"),
    [
        # A name is never one of a directory elsewhere.
        ("run", ["run"], "work/run"),
        ("run", ["run", "work/run"], "work/run"),
        ("old/run/", ["old/run", "work/run"], "old/run/"),
        ("old/run/", ["work/run"], "work/run"),
        # As given, for the error.
        ("old/run/", [], "old/run/"),
        ("ram://parents/run", [], "ram://parents/run"),
    ],
)
def test_parent_is_a_name_in_the_work_directory_or_a_directory(
    parent, directories, expected, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for directory in directories:
        pathlib.Path(directory).mkdir(parents=True)
    config = branch_of("scratch", overrides={"parent": parent})
    assert with_parent_directory(config, "work").parent == expected


def test_branch_of_an_empty_directory_raises(tmp_path):
    with pytest.raises(UsageError, match=str(tmp_path)):
        branch(tmp_path, "scratch")


@pytest.mark.parametrize(
    ("name", "options", "part"),
    [
        ("scratched", {}, "scratched"),
        ("scratch", {"multiplayer": 2}, "multiplayer"),
        ("scratch", {"multiplier": 0.5}, "0.5"),
        ("scratch", {"learning_rate": "grow", "multiplier": 2}, "schedule"),
        ("scratch", {"learning_rate": "hold"}, "'hold', multiplier=1"),
        ("lottery_ticket", {"step": -1}, "-1"),
        ("lottery_ticket", {"step": 5}, r"step=5.*\[0, 6, 12\]"),
        ("random_mask", {"step": 1}, "step"),
        ("transferred_profile", {"technique": "L0Regularization"}, "L0"),
    ],
)
def test_branch_invalid_argument_raises(name, options, part):
    with pytest.raises(UsageError, match=part):
        branch(trunk_of(), name, **options)


def test_branch_of_a_dense_run_raises():
    with pytest.raises(UsageError, match="dense"):
        branch(trunk_of("dense"), "scratch")


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ({"parent": None}, "parent=None"),
        ({"parent": ""}, "parent"),
        ({"parent": "runs/.."}, "'runs/..'"),
        ({"branch": {"name": "lottery_ticket", "step": STEPS}}, "step=12"),
        ({"branch": {"name": "lottery_ticket", "at": 1}}, "'at'"),
        ({"branch": {"name": None, "step": 1}}, "'step'"),
        ({"branch": {"name": "lost"}}, "lost"),
        ({"branch": "scratch"}, "branch"),
    ],
)
def test_resolve_invalid_branch_raises(overrides, part):
    with pytest.raises(UsageError, match=part):
        branch_of("lottery_ticket", overrides=overrides)


def test_example_of_a_branch_of_your_own_runs(monkeypatch):
    # What it registers would stay for the tests that run later.
    branches = branch_registry.branches()
    monkeypatch.setattr(branch_registry, "_branches", branches)
    results = doctest.testmod(branch_registry)
    assert results.attempted > 0 == results.failed


def test_scratch_variant_for_a_task_with_its_own_rate_names_the_option():
    with pytest.raises(UsageError, match="Received: learning_rate='hold'"):
        branch(trunk_of(), "scratch", multiplier=2, learning_rate="hold")


def test_register_name_of_another_module_raises():
    with pytest.raises(UsageError, match="scratch"):
        branch_registry.register("scratch")(Trunk)


def test_compile_signature_is_independent_of_the_branch():
    configs = [branch_of(name, **options) for name, options in FIXED.items()]
    signatures = {make_task(c).compile_signature() for c in configs}
    assert len(signatures) == 1


# The initial values.


@pytest.mark.parametrize(
    "technique", ["magnitude", "variational_dropout", "l0"]
)
def test_lottery_ticket_starts_from_the_bits_of_the_trunk(technique, workdir):
    trunk = trunk_of(technique)
    model, optimizer = start(branch_of("lottery_ticket", trunk), workdir)
    # As TensorFlow alone reads them.
    stored = processes.checkpoint_values(directory_of(trunk, workdir), 0)
    bits = {value.tobytes() for value in stored.values()}
    for path, value in dense_values(model).items():
        assert value.tobytes() in bits, path
    assert int(optimizer.iterations) == 0
    masks = read_masks(str(directory_of(trunk, workdir)))
    for path, mask in sos.get_masks(model).items():
        np.testing.assert_array_equal(mask, masks[path])


@pytest.mark.parametrize("step", [0, 6])
def test_lottery_ticket_has_the_learning_rate_of_its_config(step, workdir):
    overrides = {"optimizer": {"rate": 0.5}}
    config = branch_of("lottery_ticket", step=step, overrides=overrides)
    _, optimizer = start(config, workdir)
    assert float(optimizer.learning_rate) == 0.5
    assert int(optimizer.iterations) == step


@pytest.mark.parametrize("name", ["scratch", "augmented_init", "random_mask"])
def test_fresh_branch_starts_from_other_weights(name, workdir):
    model, _ = start(branch_of(name), workdir)
    values = Trunk(str(directory_of(trunk_of(), workdir))).values(0).model
    for path, value in values.items():
        if path.endswith("kernel"):
            new = dense_values(model)[path]
            assert not np.isin(new, value).any()


_FAMILIES = [
    ("GlorotUniform", {}, 2 / 700),
    ("GlorotNormal", {}, 2 / 700),
    ("HeUniform", {}, 2 / 400),
    ("HeNormal", {}, 2 / 400),
    ("LecunUniform", {}, 1 / 400),
    ("LecunNormal", {}, 1 / 400),
    (
        "VarianceScaling",
        {"scale": 3.0, "mode": "fan_out", "distribution": "untruncated_normal"},
        3 / 300,
    ),
    ("RandomUniform", {"minval": -0.3, "maxval": 0.3}, 0.09 / 3),
    ("RandomNormal", {"stddev": 0.1}, 0.01),
    # Of a standard normal distribution within two standard deviations.
    ("TruncatedNormal", {"stddev": 0.1}, 0.01 * 0.7737413),
    ("Orthogonal", {}, 1 / 400),
]


@pytest.mark.parametrize(
    ("initializer", "arguments", "variance"),
    _FAMILIES,
    ids=[family[0] for family in _FAMILIES],
)
def test_fresh_weights_have_the_variance_of_their_initializer(
    initializer, arguments, variance, tmp_path
):
    model = {"initializer": initializer, "arguments": arguments}
    mask = np.zeros((400, 300), "uint8")
    mask[:, ::10] = 1
    trunk = store(
        branch_tasks.config("Wide", model=model),
        {"wide/kernel": mask},
        tmp_path,
    )
    kernels = {}
    for name in ("scratch", "augmented_init"):
        sparse, _ = start(branch_of(name, trunk), tmp_path)
        kernels[name] = keras.ops.convert_to_numpy(sparse.layers[-1].kernel)
    # Of 120,000 weights: five standard errors of a normal distribution.
    error = 5 * np.sqrt(2 / mask.size)
    assert np.var(kernels["scratch"]) == pytest.approx(variance, rel=error)
    np.testing.assert_array_equal(
        kernels["augmented_init"], kernels["scratch"] * np.float32(10**0.5)
    )
    assert np.var(kernels["augmented_init"]) == pytest.approx(
        variance / 0.1, rel=error
    )


def test_augmented_init_tensor_without_kept_elements_is_unchanged(tmp_path):
    trunk = store(
        branch_tasks.config("Wide"),
        {"wide/kernel": np.zeros((400, 300), "uint8")},
        tmp_path,
    )
    kernels = [
        start(branch_of(name, trunk), tmp_path)[0].layers[-1].kernel
        for name in ("scratch", "augmented_init")
    ]
    np.testing.assert_array_equal(*arrays(kernels))


def test_random_mask_keeps_as_many_elements_as_the_trunk(workdir):
    expected = read_masks(str(directory_of(trunk_of(), workdir)))
    masks = [
        sos.get_masks(start(branch_of("random_mask", seed=s), workdir)[0])
        for s in (1, 1, 2)
    ]
    for path, mask in expected.items():
        assert mask.sum() == masks[0][path].sum()
        assert (masks[0][path] != mask).any()
        np.testing.assert_array_equal(masks[0][path], masks[1][path])
        assert (masks[0][path] != masks[2][path]).any()


@pytest.mark.parametrize("name", FIXED)
def test_start_again_gives_the_same_bits(name, workdir):
    config = branch_of(name, **FIXED[name])
    first, again = (start(config, workdir) for _ in range(2))
    for old, new in zip(first, again, strict=True):
        for a, b in zip(
            arrays(old.variables), arrays(new.variables), strict=True
        ):
            np.testing.assert_array_equal(a, b)


def test_dense_layer_of_the_trunk_stays_dense(tmp_path):
    trunk = trunk_of(sparsity={**MAGNITUDE, "rules": [["^a/", None]]})
    mask = np.eye(16, 3, dtype="uint8")
    store(trunk, {"b/kernel": mask}, tmp_path)
    for name in ("scratch", "augmented_init", "transferred_profile"):
        model, _ = start(branch_of(name, trunk), tmp_path)
        rows = {r["weight"]: r for r in sos.sparsity_report(model).rows}
        assert rows["a/kernel"]["technique"] == ""
        assert rows["a/kernel"]["sparsity"] == 0
        assert rows["b/kernel"]["technique"] != ""


# Errors. None leaves a checkpoint.


def initialize_fails(config, workdir, match):
    """Checks that a start raises, and before a value changes."""
    config = with_parent_directory(config, workdir)
    task = make_task(config)
    model, optimizer = trainer_lib.build(task)
    variables = [*model.variables, *optimizer.variables]
    before = arrays(variables)
    with pytest.raises(UsageError, match=match) as error:
        task.initialize(model, optimizer)
    for old, new in zip(before, arrays(variables), strict=True):
        np.testing.assert_array_equal(old, new)
    return str(error.value)


def test_start_without_the_parent_raises(tmp_path):
    name = config_lib.run_name(trunk_of())
    initialize_fails(branch_of("scratch"), tmp_path, name)
    with pytest.raises(UsageError, match=name):
        train(branch_of("scratch"), tmp_path)
    (directory,) = tmp_path.iterdir()
    assert processes.checkpoint_steps(directory) == []


def test_start_from_an_unfinished_run_raises(copy):
    (directory_of(trunk_of(), copy) / "result.json").unlink()
    initialize_fails(branch_of("scratch"), copy, "finished")


def test_start_from_scratch_for_other_steps_than_the_multiplier_raises(workdir):
    values = branch_of("scratch").to_dict()
    values["branch"]["multiplier"] = 2
    initialize_fails(config_lib.resolve(values), workdir, "train for 24")


def test_start_from_a_dense_run_raises(workdir):
    parent = config_lib.run_name(trunk_of("dense"))
    config = branch_of("scratch", overrides={"parent": parent})
    initialize_fails(config, workdir, "technique=None")


def test_start_from_masks_of_another_model_lists_the_differences(workdir):
    config = branch_of("scratch", overrides={"model": {"units": 32}})
    message = initialize_fails(config, workdir, "another model")
    assert "a/kernel: 'mask 6x16' saved, 'mask 6x32' now" in message
    assert "b/kernel" in message


def test_start_of_a_profile_of_another_model_lists_the_differences(workdir):
    overrides = {"model": {"units": 32}}
    config = branch_of("transferred_profile", overrides=overrides)
    message = initialize_fails(config, workdir, "another model")
    assert "a/kernel: 'mask 6x16' saved, 'mask 6x32' now" in message


def test_start_from_many_other_masks_lists_twenty(tmp_path):
    masks = {f"{i}/kernel": np.ones(2, "uint8") for i in range(30)}
    trunk = store(trunk_of(), masks, tmp_path)
    message = initialize_fails(branch_of("scratch", trunk), tmp_path, "model")
    assert message.count("\n") == 21
    assert "and 12 more" in message


@pytest.mark.parametrize("name", ["lottery_ticket", "scratch"])
def test_start_from_a_trunk_without_step_0(name, copy):
    shutil.rmtree(
        directory_of(trunk_of(), copy) / "checkpoints" / "step-00000000"
    )
    config = branch_of(name)
    if name == "scratch":
        start(config, copy)
        return
    message = initialize_fails(config, copy, r"step 0.*\[6, 12\]")
    assert "keep_steps=(0,)" in message


def test_start_from_a_damaged_checkpoint_names_it(copy):
    directory = directory_of(trunk_of(), copy) / "checkpoints/step-00000006"
    (directory / "variables.index").unlink()
    with pytest.raises(CheckpointError, match=f"{directory} is damaged"):
        start(branch_of("rewound", step=6), copy)


def test_start_from_a_run_that_only_tensorflow_can_read():
    masks = {
        "a/kernel": np.eye(6, 16, dtype="uint8"),
        "b/kernel": np.eye(16, 3, dtype="uint8"),
    }
    trunk = store(trunk_of(), masks, "ram://trunks")
    directory = run_directory(trunk, "ram://trunks")
    config = config_lib.resolve(branch(f"{directory}/", "scratch"))
    assert config_lib.parent_name(config) == config_lib.run_name(trunk)
    model, _ = start(config, "ram://branches")
    for path, mask in sos.get_masks(model).items():
        np.testing.assert_array_equal(mask, masks[path])


def test_start_with_a_technique_that_changes_masks_raises(workdir):
    overrides = {"sparsity": trunk_of().sparsity.to_dict()}
    config = branch_of("lottery_ticket", overrides=overrides)
    initialize_fails(config, workdir, "'MagnitudePruning'")


def test_start_from_scratch_with_the_trunks_weights_raises(
    workdir, monkeypatch
):
    # The initial weights do not depend on the seed of the config.
    build = toy_experiment.ToyExperiment.build_model

    def seeded(self):
        keras.utils.set_random_seed(0)
        return build(self)

    monkeypatch.setattr(toy_experiment.ToyExperiment, "build_model", seeded)
    initialize_fails(branch_of("scratch"), workdir, "lottery")


def test_task_with_a_parent_alone_raises():
    config = config_lib.resolve({**CONFIG, "parent": "other"})
    with pytest.raises(UsageError, match="parent='other'"):
        make_task(config)


# Runs.


@pytest.fixture(scope="module")
def branches(workdir, tmp_path_factory):
    """The directories of a finished run of each branch, all steps kept."""
    overrides = {
        "parent": str(directory_of(trunk_of(), workdir)),
        "keep": "all",
    }
    other = tmp_path_factory.mktemp("branches")
    directories = {}
    for name, options in FIXED.items():
        config = branch_of(name, overrides=overrides, **options)
        train(config, other, save_checkpoints_steps=2)
        directories[name] = directory_of(config, other)
    return directories


@pytest.mark.parametrize("name", FIXED)
def test_run_of_a_branch_keeps_its_masks_at_every_step(name, branches, workdir):
    expected = read_masks(str(branches[name]))
    trunk = read_masks(str(directory_of(trunk_of(), workdir)))
    steps = processes.checkpoint_steps(branches[name])
    assert steps == list(range(FIXED[name].get("step", 0), STEPS + 1, 2))
    for path, mask in expected.items():
        assert mask.sum() == trunk[path].sum()
        assert (mask == trunk[path]).all() == (name != "random_mask")
    for step in steps:
        values = processes.checkpoint_values(branches[name], step)
        masks = {v.tobytes() for n, v in values.items() if "mask" in n}
        assert masks == {mask.tobytes() for mask in expected.values()}


def test_run_rewound_to_final_masks_repeats_the_trunk(branches, workdir):
    trunk = processes.checkpoint_values(
        directory_of(trunk_of(), workdir), STEPS
    )
    rewound = processes.checkpoint_values(branches["rewound"], STEPS)
    bits = {value.tobytes() for value in trunk.values()}
    for name, value in rewound.items():
        if "seed" not in name:
            assert value.tobytes() in bits, name
    assert processes.records(branches["rewound"])[0]["step"] > 6


def test_run_rewound_keeps_its_first_and_last_checkpoint(workdir, tmp_path):
    parent = str(directory_of(trunk_of(), workdir))
    overrides = {"parent": parent, "keep_steps": [8]}
    config = branch_of("rewound", step=6, overrides=overrides)
    train(config, tmp_path, save_checkpoints_steps=1, keep_checkpoint_max=1)
    directory = directory_of(config, tmp_path)
    assert processes.checkpoint_steps(directory) == [6, 8, STEPS]
    # It can be rewound again.
    ticket = branch_of("rewound", config, step=8)
    _, optimizer = start(ticket, tmp_path)
    assert int(optimizer.iterations) == 8
    with pytest.raises(UsageError, match="begins at step 6.*step=4"):
        branch(config, "lottery_ticket", step=4)
    with pytest.raises(UsageError, match=r"first, 6, .*\[4\]"):
        branch_of("rewound", step=6, overrides={"keep_steps": [4]})


class StopAt:
    """Asks to stop once a step is reached."""

    def __init__(self, step):
        self.step = step
        self.requested = None

    def __call__(self, summary):
        if summary.step >= self.step:
            self.requested = signal.SIGTERM


def stop_in_between(config, workdir, **options):
    stop = StopAt(7)
    options |= {"save_checkpoints_steps": 4, "on_summary": [stop]}
    with pytest.raises(Stopped):
        train(config, workdir, stop=stop, **options)


@pytest.mark.parametrize("name", ["augmented_init", "rewound"])
def test_run_of_a_branch_resumes_without_the_parent(name, branches, copy):
    config = branch_of(name, **FIXED[name])
    stop_in_between(config, copy)
    shutil.rmtree(directory_of(trunk_of(), copy))
    train(config, copy)
    values = [
        processes.checkpoint_values(directory, STEPS)
        for directory in (directory_of(config, copy), branches[name])
    ]
    assert processes.differences(*values) == []


def test_run_of_a_branch_killed_before_its_first_checkpoint_starts_again(
    branches, copy, monkeypatch
):
    def killed(self, checkpoints):
        raise InterruptedError

    config = branch_of("augmented_init")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", killed)
        with pytest.raises(InterruptedError):
            train(config, copy)
    directory = directory_of(config, copy)
    assert processes.checkpoint_steps(directory) == []
    train(config, copy)
    values = [
        processes.checkpoint_values(path, STEPS)
        for path in (directory, branches["augmented_init"])
    ]
    assert processes.differences(*values) == []


def test_run_of_a_transferred_profile_reaches_the_trunks_sparsities(copy):
    trunk = trunk_of("variational_dropout")
    config = branch_of("transferred_profile", trunk, **PROFILE)
    trainers = TrainerCache()
    stop_in_between(config, copy, make_trainer=trainers)
    masks = directory_of(trunk, copy) / "masks.npz"
    moved = masks.rename(masks.with_name("moved.npz"))
    with pytest.raises(UsageError, match="masks"):
        train(config, copy)
    moved.rename(masks)
    train(config, copy, make_trainer=trainers)
    new = read_masks(str(directory_of(config, copy)))
    for path, mask in read_masks(str(directory_of(trunk, copy))).items():
        assert new[path].sum() == mask.sum()
        assert (new[path] != mask).any()


def test_profile_of_a_pruned_tensor_prunes_it(tmp_path):
    masks = {
        "a/kernel": np.zeros((6, 16), "uint8"),
        "b/kernel": np.ones((16, 3), "uint8"),
    }
    trunk = store(trunk_of(), masks, tmp_path)
    model, _ = start(branch_of("transferred_profile", trunk), tmp_path)
    with pytest.warns(UserWarning, match="a/kernel"):
        update_masks(
            {t: t.schedule.target_sparsity for t in find_wrappers(model)}
        )
    for path, mask in sos.get_masks(model).items():
        np.testing.assert_array_equal(mask, masks[path])


@pytest.mark.parametrize("name", ["lottery_ticket", "transferred_profile"])
def test_run_of_unnamed_layers_has_the_paths_of_a_new_process(name, tmp_path):
    keras.layers.Dense(1)
    trunk = config_lib.resolve(branch_tasks.config("Unnamed"))
    config = branch_of(name, trunk)
    for each in (trunk, config):
        train(each, tmp_path, make_trainer=None)
    masks = [
        read_masks(str(directory_of(each, tmp_path)))
        for each in (trunk, config)
    ]
    for each in masks:
        assert list(each) == ["dense/kernel", "dense_1/kernel"]
    for path, mask in masks[0].items():
        assert mask.sum() == masks[1][path].sum()


@pytest.fixture(scope="module", params=["Residual", "Transformer"])
def network(request, tmp_path_factory):
    """A finished trunk of another network, and its work directory."""
    workdir = tmp_path_factory.mktemp(request.param)
    config = branch_tasks.config(request.param, keep_steps=[2])
    trunk = config_lib.resolve(config)
    train(trunk, workdir, make_trainer=TrainerCache())
    return trunk, workdir


def test_branches_of_a_network_start_as_they_should(network):
    trunk, workdir = network
    directory = str(directory_of(trunk, workdir))
    expected = read_masks(directory)
    values = {}
    for name in ("lottery_ticket", "scratch", "augmented_init"):
        model, _ = start(branch_of(name, trunk), workdir)
        for path, mask in sos.get_masks(model).items():
            np.testing.assert_array_equal(mask, expected[path])
        values[name] = list(dense_values(model).values())
    stored = Trunk(directory).values(0).model.values()
    for ticket, value in zip(values["lottery_ticket"], stored, strict=True):
        np.testing.assert_array_equal(ticket, value)
    sparse = {id(w.variable) for w in weights_by_path(model).values()}
    dense = [v for v in model.variables if not v.path.endswith("_mask")]
    masks = iter(expected.values())
    for variable, old, fresh, augmented in zip(
        dense, *values.values(), strict=True
    ):
        if id(variable) in sparse:
            assert not np.isin(fresh, old).any()
            fresh = fresh * np.float32(np.mean(next(masks)) ** -0.5)
        np.testing.assert_array_equal(augmented, fresh)


def test_rewound_network_of_two_replicas_has_the_trunks_values(network):
    trunk, workdir = network
    strategy = techniques.two_replicas()
    with strategy.scope():
        model, optimizer = start(branch_of("rewound", trunk, step=2), workdir)
    stored = Trunk(str(directory_of(trunk, workdir))).values(2)
    values = dense_values(model).values()
    for value, expected in zip(values, stored.model.values(), strict=True):
        np.testing.assert_array_equal(value, expected)
    slots = [v for v in optimizer.variables if v is not optimizer.learning_rate]
    for slot, expected in zip(slots, stored.optimizer.values(), strict=True):
        np.testing.assert_array_equal(slot.numpy(), expected)
    assert stored.optimizer["optimizer/iteration"] == 2


@pytest.mark.slow
def test_branches_of_a_network_keep_their_masks(network):
    trunk, workdir = network
    expected = read_masks(str(directory_of(trunk, workdir)))
    trainers = TrainerCache()
    for name in ("scratch", "augmented_init", "lottery_ticket"):
        config = branch_of(name, trunk, overrides={"keep": "all"})
        options = {"save_checkpoints_steps": 1, "make_trainer": trainers}
        train(config, workdir, **options)
        for step in range(trunk.train_steps + 1):
            directory = directory_of(config, workdir)
            values = processes.checkpoint_values(directory, step)
            masks = {v.tobytes() for n, v in values.items() if "_mask" in n}
            assert masks == {mask.tobytes() for mask in expected.values()}


@pytest.mark.parametrize("name", ["augmented_init", "rewound"])
def test_start_of_two_replicas_sets_both(name, workdir):
    config = branch_of(name, **FIXED[name])
    model, optimizer = start(config, workdir)
    strategy = techniques.two_replicas()
    with strategy.scope():
        mirrored, mirrored_optimizer = start(config, workdir)
    for one, two in ((model, mirrored), (optimizer, mirrored_optimizer)):
        for old, new in zip(one.variables, two.variables, strict=True):
            expected = keras.ops.convert_to_numpy(old)
            for value in strategy.experimental_local_results(new.value):
                np.testing.assert_array_equal(expected, value, err_msg=new.path)
