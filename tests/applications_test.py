"""Models that nobody wrote for this package."""

import keras
import numpy as np
import pytest
from keras import applications, layers

import sos
from tests.support import techniques


def encoder():
    """A transformer encoder for token sequences."""
    tokens = keras.Input((8,), dtype="int32")
    x = layers.Embedding(20, 16, mask_zero=True)(tokens)
    for _ in range(2):
        y = layers.LayerNormalization()(x)
        y = layers.MultiHeadAttention(2, 8, dropout=0.1)(y, y)
        x = layers.Add()([x, y])
        y = layers.LayerNormalization()(x)
        y = layers.Dense(32, activation="gelu")(y)
        x = layers.Add()([x, layers.Dense(16)(layers.Dropout(0.1)(y))])
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(tokens, layers.Dense(5, "softmax")(x))


def application(name, size=32):
    def make():
        return getattr(applications, name)(
            weights=None, input_shape=(size, size, 3), classes=5
        )

    make.__name__ = name
    return make


MODELS = [
    encoder,
    application("MobileNetV3Small"),
    application("EfficientNetV2B0"),
    application("ResNet50"),
    application("ConvNeXtTiny"),
]
# With masks, noise or gates. Of those without all three, each takes up to half
# a minute.
CASES = {
    "encoder": [
        sos.MagnitudePruning,
        sos.VariationalDropout,
        sos.L0Regularization,
    ],
    "MobileNetV3Small": [sos.MagnitudePruning],
    "EfficientNetV2B0": [sos.MagnitudePruning],
    "ResNet50": [sos.VariationalDropout],
    "ConvNeXtTiny": [sos.VariationalDropout],
}


def cases():
    """All models; the fast tests have the encoder only."""
    result = []
    for make in MODELS:
        for technique in CASES[make.__name__]:
            case = pytest.param(
                make,
                technique,
                marks=[pytest.mark.slow] * (make is not encoder),
                id=f"{make.__name__}-{technique.__name__}",
            )
            result.append(case)
    return result


def data_for(model):
    generator = np.random.default_rng(0)
    shape = (8, *model.input_shape[1:])
    if len(shape) == 2:
        x = generator.integers(0, 20, shape).astype("int32")
    else:
        x = generator.uniform(0, 255, shape).astype("float32")
    return x, generator.integers(0, 5, 8)


@pytest.mark.parametrize("make, technique", cases())
def test_unknown_model_is_trained_saved_loaded_and_stripped(
    make, technique, tmp_path
):
    keras.utils.set_random_seed(0)
    model = make()
    x, y = data_for(model)
    outputs = model(x[:4], training=False).numpy()
    sparse = sos.sparsify(model, technique, **techniques.arguments(technique))
    if technique is not sos.FixedMask and not issubclass(
        technique, sos.extend.PenalizedWrapper
    ):
        np.testing.assert_array_equal(sparse(x[:4], training=False), outputs)
    sparse.compile(
        keras.optimizers.SGD(1e-3),
        "sparse_categorical_crossentropy",
        # Tracing takes most of the time, and one technique is enough for it.
        run_eagerly=make is not encoder
        or technique is not sos.MagnitudePruning,
    )
    history = sparse.fit(
        x, y, batch_size=4, callbacks=[sos.SparsityCallback()], verbose=0
    )
    assert np.isfinite(history.history["loss"]).all()
    techniques.make_zeros(sparse)

    outputs = sparse(x[:4], training=False).numpy()
    assert np.isfinite(outputs).all()
    report = sos.sparsity_report(sparse)
    assert report.sparsity > 0.1
    matrices = [row for row in report.rows if row["technique"]]
    assert all(row["multiply_adds"] is not None for row in matrices)
    assert len(report.rows) == len(model.weights)

    sparse.save(tmp_path / "sparse.keras")
    loaded = keras.models.load_model(tmp_path / "sparse.keras")
    np.testing.assert_array_equal(loaded(x[:4], training=False), outputs)

    plain = sos.strip(loaded)
    np.testing.assert_array_equal(plain(x[:4], training=False), outputs)
    assert [layer.name for layer in plain.layers] == [
        layer.name for layer in model.layers
    ]
    assert plain.count_params() == model.count_params()
    if make not in MODELS[:2]:
        return  # It is a plain model of Keras, whose file takes seconds.
    plain.save(tmp_path / "plain.keras")
    plain = keras.models.load_model(tmp_path / "plain.keras")
    np.testing.assert_array_equal(plain(x[:4], training=False), outputs)
