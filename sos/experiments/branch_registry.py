"""Registry of branches by name, and their base class."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import keras
import ml_collections

from sos.arguments import format_values
from sos.errors import UsageError

if TYPE_CHECKING:
    # It reads configs, whose module imports this one.
    from sos.experiments.trunk import Trunk

_branches: dict[str, type["Branch"]] = {}

T = TypeVar("T", bound=type["Branch"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Branch:
    """How a run starts from a finished run, its trunk.

    A subclass is a dataclass. Its fields are the branch's options, which have
    defaults and are JSON values. It has two sides: `overrides` makes the config
    of the run, `initialize` the values that it starts from.

    Attributes:
        fresh: Whether the initial weights are drawn anew, with another seed
            than the trunk's.
        takes_hyperparameters: Whether `overrides` takes hyperparameters.

    Example: a branch that continues the training of the trunk's last weights.
    >>> import dataclasses, sos.experiments
    >>> from sos.experiments.branches import LotteryTicket
    >>> from sos.experiments.branch_registry import register
    >>> @register("tuned")
    ... @dataclasses.dataclass(frozen=True, kw_only=True)
    ... class Tuned(LotteryTicket):
    ...     steps: int = 100
    ...
    ...     def overrides(self, trunk):
    ...         entries = {"train_steps": trunk["train_steps"] + self.steps}
    ...         return {**super().overrides(trunk), **entries}
    >>> trunk = sos.experiments.config.resolve({
    ...     "task": "models.fashion_mnist:FashionMnist",
    ...     "sparsity": {"technique": "MagnitudePruning", "sparsity": 0.9},
    ... })
    >>> sos.experiments.branch(trunk, "tuned", step=700)["train_steps"]
    800
    """

    fresh: ClassVar[bool] = True
    takes_hyperparameters: ClassVar[bool] = False

    @property
    def first_step(self) -> int:
        """Step at which training begins."""
        return 0

    def overrides(self, trunk: dict[str, Any]) -> dict[str, Any]:
        """Returns the entries of the run that differ from the trunk's.

        Args:
            trunk: The resolved config of the trunk as plain mappings.

        Returns:
            `sparsity`, `label` (the name of the branch by default) and others,
            but not `parent`, `branch` and `seed`. By default the same weights
            get fixed masks.
        """
        rules = trunk["sparsity"]["rules"]
        return {
            "sparsity": {
                "technique": trunk["sparsity"]["technique"] and "FixedMask",
                "rules": [[key, rule and "FixedMask"] for key, rule in rules],
            }
        }

    def check(self, config: Mapping[str, Any]) -> None:
        """Raises `UsageError` if the config of the run does not fit.

        Args:
            config: The complete config.
        """
        if config["parent"] is None:
            raise UsageError(
                "`config.branch` requires `config.parent`, the run to start "
                f"from. Received: branch={dict(config['branch'])}, parent=None"
            )

    def sparsify_arguments(
        self, trunk: "Trunk", arguments: dict[str, Any]
    ) -> dict[str, Any]:
        """Returns the arguments of `sos.sparsify`, whenever a model is built.

        Args:
            trunk: The trunk.
            arguments: Those of `config.sparsity`.
        """
        del trunk
        return arguments

    def initialize(
        self,
        trunk: "Trunk",
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
        *,
        config: ml_collections.ConfigDict,
    ) -> None:
        """Sets the initial values of a run; see `Task.initialize`.

        It checks everything before a value changes.

        Args:
            trunk: The trunk.
            model: The new sparse model.
            optimizer: Its optimizer, built.
            config: The resolved config of the run.
        """


def register(name: str) -> Callable[[T], T]:
    """Registers a branch; a decorator of subclasses of `Branch`.

    Args:
        name: Name of the branch, in configs and names of runs.

    Returns:
        The decorator, which returns the class unchanged.

    Raises:
        UsageError: If a class of another module has that name.
    """

    def decorator(branch: T) -> T:
        known = _branches.get(name)
        # A class may be defined again, as in a notebook cell.
        if known is not None and known.__module__ != branch.__module__:
            raise UsageError(
                f"A branch named {name!r} is registered already, by "
                f"{known.__module__}. Choose another name."
            )
        _branches[name] = branch
        return branch

    return decorator


def branches() -> dict[str, type[Branch]]:
    """Returns the registered branches by name, in order of registration.

    Example:
    >>> import sos.experiments
    >>> "lottery_ticket" in sos.experiments.branch_registry.branches()
    True
    """
    return dict(_branches)


def get_branch(name: str) -> type[Branch]:
    """Returns a registered branch.

    Args:
        name: Its name.

    Raises:
        UsageError: If it is not registered.
    """
    if not isinstance(name, str) or name not in _branches:
        raise UsageError(
            f"`config.branch.name` must be one of {format_values(_branches)}. "
            f"Received: {name!r}"
        )
    return _branches[name]


def options(name: str | None) -> dict[str, Any]:
    """Returns the options of a branch with their defaults.

    Args:
        name: Name of a branch; None for a run without one.

    Raises:
        UsageError: If the name is not registered.
    """
    if name is None:
        return {}
    return {
        field.name: field.default
        for field in dataclasses.fields(get_branch(name))
    }


def make(entries: Mapping[str, Any]) -> Branch | None:
    """Makes the branch that a config describes.

    Args:
        entries: The entry `branch` of a config.

    Returns:
        The branch; None for a run without one.

    Raises:
        UsageError: If the name or an option is invalid.
    """
    values = dict(entries)
    name = values.pop("name")
    valid = options(name)
    unknown = sorted(set(values) - set(valid))
    if unknown:
        raise UsageError(
            f"Valid options of the branch {name!r}: "
            f"{format_values(valid) or 'none'}. "
            f"Received: {format_values(unknown)}"
        )
    return None if name is None else get_branch(name)(**values)
