"""Helpers of config files with the best published settings of the study.

A setting is a named tuple with `begin_step` and `end_step`, and for pruning
`frequency`, in the steps of the training for which the authors chose them. They
scale with `config.train_steps`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import ml_collections

from configs.arguments import Overrides
from sos.errors import UsageError

T = TypeVar("T")

#: Hyperparameters of pruning that are steps.
PRUNING_STEPS = ("begin_step", "end_step", "frequency")


def distinct(runs: Iterable[Overrides]) -> Iterator[Overrides]:
    """Yields overrides, equal ones once.

    A short training rounds different steps to the same ones.
    """
    seen = set()
    for overrides in runs:
        text = repr(overrides)
        if text not in seen:
            seen.add(text)
            yield overrides


def find_pruning(
    config: ml_collections.ConfigDict,
    name: str,
    settings: Mapping[float, T],
    values: Mapping[str, Any],
    *,
    reference_steps: int,
    format_rest: Callable[[T], str],
) -> T | None:
    """Returns the published setting of a pruning technique.

    Args:
        config: A dense config.
        name: The technique.
        settings: The published settings by sparsity.
        values: `sparsity` and hyperparameters.
        reference_steps: Training steps for which the settings were chosen.
        format_rest: Formats the other arguments of a setting, for the example
            in the error.

    Returns:
        The setting; None if there is none, but all hyperparameters are given.

    Raises:
        UsageError: If there is none, and a hyperparameter is missing.
    """
    sparsity = values["sparsity"]
    if _is_in(sparsity, settings):
        return settings[sparsity]
    if all(step in values for step in PRUNING_STEPS):
        return None
    text = ""
    if isinstance(sparsity, int | float):
        nearest = min(settings, key=lambda key: abs(key - sparsity))
        setting = settings[nearest]
        steps = scaled_pruning_steps(config, setting, reference_steps)
        arguments = ",".join(f"{key}={steps[key]}" for key in PRUNING_STEPS)
        text = (
            f", such as those of {nearest} in {config.train_steps} steps: "
            f"{name},sparsity={sparsity},{arguments}{format_rest(setting)}"
        )
    raise UsageError(
        f"There is no published setting of {name} with this sparsity, only "
        f"with {_numbers(settings)}. For another one also pass begin_step, "
        f"end_step and frequency{text}. Received: sparsity={sparsity!r}"
    )


def find_penalty(
    name: str, settings: Mapping[float, T], values: dict[str, Any]
) -> T:
    """Returns the published setting of a technique with a penalty.

    Args:
        name: The technique.
        settings: The published settings by sparsity.
        values: `sparsity`, by default 0.9, and hyperparameters. `sparsity` is
            removed: it is not a hyperparameter, because the penalty determines
            it.

    Returns:
        The setting.

    Raises:
        UsageError: If there is no such setting.
    """
    sparsity = values.pop("sparsity", 0.9)
    if _is_in(sparsity, settings):
        return settings[sparsity]
    raise UsageError(
        f"`sparsity` selects a published setting of {name}: "
        f"{_numbers(settings)}. For another sparsity pass penalty_weight, "
        "begin_step and end_step instead. "
        f"Received: sparsity={sparsity!r}"
    )


def scaled_pruning_steps(
    config: ml_collections.ConfigDict, setting: Any, reference_steps: int
) -> dict[str, int]:
    """Returns the steps of a setting, scaled with `train_steps`."""
    scale = config.train_steps / reference_steps
    return {
        **scaled_window(config, setting, reference_steps),
        "frequency": max(1, round(scale * setting.frequency)),
    }


def scaled_window(
    config: ml_collections.ConfigDict, setting: Any, reference_steps: int
) -> dict[str, int]:
    """Returns `begin_step` and `end_step`, scaled with `train_steps`."""
    scale = config.train_steps / reference_steps
    begin = round(scale * setting.begin_step)
    end = max(begin + 1, round(scale * setting.end_step))
    return {"begin_step": begin, "end_step": end}


def _is_in(sparsity: Any, settings: Mapping[float, Any]) -> bool:
    # Of any other type it may have no hash.
    return isinstance(sparsity, int | float) and sparsity in settings


def _numbers(settings: Mapping[float, Any]) -> str:
    return ", ".join(map(str, settings))
