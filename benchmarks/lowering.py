"""Lowers functions to StableHLO modules that run without TensorFlow."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from benchmarks.recipes import Recipe, describe


def specs(data: Sequence[Recipe]) -> list[tf.TensorSpec]:
    """Returns the specs of tensors that the recipes make."""
    return [tf.TensorSpec(recipe.shape, recipe.dtype) for recipe in data]


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A lowered function.

    Attributes:
        module: StableHLO bytecode: a function of data followed by variables. It
            returns what the function returns, followed by the new values of the
            variables that it assigns.
        data: Recipes of the data.
        variables: The variables.
    """

    module: bytes
    data: list[Recipe]
    variables: list[tf.Variable]

    def arguments(self) -> list[Recipe]:
        """Returns recipes of all arguments, from the variables' values."""
        variables = [
            describe(variable.name, variable.numpy())
            for variable in self.variables
        ]
        return [*self.data, *variables]

    def save(
        self, folder: pathlib.Path, name: str, metadata: dict[str, Any]
    ) -> None:
        """Writes the module and what its caller must know.

        Args:
            folder: Existing directory.
            name: Name of the files in it, without a suffix.
            metadata: JSON values to store.
        """
        recipes = [dataclasses.asdict(recipe) for recipe in self.arguments()]
        (folder / f"{name}.mlirbc").write_bytes(self.module)
        (folder / f"{name}.json").write_text(
            json.dumps({**metadata, "arguments": recipes}), "utf-8"
        )


def lower(function: Any, data: Sequence[Recipe]) -> Lowered:
    """Traces and lowers a function.

    Args:
        function: A `tf.function` with `jit_compile=True`, of tensors.
        data: Recipes of its arguments.
    """
    tensors = specs(data)
    # Traced only once: the second line finds it.
    traced = function.get_concrete_function(*tensors)
    compiler_ir = function.experimental_get_compiler_ir(*tensors)
    handles = {id(variable.handle): variable for variable in traced.variables}
    return Lowered(
        compiler_ir(stage="stablehlo_serialized", platform_name="CPU"),
        list(data),
        [handles[id(captured)] for captured in traced.captured_inputs],
    )


def run_steps(
    function: Any, lowered: Lowered, steps: int
) -> list[list[np.ndarray]]:
    """Runs the function in TensorFlow on what the recipes make.

    Args:
        function: The function, compiled or not.
        lowered: The result of `lower`. Its variables are assigned.
        steps: Number of calls, each on the same data.

    Returns:
        The values of the variables after each step.
    """
    arrays = [
        recipe.make(seed) for seed, recipe in enumerate(lowered.arguments())
    ]
    count = len(lowered.data)
    for variable, array in zip(lowered.variables, arrays[count:], strict=True):
        variable.assign(array)
    data = [tf.constant(array) for array in arrays[:count]]
    values = []
    for _ in range(steps):
        function(*data)
        values.append([variable.numpy() for variable in lowered.variables])
    return values
