"""TODO."""

import ml_collections
def get_config() -> ml_collections.ConfigDict:
    D = ml_collections.ConfigDict
    c = D()
    c.techniques = "dense,magnitude,random,variational_dropout,l0"
    c.seeds = (0,)
    c.steps = 700
    c.batch_size = 128
    c.learning_rate = 5e-3
    c.keep_dense = "conv1"
    c.dense = D(dict(wrapper=None))
    for n, w in (("magnitude", "MagnitudePruning"), ("random", "RandomPruning")):
        c[n] = D(dict(wrapper=w, sparsities=(0.5, 0.7, 0.8, 0.9, 0.95, 0.98), begin=0.1, end=0.7, frequency=0.02, arguments={}))
    c.variational_dropout = D(dict(wrapper="VariationalDropout", penalties=(0.01, 0.03, 0.1, 0.3, 1.0), begin=0.1, end=0.7, learning_rate_multiplier=1.0, arguments=dict(initial_log_sigma2=-6.0, threshold=3.0)))
    c.l0 = D(dict(wrapper="L0Regularization", penalties=(0.03, 0.1, 0.3, 1.0), begin=0.1, end=0.7, learning_rate_multiplier=10.0, arguments=dict(initial_log_alpha=2.197)))
    return c
