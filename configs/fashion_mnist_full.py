r"""The study of configs/fashion_mnist.py on a residual network and all images.

    python -m models.study --config=configs/fashion_mnist_full.py \
        --workdir=runs/fashion_mnist_full

or `make study-full`. It trains 108 networks, ResNet-20 of He et al. 2016, on
the 60,000 training images of Fashion-MNIST, which are not part of this package:
Debian's `dataset-fashion-mnist` has them, or see
`sos.datasets.fashion_mnist.load_full`. On the embedded 6,000 images it runs
with `--config.dataset=fashion_mnist`.

With other work on the same 2 CPU cores a step took 0.3 seconds, with L0 0.4 and
with variational dropout 0.8, so that all of it takes about two days there;
Ctrl-C and the same command continue it. It has not been run from end to end.
What was run, with seed 0, is 1,000 steps of the dense network, which gave a
test accuracy of 92.1 %, and of magnitude pruning to 90 %, which gave 90.5 %;
and 500 steps with a penalty, which are too few for variational dropout beside
batch normalization: L0 gave 87.4 % at 89 % sparsity, variational dropout 48 %
at 78 %.
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
    # Eight and a half epochs.
    config.steps = 4000
    for name in ("magnitude", "magnitude_dense_first", "random"):
        config[name].sparsities = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
    # Both sweeps are coarse: they were laid around what one penalty for each
    # gave in 500 and 1,000 steps, at higher learning rates of log alpha and
    # log sigma^2 in return.
    config.variational_dropout.penalties = (0.1, 0.3, 1.0, 2.0, 4.0, 8.0, 16.0)
    # There are steps enough to come from the technique's default.
    config.variational_dropout.arguments.initial_log_sigma2 = -10.0
    config.l0.penalties = (1.0, 3.0, 6.0, 12.0, 25.0, 50.0, 100.0)
    config.l0.learning_rate_multiplier = 3.0
    return config
