#!/usr/bin/env python3
"""Imports everything that a TPU VM needs; `make environment-tpu` runs it.

Needs no TPU. Fails if the usual build of TensorFlow replaced that for TPUs, or
if the latter lacks an operation that `sos.training.tpu_check` relies on.
"""

import glob
import importlib
import importlib.metadata
import json
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
TABLE = ROOT / "sos" / "training" / "data" / "tpu_ops_tf2.20.json"
MODULES = (
    *("tensorflow", "keras", "sos", "models.train", "tensorflow_datasets"),
    *("tensorflow_model_optimization", "tf_keras", "tensorflow_text"),
)
# Describes a TPU to a machine that has none. Otherwise the import asks the
# metadata server of Google Cloud for it, for eight minutes.
NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


def main() -> None:
    """Prints versions and operations; exits with a message if one is wrong."""
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    has_tpu = bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))
    if not has_tpu:
        os.environ.update(NO_TPU)
    names = {
        distribution.metadata["Name"]
        for distribution in importlib.metadata.distributions()
    }
    if "tensorflow" in names:
        sys.exit(
            "The package `tensorflow` is installed, whose files replace those "
            "of tensorflow-tpu. Remove the virtual environment and make it "
            "again: make environment-tpu"
        )
    for name in ("tensorflow-tpu", "libtpu"):
        print(f"{name} {importlib.metadata.version(name)}")
    for name in MODULES:
        module = importlib.import_module(name)
        version = getattr(module, "__version__", None)
        print(f"imported {name}" + (f" {version}" if version else ""))
    missing = sorted(set(json.loads(TABLE.read_text())) - _operations())
    if missing:
        sys.exit(
            "This TensorFlow has no TPU kernels for "
            f"{len(missing)} operations: {', '.join(missing[:10])}"
        )
    print(f"The TPU compiler has every operation of {TABLE.name}.")
    if not has_tpu:
        print("This machine has no TPU.")


def _operations() -> set[str]:
    """Returns the names of the operations that the TPU compiler accepts."""
    import tensorflow as tf

    # It has no public name.
    from tensorflow.python.framework import kernels

    @tf.function(jit_compile=True, autograph=False)
    def double(x: tf.Tensor) -> tf.Tensor:
        return x + x

    # The first compilation loads the kernels.
    double.experimental_get_compiler_ir(tf.constant(1.0))(
        stage="hlo", platform_name="TPU"
    )
    return {
        kernel.op
        for kernel in kernels.get_all_registered_kernels().kernel
        if kernel.device_type == "XLA_TPU_JIT"
    }


if __name__ == "__main__":
    main()
