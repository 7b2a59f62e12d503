import keras
import numpy as np
import pytest
import tensorflow as tf

import sos
from tests.support import techniques


def penalized(**arguments):
    wrapper = techniques.wrap(
        "L0Regularization", keras.layers.Dense(3), **arguments
    )
    techniques.bind(wrapper)
    return wrapper


def test_reads_as_a_python_number_before_and_after_build():
    wrapper = penalized(penalty_weight=0.1, seed=7)
    before = wrapper.penalty_weight, wrapper.seed
    wrapper.build((None, 2))
    after = wrapper.penalty_weight, wrapper.seed
    assert before == after == (0.1, 7)
    for values in (before, after):
        assert [type(value) for value in values] == [float, int]


def test_change_before_build_counts():
    wrapper = penalized(penalty_weight=0.1)
    wrapper.penalty_weight = 0.25
    wrapper.build((None, 2))
    assert wrapper.penalty_weight == 0.25
    assert float(wrapper.hyperparameter("penalty_weight")) == 0.25


def test_change_after_build_reaches_compiled_code_without_a_new_trace():
    wrapper = penalized(penalty_weight=1.0)
    wrapper.build((None, 2))
    penalty = tf.function(lambda: sum(wrapper.losses))
    one = float(penalty())
    wrapper.penalty_weight = 5
    assert float(penalty()) == pytest.approx(5 * one, rel=1e-6)
    assert penalty.experimental_get_tracing_count() == 1


def test_seed_changes_the_noise_without_a_new_trace():
    wrapper = penalized(initial_log_alpha=0.0)
    wrapper.build((None, 9))
    call = tf.function(lambda: wrapper(tf.eye(9), training=True))
    first = call().numpy()
    wrapper.seed = 1
    assert (call().numpy() != first).any()
    wrapper.seed = 0
    np.testing.assert_array_equal(call(), first)
    assert call.experimental_get_tracing_count() == 1


@pytest.mark.parametrize(
    "value",
    [-1e-9, float("nan"), "much", "1", True, None, [1.0], -np.inf, np.inf],
)
def test_penalty_weight_must_be_a_finite_number_from_0_on(value):
    # Without any, the weight follows from `num_examples`.
    error = TypeError if value is None else ValueError
    with pytest.raises(error, match="`penalty_weight`"):
        penalized(penalty_weight=value)
    wrapper = penalized(penalty_weight=0.5)
    wrapper.build((None, 2))
    with pytest.raises(ValueError, match=">= 0.0. Received: penalty_weight="):
        wrapper.penalty_weight = value
    assert wrapper.penalty_weight == 0.5


@pytest.mark.parametrize("value", [2**40, 2**31, -(2**31), 0.5, "1"])
def test_seed_must_be_a_32_bit_integer(value):
    with pytest.raises(ValueError, match="`seed`"):
        penalized(seed=value)


def test_hyperparameters_are_not_trainable_and_are_saved_in_the_config():
    wrapper = penalized(penalty_weight=0.1)
    wrapper.build((None, 2))
    wrapper.penalty_weight = 0.3
    wrapper.seed = 2
    config = wrapper.get_config()
    assert (config["penalty_weight"], config["seed"]) == (0.3, 2)
    again = type(wrapper).from_config(config)
    assert (again.penalty_weight, again.seed) == (0.3, 2)
    trainable = {v.name for v in wrapper.trainable_variables}
    assert not trainable & {"penalty_weight", "seed"}


def test_hyperparameters_belong_to_one_layer():
    a, b = penalized(penalty_weight=1.0), penalized(penalty_weight=2.0)
    a.build((None, 2))
    b.build((None, 2))
    a.penalty_weight = 3.0
    assert b.penalty_weight == 2.0


def test_set_hyperparameters_changes_the_layers_that_have_it():
    model = keras.Sequential(
        [
            keras.Input((4,)),
            techniques.wrap("L0Regularization", keras.layers.Dense(4)),
            techniques.wrap("VariationalDropout", keras.layers.Dense(4)),
            techniques.wrap("MagnitudePruning", keras.layers.Dense(4)),
        ]
    )
    l0, dropout, magnitude = model.layers
    sos.set_hyperparameters(model, threshold=1.5, penalty_weight=0.5)
    assert dropout.threshold == 1.5
    assert l0.penalty_weight == dropout.penalty_weight == 0.5
    schedule = sos.schedules.PolynomialDecay(0.0, 0.9, 0, 10)
    sos.set_hyperparameters(model, schedule=schedule)
    assert magnitude.schedule.inner is schedule


def test_set_hyperparameters_names_those_there_are_and_changes_all_or_nothing():
    model = techniques.mlp("VariationalDropout", penalty_weight=0.5)
    valid = r"\['penalty_weight', 'seed', 'threshold'\]"
    with pytest.raises(ValueError, match=f"'treshold'. Valid names: {valid}"):
        sos.set_hyperparameters(model, penalty_weight=1.0, treshold=1.0)
    with pytest.raises(ValueError, match="'schedule'"):
        sos.set_hyperparameters(
            model, penalty_weight=1.0, schedule=techniques.SCHEDULE
        )
    with pytest.raises(ValueError, match="Received: seed=0.5"):
        sos.set_hyperparameters(
            model, penalty_weight=1.0, threshold=1.0, seed=0.5
        )
    for wrapper in model.layers:
        assert (wrapper.penalty_weight, wrapper.threshold) == (0.5, 3.0)
    model = techniques.mlp("RandomPruning")
    with pytest.raises(TypeError, match="Received: schedule=0.9"):
        sos.set_hyperparameters(model, seed=1, schedule=0.9)
    assert [wrapper.seed for wrapper in model.layers] == [0, 0]


class Scaled(sos.extend.SparseWrapper):
    """A technique with a hyperparameter of its own."""

    factor = sos.extend.Hyperparameter("float32", minimum=0.5)
    needs_step = False

    def __init__(self, layer, *, factor=1.0, **kwargs):
        super().__init__(layer, **kwargs)
        self.factor = factor

    def training_weight(self, weight):
        return weight.value * self.hyperparameter("factor")


def test_registered_technique_gets_hyperparameters():
    wrapper = Scaled(keras.layers.Dense(2, use_bias=False), factor=2.0)
    x = np.ones((1, 3), np.float32)
    double = wrapper(x).numpy()
    np.testing.assert_allclose(
        double, 2 * techniques.call_plain(wrapper.layer, x), rtol=1e-6
    )
    wrapper.factor = 0.5
    np.testing.assert_allclose(wrapper(x), double / 4, rtol=1e-6)
    with pytest.raises(ValueError, match=">= 0.5"):
        wrapper.factor = 0.4
