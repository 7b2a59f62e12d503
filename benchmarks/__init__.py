"""Side-by-side measurements that anybody can run again."""

import os

# All of them measure on the CPU.
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

# Before any benchmark imports TensorFlow, whose start-up lines this hides.
from sos import startup

with startup.quiet():
    import tensorflow as tf

    tf.config.list_physical_devices()
