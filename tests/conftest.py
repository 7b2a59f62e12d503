"""What all tests share: a quiet TensorFlow on the CPU, patient Hypothesis."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import hypothesis

# The first example pays for traces and compilations, and machines differ.
hypothesis.settings.register_profile(
    "sos", deadline=None, derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("sos")
