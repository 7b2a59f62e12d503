r"""The study of configs/fashion_mnist.py on a residual network and all images.

    python -m models.study --config=configs/fashion_mnist_full.py \
        --workdir=runs/fashion_mnist_full

or `make study-full`. It trains 108 networks, ResNet-20 of He et al. 2016, on
the 60,000 training images of Fashion-MNIST, which are not part of this package:
Debian's `dataset-fashion-mnist` has them, or see
`sos.datasets.fashion_mnist.load_full`. On the embedded 6,000 images it runs
with `--config.dataset=fashion_mnist`.
"""

import ml_collections

from configs import fashion_mnist


def get_config() -> ml_collections.ConfigDict:
    """Returns the study's settings.

    They are those of configs/fashion_mnist.py, which says what they mean, but
    for what is set here.
    """
    config = fashion_mnist.get_config()
    config.seeds = (0, 1, 2)
    config.model = "residual"
    config.dataset = "fashion_mnist_full"
    config.steps = 4000
    for name in ("magnitude", "magnitude_dense_first", "random"):
        config[name].sparsities = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
    return config
