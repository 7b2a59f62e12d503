"""Reproducible side-by-side measurements."""

import os

# TensorFlow measures and lowers on the CPU in all benchmarks. Other processes
# may use the GPUs that the user chose, all if none.
os.environ.setdefault(
    "BENCHMARKS_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all")
)
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

# Before any benchmark imports TensorFlow, to hide its start-up lines.
from sos import startup

with startup.quiet():
    import tensorflow as tf

    tf.config.list_physical_devices()
