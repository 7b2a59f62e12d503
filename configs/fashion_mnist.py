r"""Four ways to sparsity on Fashion-MNIST, compared on a small network.

    python -m models.study --config=configs/fashion_mnist.py \
        --workdir=runs/fashion_mnist

or `make study`, which installs everything first. It trains 52 networks on the
6,000 training images that the package contains, in about XX minutes on 2 CPU
cores, and writes results.csv, tradeoff.png and layerwise.png.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns the study's settings.

    Every entry that is itself a config is a technique. `begin`, `end` and
    `frequency` are fractions of the steps; penalties are multiples of 1 / N,
    where N is the number of training examples. `keep_dense` is a regular
    expression on the paths of weights: what it matches is left dense. A `title`
    is a technique's name in figures and tables.
    """
    config = ml_collections.ConfigDict()

    # The techniques to run, with commas between.
    config.techniques = (
        "dense,magnitude,magnitude_dense_first,random,variational_dropout,l0"
    )
    # Each setting is run with each seed.
    config.seeds = (0, 1)
    # The overall sparsity at which layerwise.png compares the layers.
    config.layerwise_sparsity = 0.9

    # "convnet" or "residual"; see models/.
    config.model = "convnet"
    # "fashion_mnist", which is embedded, or "fashion_mnist_full", which is not.
    config.dataset = "fashion_mnist"

    config.steps = 700
    config.batch_size = 128
    # Of Adam; a cosine takes it to zero.
    config.learning_rate = 0.01
    # Decoupled from the loss, of matrices and kernels only.
    config.weight_decay = 0.0

    config.dense = ml_collections.ConfigDict({"wrapper": None})

    # Sparsity grows by tfmot's cubic schedule.
    magnitude = {
        "wrapper": "MagnitudePruning",
        "sparsities": (0.5, 0.8, 0.9, 0.95, 0.98),
        "begin": 0.0,
        "end": 0.5,
        "frequency": 0.02,
        "keep_dense": "",
        "arguments": {},
    }
    config.magnitude = ml_collections.ConfigDict(magnitude)
    # The first convolution dense, as in the authors' best results on ResNet-50.
    # It has 0.1 % of the weights.
    config.magnitude_dense_first = ml_collections.ConfigDict(
        magnitude
        | {"title": "magnitude, first layer dense", "keep_dense": "^conv1/"}
    )
    config.random = ml_collections.ConfigDict(
        {
            "wrapper": "RandomPruning",
            "sparsities": (0.5, 0.8, 0.9, 0.95, 0.98),
            "begin": 0.0,
            "end": 0.5,
            "frequency": 0.02,
            "keep_dense": "",
            "arguments": {},
        }
    )

    # The penalty grows linearly. The penalties were chosen for the sparsities
    # that they lead to, which are about those of pruning.
    config.variational_dropout = ml_collections.ConfigDict(
        {
            "wrapper": "VariationalDropout",
            "penalties": (0.015, 0.12, 0.3, 0.6, 1.7),
            "begin": 0.1,
            "end": 0.7,
            "learning_rate_multiplier": 1.0,
            "keep_dense": "",
            # From -10, the technique's default, log sigma^2 does not come far
            # enough in so few steps.
            "arguments": {"initial_log_sigma2": -6.0, "threshold": 3.0},
        }
    )
    config.l0 = ml_collections.ConfigDict(
        {
            "wrapper": "L0Regularization",
            "penalties": (0.03, 0.5, 1.3, 3.0, 9.0),
            "begin": 0.1,
            "end": 0.7,
            # Gates close at log alpha = -2.4, which Adam at the weights' rate
            # does not reach in so few steps.
            "learning_rate_multiplier": 10.0,
            "keep_dense": "",
            "arguments": {"initial_log_alpha": 2.197},
        }
    )
    return config
