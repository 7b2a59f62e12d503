import hypothesis
import hypothesis.strategies as st
import keras
import pytest

from sos.training.checkpoints import canonical_path, diff, variable_specs

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.text(max_size=2),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=5,
)
CONFIGURATIONS = st.dictionaries(st.sampled_from("abc"), VALUES, max_size=3)


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
def test_the_numbers_that_keras_counts_are_left_out(path, expected):
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


def test_a_second_model_of_one_kind_has_the_same_description():
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


def test_other_shapes_are_told():
    lines = list(diff(variable_specs(*network()), variable_specs(*network(5))))
    assert (
        "sequential/dense/kernel: 'float32 3x2' there, 'float32 3x5' now"
        in lines
    )
    # Kernels and the first bias, each with its momentum.
    assert len(lines) == 6


@hypothesis.given(CONFIGURATIONS, CONFIGURATIONS)
def test_there_are_differences_where_configurations_differ(saved, now):
    lines = list(diff(saved, now))
    assert bool(lines) == (saved != now)
    assert len(lines) == len(list(diff(now, saved)))
    assert list(diff(saved, saved)) == []


def test_differences_are_named_by_their_place():
    saved = {"rate": 0.1, "data": {"name": "toy", "size": 9}, "old": None}
    now = {"rate": 0.2, "data": {"name": "toy", "size": 8}, "new": [1]}
    assert list(diff(saved, now)) == [
        "data.size: 9 there, 8 now",
        "new: absent there, [1] now",
        "old: None there, absent now",
        "rate: 0.1 there, 0.2 now",
    ]
