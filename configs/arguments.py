"""Arguments of the config files, `--config=FILE:NAME,KEY=VALUE,...`.

The name is that of a technique, or with `parent=DIRECTORY` that of a branch
(see `sos.experiments.branch`).
"""

from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

from sos.arguments import check_integer
from sos.errors import UsageError
from sos.experiments import branch, parse_argument
from sos.experiments.config import resolve

#: Values that override those of a config, as nested mappings.
Overrides = dict[str, Any]
#: By name, functions that take a dense config and the technique's
#: hyperparameters, as keywords, and return overrides.
Techniques = Mapping[str, Callable[..., Overrides]]


def make_config(
    arg: str, config: ml_collections.ConfigDict, techniques: Techniques
) -> ml_collections.ConfigDict:
    """Applies the argument of a config file to a config.

    Args:
        arg: A technique and values, such as `magnitude,sparsity=0.9,seed=1`, or
            a branch and values, such as `scratch,parent=DIRECTORY`. The default
            is `dense`.
        config: A dense config. It is modified.
        techniques: The techniques.

    Returns:
        The config.

    Raises:
        UsageError: If `arg` has another form, or a name or value is invalid.
    """
    name, values = parse_argument(arg, default="dense")
    if "parent" in values:
        # Everything else is the parent's.
        return resolve(branch(str(values.pop("parent")), name, **values))
    if name not in techniques:
        raise UsageError(
            f"The technique must be one of {', '.join(techniques)}, or a "
            f"branch with `parent=DIRECTORY`. Received: {name!r}"
        )
    for key, minimum in (("seed", 0), ("train_steps", 1)):
        value = values.pop(key, config[key])
        config[key] = check_integer(key, value, minimum=minimum)
    config.update(techniques[name](config, **values))
    return config


def check_dense(config: ml_collections.ConfigDict) -> None:
    """Raises `UsageError` if the config of a sweep has a technique.

    Args:
        config: The config that the sweep is to vary.
    """
    if config.sparsity.technique is not None:
        # Its overrides other than `sparsity` would be in all runs.
        raise UsageError(
            "The sweep chooses the techniques: remove the argument of --config "
            "after the colon, or select runs with --select. Received: "
            f"{config.sparsity.technique}"
        )


def dense(config: ml_collections.ConfigDict, /, **values: Any) -> Overrides:
    """Returns the overrides of a network without a technique.

    Args:
        config: A dense config.
        **values: Entries of `config.sparsity`.
    """
    del config
    return {"sparsity": {"technique": None, **values}}
