import keras
import pytest
from keras import layers

import sos
from tests.support import techniques


def counts(layer, *shapes, call=None):
    """Multiply-adds of each weight of rank 2 or more, in order."""
    inputs = [keras.Input(shape) for shape in shapes]
    outputs = call(layer, *inputs) if call else layer(*inputs)
    return of(keras.Model(inputs, outputs))


def of(model):
    return [
        row["multiply_adds"]
        for row in sos.sparsity_report(model).rows
        if row["rank"] > 1
    ]


# name: layer, shape of its input, multiply-adds of each weight, by hand.
CASES = {
    "Dense": (lambda: layers.Dense(5), (3,), [3 * 5]),
    "Dense rank 3": (lambda: layers.Dense(5), (7, 3), [7 * 3 * 5]),
    "Dense rank 4": (lambda: layers.Dense(5), (2, 7, 3), [14 * 3 * 5]),
    "EinsumDense": (
        lambda: layers.EinsumDense("abc,cde->abde", (None, 2, 3)),
        (7, 4),
        [7 * 4 * 2 * 3],
    ),
    "EinsumDense of two axes": (
        lambda: layers.EinsumDense("abcd,cde->abe", (None, 6)),
        (7, 2, 3),
        [7 * 2 * 3 * 6],
    ),
    "Conv1D causal": (
        lambda: layers.Conv1D(5, 3, padding="causal"),
        (8, 2),
        [8 * 3 * 2 * 5],
    ),
    "Conv2D valid": (
        lambda: layers.Conv2D(5, 3),
        (8, 10, 2),
        [6 * 8 * 9 * 2 * 5],
    ),
    "Conv2D same": (
        lambda: layers.Conv2D(5, 3, padding="same"),
        (8, 10, 2),
        [8 * 10 * 9 * 2 * 5],
    ),
    "Conv2D strides": (
        lambda: layers.Conv2D(5, 3, 2, "same"),
        (8, 9, 2),
        [4 * 5 * 9 * 2 * 5],
    ),
    "Conv2D groups": (
        lambda: layers.Conv2D(6, 3, groups=2),
        (8, 8, 4),
        [36 * 9 * 2 * 6],
    ),
    "Conv2D channels first": (
        lambda: layers.Conv2D(5, 3, data_format="channels_first"),
        (2, 8, 10),
        [6 * 8 * 9 * 2 * 5],
    ),
    "Conv3D": (lambda: layers.Conv3D(3, 2), (4, 4, 4, 2), [27 * 8 * 2 * 3]),
    "Conv2DTranspose": (
        lambda: layers.Conv2DTranspose(5, 3, 2),
        (4, 6, 2),
        [24 * 9 * 2 * 5],
    ),
    "DepthwiseConv2D": (
        lambda: layers.DepthwiseConv2D(3, depth_multiplier=2),
        (8, 8, 4),
        [36 * 9 * 4 * 2],
    ),
    "SeparableConv2D": (
        lambda: layers.SeparableConv2D(5, 3, 2, "same"),
        (8, 8, 4),
        [16 * 9 * 4, 16 * 4 * 5],
    ),
    "LSTM": (lambda: layers.LSTM(3), (7, 2), [7 * 2 * 12, 7 * 3 * 12]),
    # Its bias has two rows, which are added and no more.
    "GRU": (lambda: layers.GRU(3), (7, 2), [7 * 2 * 9, 7 * 3 * 9, None]),
    "Bidirectional": (
        lambda: layers.Bidirectional(layers.LSTM(3)),
        (7, 2),
        [7 * 2 * 12, 7 * 3 * 12] * 2,
    ),
    "TimeDistributed": (
        lambda: layers.TimeDistributed(layers.Conv2D(5, 3)),
        (6, 8, 8, 2),
        [6 * 36 * 9 * 2 * 5],
    ),
    "Embedding": (lambda: layers.Embedding(9, 4), (7,), [0]),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("wrapped", [False, True])
def test_multiply_adds_of_a_layer_are_those_by_hand(name, wrapped):
    make, shape, expected = CASES[name]
    layer = make()
    if wrapped:
        layer = techniques.wrap(sos.MagnitudePruning, layer)
    found = counts(layer, shape)
    assert found == expected


@pytest.mark.parametrize("by_name", [False, True])
def test_multiply_adds_of_attention_are_those_by_hand(by_name):
    def call(layer, query, value):
        return layer(query, value=value) if by_name else layer(query, value)

    attention = layers.MultiHeadAttention(2, 3, value_dim=5)
    # query, key, value, output: 4 queries of size 6, 7 values of size 8.
    found = counts(attention, (4, 6), (7, 8), call=call)
    assert [count for count in found if count is not None] == [
        4 * 6 * 2 * 3,
        7 * 8 * 2 * 3,
        7 * 8 * 2 * 5,
        4 * 2 * 5 * 6,
    ]
    assert len(found) == 7  # Three biases have rank 2.


def test_multiply_adds_of_a_shared_layer_count_every_call():
    inputs = keras.Input((3,))
    longer = keras.Input((7, 3))
    shared = layers.Dense(3)
    model = keras.Model(
        [inputs, longer], [shared(shared(inputs)), shared(longer)]
    )
    assert of(model) == [(1 + 1 + 7) * 9]
    schedule = sos.schedules.ConstantSparsity(0.5, 0)
    sparse = sos.sparsify(model, sos.MagnitudePruning, schedule=schedule)
    assert of(sparse) == [9 * 9]


def test_multiply_adds_of_a_nested_model_count_every_call():
    inner = keras.Sequential([keras.Input((3,)), layers.Dense(3)])
    inputs = keras.Input((3,))
    x = inner(inner(inputs))
    model = keras.Model(inputs, layers.Dense(5)(x))
    assert of(model) == [2 * 9, 15]
    assert of(inner) == [9]


def test_multiply_adds_of_a_model_change_nothing_in_it():
    inputs = keras.Input((3,))
    dense = layers.Dense(3)
    model = keras.Model(inputs, dense(inputs))
    before = set(vars(dense))
    assert of(model) == of(model) == [9]
    assert set(vars(dense)) == before
    assert dense.output.shape == (None, 3)


def test_multiply_adds_of_unknown_sizes_and_layers_are_none():
    class Own(layers.Dense):
        def call(self, inputs):
            return super().call(inputs)

    class Other(layers.Layer):
        def build(self, input_shape):
            self.kernel = self.add_weight(shape=(input_shape[-1], 2))

        def call(self, inputs):
            return inputs @ self.kernel

    assert counts(layers.Conv2D(5, 3), (None, None, 2)) == [None]
    assert counts(layers.LSTM(5), (None, 2)) == [None, None]
    assert counts(Other(), (4,)) == [None]
    inputs = keras.Input((None, 3))
    model = keras.Model(inputs, [layers.Dense(2)(inputs), Other()(inputs)])
    report = sos.sparsity_report(model)
    assert report.totals["multiply_adds"] == 0
    assert "multiply-adds" not in str(report)
    model = keras.Model(
        inputs, [layers.Dense(2)(inputs[:, 0]), Other()(inputs)]
    )
    assert "of 1 weights are not known" in str(sos.sparsity_report(model))


@pytest.mark.slow
def test_multiply_adds_of_resnet50_are_those_of_the_paper():
    model = keras.applications.ResNet50(weights=None)
    total = sos.sparsity_report(model).totals["multiply_adds"]
    assert 3.85e9 < total < 3.87e9
