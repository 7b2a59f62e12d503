"""Data sets for the experiments. Small ones are part of the package."""

from sos.datasets import fashion_mnist

__all__ = ["fashion_mnist"]
