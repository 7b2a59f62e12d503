"""Data sets for the experiments, the small ones embedded in the package."""

from sos.datasets import fashion_mnist

__all__ = ["fashion_mnist"]
