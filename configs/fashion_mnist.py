r"""Four ways to sparsity on Fashion-MNIST, compared on a small network.

    python -m models.study --config=configs/fashion_mnist.py \
        --workdir=runs/fashion_mnist

or `make study`, which installs everything first. It trains 52 networks on the
6,000 training images that the package contains, in about 7 minutes on 2 CPU
cores, and writes results.csv, tradeoff.png and layerwise.png. Expected test
accuracy in percent, the mean of two seeds:

    sparsity                        50    80    90    95    98
    magnitude                      86.4  86.2  85.7  83.5  79.4
    magnitude, first layer dense   86.3  86.2  86.0  85.1  77.0
    random                         86.5  85.4  82.9  78.0  50.2
    variational dropout, about     86.5  86.8  86.1  85.3  82.7
    L0, about                      86.3  86.4  86.3  85.8  85.3

and 86.4 for the dense network. On 4,000 test images the standard error of an
accuracy is 0.6 points; at 98 % that of magnitude pruning with a dense first
layer varies by 9 points among eight seeds.

In less than a minute, with two runs of every technique (so few steps need
larger penalties for L0):

    make study WORKDIR=runs/quick ARGS="--config.steps=150 \
        --config.seeds=0, --config.magnitude.sparsities=0.5,0.9 \
        --config.magnitude_dense_first.sparsities=0.5,0.9 \
        --config.random.sparsities=0.5,0.9 \
        --config.variational_dropout.penalties=0.1,1.0 \
        --config.l0.penalties=10.0,100.0"

Some techniques only:

    make study WORKDIR=runs/some ARGS="--config.techniques=dense,magnitude"

The number of steps, the batch size, the optimizer and the learning rate are the
same for all techniques, and all make every layer sparse unless their title says
otherwise. What each may choose for itself was chosen among 3 to 6 values each
by the accuracy on the last 1,000 of the training images, after training on the
other 5,000, where one or two seeds leave an error of about a point: when
pruning begins and ends, when a penalty grows, the learning rates of log alpha
and log sigma^2, and the first value of the latter. The penalties were chosen
for the sparsities that they lead to with seeds 0 and 1, which are about those
of pruning. The learning rate and the number of steps were chosen on the test
images with seed 0, so that all accuracies may be slightly optimistic.
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
