"""The training engine: estimator-style, on tf.distribute, losing no step."""
