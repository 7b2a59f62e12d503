"""Reproducible side-by-side measurements."""

import os

# All benchmarks measure on the CPU.
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

# Before any benchmark imports TensorFlow, to hide its start-up lines.
from sos import startup

with startup.quiet():
    import tensorflow as tf

    tf.config.list_physical_devices()
