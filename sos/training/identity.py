"""What a checkpoint is of: which variables, under which configuration."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import keras

_COUNTS = re.compile(r"_\d+(?=[/_]|$)")


def uncounted(path: str) -> str:
    """The path of a variable without the numbers in its names.

    Keras numbers layers without a name, optimizers and seed generators through
    all of a process, so that the second model of one kind has other paths.
    """
    return _COUNTS.sub("", path)


def described(
    model: keras.Model, optimizer: keras.optimizers.Optimizer
) -> dict[str, str]:
    """What variables there are.

    Args:
        model: The model.
        optimizer: Its optimizer, built.

    Returns:
        The dtype and shape of each variable, by a path that is the same in
        every process; "(2)" and so on follow a path that stands for several.
    """
    found: dict[str, str] = {}
    prefix = f"{optimizer.name}/"
    named = [(uncounted(v.path), v) for v in model.variables] + [
        (f"optimizer/{uncounted(v.path.removeprefix(prefix))}", v)
        for v in optimizer.variables
    ]
    for path, variable in named:
        name, count = path, 1
        while name in found:
            count += 1
            name = f"{path} ({count})"
        shape = "x".join(str(size) for size in variable.shape) or "scalar"
        found[name] = f"{variable.dtype} {shape}"
    return found


def differences(
    saved: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> Iterator[str]:
    """Tells two descriptions or configurations apart.

    Args:
        saved: That of a checkpoint.
        now: That of the training which reads it.
        prefix: What to put in front of names.

    Yields:
        A line for each difference, such as `rate: 0.1 there, 0.2 now`.
    """
    for name in sorted({*saved, *now}):
        if name not in now:
            yield f"{prefix}{name}: {saved[name]!r} there, absent now"
        elif name not in saved:
            yield f"{prefix}{name}: absent there, {now[name]!r} now"
        elif isinstance(saved[name], dict) and isinstance(now[name], dict):
            yield from differences(saved[name], now[name], f"{prefix}{name}.")
        elif saved[name] != now[name]:
            yield f"{prefix}{name}: {saved[name]!r} there, {now[name]!r} now"
