"""Data sets for the experiments. Small ones are part of the package."""

from sos.datasets import (
    fashion_mnist,
    imagenet,
    libreoffice_help,
    subwords,
    translation,
)
from sos.datasets.writer import write_images

__all__ = [
    "fashion_mnist",
    "imagenet",
    "libreoffice_help",
    "subwords",
    "translation",
    "write_images",
]
