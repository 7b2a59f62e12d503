"""The networks that benchmarks train, dense or with any technique."""

from typing import Any

import keras

import sos
from models import convnet

DENSE = "dense"

# By name: the images' shape and the number of classes. The small one is for
# trying a benchmark out.
NETWORKS = {"convnet": ((28, 28, 1), 10), "resnet50": ((224, 224, 3), 1000)}


def build(
    name: str,
    technique: str = DENSE,
    hyperparameters: dict[str, Any] | None = None,
    *,
    size: int | None = None,
) -> keras.Model:
    """Builds one of `NETWORKS`.

    Args:
        name: Its name.
        technique: The name of a registered technique, or "dense".
        hyperparameters: Hyperparameters of any techniques, of which this one
            takes those that it has.
        size: Height and width of the images; None for the network's usual one.

    Returns:
        A built model that returns logits.
    """
    shape, classes = NETWORKS[name]
    if size is not None:
        shape = (size, size, shape[-1])
    if name == "convnet":
        model = convnet.build(shape, classes, seed=0)
    else:
        model = keras.applications.ResNet50(
            weights=None,
            input_shape=shape,
            classes=classes,
            classifier_activation=None,
        )
    if technique == DENSE:
        return model
    selected = sos.select_hyperparameters(technique, hyperparameters or {})
    return sos.sparsify(model, technique, copy=False, **selected)
