"""Recipes of random arrays, which make the same array in every process.

Modules that run elsewhere take arrays as large as a network; instead of these
their recipes are stored. Needs only NumPy, as the compilers' environments have
no TensorFlow.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to make an array.

    Attributes:
        name: Name of the array.
        shape: Its shape.
        dtype: Its dtype. "bfloat16" needs the package ml_dtypes imported.
        kind: "normal", "integers", "mask" or "values".
        parameters: Mean and standard deviation of "normal"; the bounds, the
            upper one exclusive, of "integers"; the fraction of ones in a
            "mask"; one value, or all in C order, of "values".
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str
    parameters: tuple[float, ...]

    def make(self, seed: int) -> np.ndarray:
        """Makes the array.

        Args:
            seed: Seed of random values.
        """
        rng = np.random.default_rng(seed)
        if self.kind == "normal":
            mean, deviation = self.parameters
            values = rng.standard_normal(self.shape, np.float32)
            values = values * np.float32(deviation) + np.float32(mean)
        elif self.kind == "integers":
            values = rng.integers(*self.parameters, self.shape)
        elif self.kind == "mask":
            (density,) = self.parameters
            values = rng.random(self.shape, np.float32) < density
        elif len(self.parameters) == 1:
            values = np.full(self.shape, self.parameters[0])
        else:
            values = np.reshape(self.parameters, self.shape)
        return np.asarray(values).astype(self.dtype)


def describe(name: str, array: np.ndarray) -> Recipe:
    """Returns a recipe of arrays like this one.

    Args:
        name: Name of the array.
        array: Initial value of a variable.

    Returns:
        A recipe of the same values if all are equal or there are few, of a mask
        for other uint8 values, and of normal values of the same mean and
        standard deviation for other floats.

    Raises:
        ValueError: If the array is none of these.
    """
    shape, dtype = array.shape, array.dtype.name
    flat = array.reshape(-1)
    if array.size <= 16 or (flat == flat[0]).all():
        different = len(set(flat.tolist())) > 1
        values = flat.tolist() if different else flat[:1].tolist() or [0]
        return Recipe(name, shape, dtype, "values", tuple(values))
    if array.dtype == np.uint8:
        return Recipe(name, shape, dtype, "mask", (float(flat.mean()),))
    if array.dtype.kind in "iub":
        raise ValueError(
            f"There is no recipe for {name!r} of dtype {dtype} and shape "
            f"{shape}."
        )
    flat = flat.astype(np.float64)
    parameters = (float(flat.mean()), float(flat.std()))
    return Recipe(name, shape, dtype, "normal", parameters)
