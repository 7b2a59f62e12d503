"""Configuration of all tests.

TensorFlow is quiet and sees the CPU as two devices, for MirroredStrategy;
Hypothesis has no deadline; garbage is collected less often.
"""

import gc
import os
import signal

# A shell starts what it runs in the background with Ctrl-C ignored, and so
# would be the programs that the tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import hypothesis

from sos import startup

with startup.quiet():
    import tensorflow as tf

    # Devices can be configured only before TensorFlow starts.
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * 2,
    )

# The first example pays for traces and compilations, and machines differ.
hypothesis.settings.register_profile(
    "sos", deadline=None, derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("sos")


def pytest_collection_finish():
    # A full collection visits all objects. Where the machine has reclaimed
    # their memory since, it can take a minute: leave out those of imported
    # modules, and collect the others less often.
    gc.collect()
    gc.freeze()
    gc.set_threshold(700, 10, 500)
