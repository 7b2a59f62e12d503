"""Metrics of image classification, against SciPy and sorting."""

import keras
import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st

from sos.experiments.image_classification import classification_metrics


def _means(metrics):
    return {name: float(s) / float(w) for name, (s, w) in metrics.items()}


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_loss_is_the_cross_entropy_of_smoothed_labels(smoothing):
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=3, size=(64, 10)).astype(np.float32)
    labels = rng.integers(0, 10, 64)
    weights = rng.integers(0, 2, 64).astype(np.float32)
    targets = np.eye(10)[labels] * (1 - smoothing) + smoothing / 10
    losses = -(targets * scipy.special.log_softmax(logits, 1)).sum(1)
    metrics = classification_metrics(
        logits, labels, weights, label_smoothing=smoothing
    )
    expected = np.average(losses, weights=weights)
    assert _means(metrics)["loss"] == pytest.approx(expected, rel=1e-5)
    keras_loss = keras.losses.CategoricalCrossentropy(
        from_logits=True, label_smoothing=smoothing
    )(np.eye(10)[labels], logits, sample_weight=weights)
    # Keras divides by the number of examples.
    assert float(metrics["loss"][0]) / 64 == pytest.approx(
        float(keras_loss), rel=1e-5
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 7), st.booleans())
def test_top_k_is_that_of_a_stable_sort(seed, k, ties):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(16, 7)).astype(np.float32)
    if ties:
        logits = logits.round()
    labels = rng.integers(0, 7, 16)
    order = np.argsort(-logits, axis=1, kind="stable")
    among = (order[:, :k] == labels[:, np.newaxis]).any(1)
    metrics = _means(classification_metrics(logits, labels, top_k=k))
    assert metrics[f"top_{k}_accuracy"] == pytest.approx(among.mean())
    if k == 1:
        assert metrics["accuracy"] == metrics["top_1_accuracy"]


def test_a_network_without_weights_is_right_for_k_classes():
    metrics = classification_metrics(
        np.zeros((10, 10), np.float32), np.arange(10), top_k=5
    )
    assert _means(metrics)["top_5_accuracy"] == 0.5


def test_nan_is_never_right():
    metrics = classification_metrics(
        np.full((3, 10), np.nan, np.float32), np.array([1, 2, 3]), top_k=5
    )
    assert _means(metrics)["top_5_accuracy"] == 0


def test_bfloat16_logits_are_compared_in_float32():
    logits = keras.ops.cast(np.eye(10) * 8, "bfloat16")
    metrics = classification_metrics(logits, np.arange(10), top_k=5)
    assert metrics["loss"][0].dtype == "float32"
    assert _means(metrics)["accuracy"] == 1
