import json
import types

import numpy as np
import pytest
import tensorflow as tf

from sos.errors import UsageError, WorkerLostError
from sos.training import strategies, tpu_check
from sos.training.strategies import gather, is_chief, make_strategy
from sos.training.trainer import Trainer
from tests.support import techniques
from tests.support.toy_task import ToyTask

TWO_WORKERS = {"worker": ["localhost:2222", "localhost:2223"]}


@pytest.fixture(autouse=True)
def no_tf_config(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)


@pytest.fixture
def tf_config(monkeypatch):
    """Sets TF_CONFIG to a text or to an object."""

    def set_to(value):
        text = value if isinstance(value, str) else json.dumps(value)
        monkeypatch.setenv("TF_CONFIG", text)

    return set_to


def devices(strategy):
    return [
        device.split("/")[-1] for device in strategy.extended.worker_devices
    ]


# What is made. There is no accelerator where the tests run.


def test_make_strategy_of_one_device_takes_the_cpu():
    strategy = make_strategy("one_device")
    assert type(strategy) is tf.distribute.OneDeviceStrategy
    assert devices(strategy) == ["device:CPU:0"]


def test_make_strategy_mirrored_takes_all_logical_devices():
    strategy = make_strategy("mirrored")
    assert type(strategy) is tf.distribute.MirroredStrategy
    assert devices(strategy) == ["device:CPU:0", "device:CPU:1"]


def test_make_strategy_divides_the_cpu_among_replicas():
    # In this process it is divided in two already.
    strategy = make_strategy(cpu_replicas=2)
    assert type(strategy) is tf.distribute.MirroredStrategy
    assert devices(strategy) == ["device:CPU:0", "device:CPU:1"]
    with pytest.raises(UsageError, match="3 in a process with 2"):
        make_strategy("mirrored", cpu_replicas=3)
    with pytest.raises(UsageError, match="mirrored only.*one_device"):
        make_strategy("one_device", cpu_replicas=2)
    with pytest.raises(UsageError, match="mirrored only.*tpu='local'"):
        make_strategy(tpu="local", cpu_replicas=2)
    with pytest.raises(UsageError, match="at least 1.*cpu_replicas=0"):
        make_strategy(cpu_replicas=0)


@pytest.mark.parametrize("name", [None, "mirrored"])
def test_make_strategy_does_not_divide_the_cpu_of_workers(tf_config, name):
    tf_config({"cluster": TWO_WORKERS, "task": {"type": "worker", "index": 0}})
    with pytest.raises(UsageError, match="single process.*with 2 workers"):
        make_strategy(name, cpu_replicas=2)


def test_make_strategy_does_not_divide_the_cpu_beside_gpus(monkeypatch):
    monkeypatch.setattr(
        tf.config, "list_physical_devices", lambda kind: [kind, kind]
    )
    with pytest.raises(UsageError, match="this one has 2.*CUDA_VISIBLE"):
        make_strategy(cpu_replicas=2)


@pytest.mark.oldest
def test_make_strategy_mirrored_twice_works_in_one_process():
    for _ in range(2):
        strategy = make_strategy("mirrored")

        @tf.function
        def total(strategy=strategy):
            def one():
                context = tf.distribute.get_replica_context()
                return context.all_reduce("sum", tf.constant(1.0))

            return strategy.run(one)

        (first, second) = strategy.experimental_local_results(total())
        assert float(first) == float(second) == 2.0


@pytest.mark.parametrize(
    "config",
    [
        "",
        " ",
        "{}",
        {"cluster": {}},
        {"cluster": {"worker": ["localhost:2222"]}},
        # Evaluators and parameter servers do not train.
        {"cluster": {"worker": ["localhost:2222"], "ps": ["localhost:2223"]}},
    ],
)
def test_make_strategy_without_other_workers_takes_one_device(
    tf_config, config
):
    tf_config(config)
    assert type(make_strategy()) is tf.distribute.OneDeviceStrategy


def test_make_strategy_finds_several_workers_in_the_environment(tf_config):
    # Not to be joined here, as the task of this one is missing.
    tf_config({"cluster": TWO_WORKERS})
    with pytest.raises(UsageError, match="The strategy multi_worker needs"):
        make_strategy()
    chief = {"chief": ["localhost:2222"], "worker": ["localhost:2223"]}
    tf_config({"cluster": chief})
    with pytest.raises(UsageError, match="The strategy multi_worker needs"):
        make_strategy()


def test_make_strategy_of_an_unknown_name_lists_the_valid_ones():
    with pytest.raises(UsageError) as error:
        make_strategy("tpus")
    for name in strategies.STRATEGIES:
        assert name in str(error.value)
    assert "Received: strategy='tpus'" in str(error.value)


@pytest.mark.parametrize("name", ["mirrored", "multi_worker", "one_device"])
def test_make_strategy_of_a_tpu_and_another_raises(name):
    with pytest.raises(UsageError, match=f"tpu='mine' with strategy='{name}'"):
        make_strategy(name, tpu="mine")


def test_make_strategy_without_a_tpu_raises():
    with pytest.raises(UsageError, match="TPU 'local'.*--tpu"):
        make_strategy(tpu="local")


def test_make_strategy_of_the_name_tpu_takes_the_local_one(monkeypatch):
    def fail(tpu):
        raise ValueError(f"no TPU {tpu}")

    resolvers = tf.distribute.cluster_resolver
    monkeypatch.setattr(resolvers, "TPUClusterResolver", fail)
    with pytest.raises(UsageError, match="TPU 'local'.*--tpu"):
        make_strategy("tpu")


# Mistakes in TF_CONFIG: none may end in a wait for workers.


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "worker",
        "[]",
        "3",
        '{"cluster": "localhost:2222"}',
        '{"cluster": ["localhost:2222"]}',
        '{"cluster": {"worker": "localhost:2222"}}',
        '{"cluster": {"worker": ["a:1", "b:1"]}, "task": "worker"}',
        '{"cluster": {"worker": ["a:1", "b:1"]}, "task": null}',
    ],
)
@pytest.mark.parametrize("name", [None, "multi_worker"])
def test_make_strategy_of_an_unreadable_tf_config_raises(tf_config, text, name):
    tf_config(text)
    with pytest.raises(UsageError, match="TF_CONFIG") as error:
        make_strategy(name)
    assert "Cause: " in str(error.value)
    assert f"Received: {text!r}" in str(error.value)


@pytest.mark.parametrize(
    "config",
    [
        "",
        {},
        {"task": {"type": "worker", "index": 0}},
        {"cluster": {}, "task": {"type": "worker", "index": 0}},
        {"cluster": TWO_WORKERS},
        {"cluster": TWO_WORKERS, "task": {}},
        {"cluster": TWO_WORKERS, "task": {"type": "worker"}},
        {"cluster": TWO_WORKERS, "task": {"index": 0}},
        {"cluster": TWO_WORKERS, "task": {"type": "worker", "index": 2}},
        {"cluster": TWO_WORKERS, "task": {"type": "worker", "index": -1}},
        {"cluster": TWO_WORKERS, "task": {"type": "worker", "index": "0"}},
        {"cluster": TWO_WORKERS, "task": {"type": "chief", "index": 0}},
        {"cluster": TWO_WORKERS, "task": {"type": ["worker"], "index": 0}},
    ],
    ids=str,
)
def test_make_strategy_of_a_tf_config_without_this_worker_raises(
    tf_config, config
):
    tf_config(config)
    with pytest.raises(UsageError, match="multi_worker.*TF_CONFIG="):
        make_strategy("multi_worker")


# Who writes, and what the others say.


class SeveralWorkers(tf.distribute.MultiWorkerMirroredStrategy):
    """What can be asked of a strategy without the other workers."""

    def __init__(self, cluster, job, index):
        self._resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
            tf.train.ClusterSpec(cluster), task_type=job, task_id=index
        )

    @property
    def cluster_resolver(self):
        return self._resolver


@pytest.mark.parametrize(
    ("cluster", "job", "index", "chief"),
    [
        (TWO_WORKERS, "worker", 0, True),
        (TWO_WORKERS, "worker", 1, False),
        ({"chief": ["a:1"], **TWO_WORKERS}, "chief", 0, True),
        ({"chief": ["a:1"], **TWO_WORKERS}, "worker", 0, False),
        ({"chief": ["a:1"], **TWO_WORKERS}, "worker", 1, False),
        # TF_CONFIG says nothing: this process alone.
        ({}, None, None, True),
    ],
)
def test_is_chief_of_several_workers_is_true_for_one(
    cluster, job, index, chief
):
    strategy = SeveralWorkers(cluster, job, index)
    assert is_chief(strategy) is chief
    assert strategies.several_processes(strategy)


def test_input_pipelines_of_any_strategy_are_its_hosts():
    class Workers(SeveralWorkers):
        """Three workers with two devices each."""

        num_replicas_in_sync = 6
        extended = types.SimpleNamespace(worker_devices=["GPU:0", "GPU:1"])

    assert strategies.input_pipelines(Workers(TWO_WORKERS, "worker", 0)) == 3
    assert strategies.input_pipelines(techniques.two_replicas()) == 1
    assert strategies.input_pipelines(tf.distribute.get_strategy()) == 1
    tpu = tpu_check.deviceless_strategy(2)
    assert strategies.input_pipelines(tpu) == 1


@pytest.mark.parametrize("name", ["one_device", "mirrored"])
def test_is_chief_of_a_process_by_itself_is_true(name, tf_config):
    tf_config({"cluster": TWO_WORKERS, "task": {"type": "worker", "index": 1}})
    strategy = make_strategy(name)
    assert is_chief(strategy)
    assert not strategies.several_processes(strategy)


@pytest.mark.parametrize(
    "make", [techniques.two_replicas, tf.distribute.get_strategy]
)
def test_gather_in_one_process_returns_its_values(make):
    # Whatever the number of its replicas; exact in float64.
    values = [1.0 / 3.0, 2.0**53 - 1, -0.0]
    gathered = gather(make(), values)
    assert gathered.dtype == np.float64
    assert gathered.shape == (1, 3)
    assert gathered.tobytes() == np.array([values]).tobytes()


# Lost workers.


@pytest.mark.parametrize(
    ("config", "several"),
    [
        ("", False),
        ("no JSON", False),
        ({"cluster": {"worker": ["localhost:2222"]}}, False),
        ({"cluster": TWO_WORKERS}, True),
    ],
)
def test_several_workers_is_read_from_the_environment(
    tf_config, config, several
):
    tf_config(config)
    assert strategies.several_workers() is several


ABORTED = "Collective ops is aborted by: Socket closed\nAdditional GRPC error"


@pytest.mark.parametrize(
    "error",
    [
        tf.errors.UnavailableError(None, None, ABORTED),
        tf.errors.FailedPreconditionError(None, None, ABORTED),
        tf.errors.DeadlineExceededError(None, None, "Socket closed"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_lost_worker_errors_become_one_class(error):
    with (
        pytest.raises(WorkerLostError, match="Socket closed") as raised,
        strategies.lost_worker_errors(),
    ):
        raise error
    assert raised.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        tf.errors.FailedPreconditionError(None, None, "no such table"),
        tf.errors.InvalidArgumentError(None, None, "wrong shape"),
        ValueError("a bug"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_lost_worker_errors_leaves_others_unchanged(error):
    with (
        pytest.raises(type(error)) as raised,
        strategies.lost_worker_errors(),
    ):
        raise error
    assert raised.value is error


def test_trainer_under_the_default_strategy_trains_and_evaluates():
    trainer = Trainer(ToyTask(), strategy=tf.distribute.get_strategy())
    trainer.train(2)
    assert trainer.step == 2
    assert np.isfinite(trainer.evaluate().metrics["loss"])
