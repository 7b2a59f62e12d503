"""Branches: runs that start from the masks of a finished run, the trunk.

Gale, Elsen and Hooker (2019, arXiv 1902.09574) ask whether a sparse network
needs the weights that pruning found, or only the mask. Each class here is one
of their experiments or a control for them. `branch` makes the config of such a
run.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import keras
import ml_collections
import numpy as np

import sos
from sos.arguments import check_integer, check_number, format_values
from sos.errors import UsageError
from sos.experiments import branch_registry
from sos.experiments import config as config_lib
from sos.experiments.branch_registry import Branch, register
from sos.experiments.trunk import Trunk, read_resolved_config
from sos.model_masks import set_masks
from sos.training.learning_rates import lengthen
from sos.wrappers.base import weights_by_path
from sos.wrappers.fixed_mask import FixedMask, random_mask
from sos.wrappers.masked import PruningWrapper

# Added to the seed of a trunk, to draw fresh weights. Studies number their
# seeds from 0.
_SEED_OFFSET = 1000


def branch(
    trunk: Mapping[str, Any] | str | os.PathLike,
    name: str,
    *,
    seed: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Makes the config of a run that starts from a finished run, its trunk.

    Args:
        trunk: The config of the trunk, which may be trained later, or the
            directory of a run.
        name: Name of the branch; see `sos.experiments.branches`.
        seed: Seed of the run. Default: the trunk's seed for a lottery ticket,
            the trunk's plus 1000 for branches with fresh weights.
        **options: Options of the branch, and for "transferred_profile" the
            `technique` and its hyperparameters.

    Returns:
        The entries of the run, as nested mappings for `expand` and `run`. Those
        that the branch does not change are the trunk's.

    Raises:
        UsageError: If the branch or an option is unknown or invalid, the trunk
            is dense or will not keep a checkpoint that the branch needs, the
            directory has no run or another name than its run, or the seed
            would give the trunk's weights again.
        StorageError: If the config of the run is damaged or cannot be read.

    Example:
    >>> import sos.experiments
    >>> trunk = sos.experiments.config.resolve({
    ...     "task": "models.fashion_mnist:FashionMnist",
    ...     "sparsity": {"technique": "MagnitudePruning", "sparsity": 0.9},
    ... })
    >>> scratch = sos.experiments.branch(trunk, "scratch", multiplier=2)
    >>> scratch["label"], scratch["train_steps"], scratch["seed"]
    ('scratch-b', 1400, 1000)
    >>> ticket = sos.experiments.branch(trunk, "lottery_ticket")
    >>> ticket["parent"] == sos.experiments.config.run_name(trunk)
    True
    """
    values, parent = _read_trunk(trunk)
    cls = branch_registry.get_branch(name)
    hyperparameters = {}
    if cls.takes_hyperparameters:
        own = branch_registry.options(name)
        hyperparameters = {k: options.pop(k) for k in {*options} - {*own}}
    entries = {"name": name, **options}
    made = branch_registry.make(entries)
    if seed is None:
        seed = values["seed"] + (_SEED_OFFSET if cls.fresh else 0)
    if cls.fresh and seed == values["seed"]:
        raise UsageError(
            f"The branch {name!r} needs fresh weights, so another seed than "
            f"its trunk. Received: seed={seed} for both"
        )
    return {
        **values,
        "keep_steps": [],
        "label": name.replace("_", " "),
        **made.overrides(values, **hyperparameters),
        "seed": seed,
        "parent": parent,
        "branch": entries,
    }


def _read_trunk(
    trunk: Mapping[str, Any] | str | os.PathLike,
) -> tuple[dict[str, Any], str]:
    """Returns the config of a trunk, and the entry `parent` of its branches."""
    parent = None
    if isinstance(trunk, str | os.PathLike):
        parent = os.path.expanduser(os.fspath(trunk))
        config = read_resolved_config(parent)
        if config is None:
            raise UsageError(
                "`trunk` must be a config or the directory of a run. There is "
                f"no run in {parent!r}"
            )
    else:
        config = config_lib.resolve(trunk)
    name = config_lib.run_name(config)
    values = config_lib.plain(config)
    if values["sparsity"]["technique"] is None and not any(
        rule for _, rule in values["sparsity"]["rules"]
    ):
        raise UsageError(
            "`trunk` must be a run with sparse weights. "
            f"Received: the dense run {name}"
        )
    return values, parent or name


@register("scratch")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Scratch(Branch):
    """Trains the trunk's masks from fresh weights: scratch-e and scratch-b.

    Scratch-e trains as long as the trunk, scratch-b longer (Liu et al. 2019,
    arXiv 1810.05270).

    Attributes:
        multiplier: Number of steps as a multiple of the trunk's, at least 1.
        learning_rate: How the learning rate of `config.learning_rate` is
            lengthened; see `sos.training.learning_rates.lengthen`. With "scale"
            a task may also have a rate of its own.
    """

    multiplier: float = 1.0
    learning_rate: str = "scale"

    # Of a training as long as the trunk's, and of a longer one.
    _labels: ClassVar[tuple[str, str]] = ("scratch-e", "scratch-b")

    def __post_init__(self) -> None:
        """Checks the options."""
        check_number("multiplier", self.multiplier, "[1, inf)")
        if self.multiplier == 1 and self.learning_rate not in (
            "scale",
            "drop_from_start",
        ):
            raise UsageError(
                "The option `learning_rate` of a branch that trains as long as "
                "its trunk must be 'scale' or 'drop_from_start': no step is "
                "left at which to hold or to drop the last rate. Received: "
                f"learning_rate={self.learning_rate!r}, multiplier=1"
            )

    def overrides(self, trunk: dict[str, Any]) -> dict[str, Any]:
        """Returns the label, the longer training and fixed masks."""
        rate, steps = trunk["learning_rate"], trunk["train_steps"]
        scaled = self.learning_rate == "scale"
        label = self._labels[self.multiplier > 1]
        # As published. Other lengths are other curves in figures.
        if self.multiplier not in (1, 2):
            label += f", {self.multiplier:g} times as long"
        if not scaled:
            label += f", {self.learning_rate.replace('_', ' ')}"
        if "schedule" not in rate and not scaled:
            raise UsageError(
                "The option `learning_rate` must be 'scale' for a task whose "
                "config has no `learning_rate.schedule`. "
                f"Received: learning_rate={self.learning_rate!r}"
            )
        if "schedule" in rate:
            rate = lengthen(
                rate,
                train_steps=steps,
                multiplier=self.multiplier,
                variant=self.learning_rate,
            )
        return {
            **super().overrides(trunk),
            "label": label,
            "train_steps": round(self.multiplier * steps),
            "learning_rate": rate,
        }

    def initialize(
        self,
        trunk: Trunk,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
        *,
        config: ml_collections.ConfigDict,
    ) -> None:
        """Sets the trunk's masks, after checking steps and weights."""
        steps = round(self.multiplier * trunk.config.train_steps)
        if config.train_steps != steps:
            # An override of one entry leaves the others as they were.
            raise UsageError(
                f"A branch with multiplier={self.multiplier} of a run of "
                f"{trunk.config.train_steps} steps must train for {steps}. "
                f"Received: config.train_steps={config.train_steps}. Make the "
                "config with `sos.experiments.branch(..., multiplier=...)`."
            )
        masks = _fixed_masks(trunk, model)
        _check_fresh(trunk, model, optimizer)
        set_masks(model, masks)


@register("augmented_init")
@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentedInit(Scratch):
    """As `Scratch`, with the variance of the weights divided by the density.

    Fewer inputs of a unit than its initializer counts would let activations
    shrink. Each fresh weight is multiplied by density^-1/2, where the density
    is the fraction of kept elements of its tensor. This divides the variance of
    all initializers with mean 0 by the density: Glorot, He, LeCun, uniform,
    normal, truncated normal and orthogonal ones. A tensor without kept elements
    stays as it is.

    The authors' Transformer does the same. Their ResNet-50 also changes the
    distributions: convolutions get variance 2 / (fan_out * density) instead of
    1 / fan_in, and the last layer Glorot's uniform distribution, scaled,
    instead of a normal one of standard deviation 0.01. Both take the nominal
    density for all layers, this branch that of each mask.
    """

    _labels: ClassVar[tuple[str, str]] = (
        "augmented init",
        "augmented init, scratch-b",
    )

    def initialize(
        self,
        trunk: Trunk,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
        *,
        config: ml_collections.ConfigDict,
    ) -> None:
        """Sets the trunk's masks and scales the fresh weights."""
        super().initialize(trunk, model, optimizer, config=config)
        for path, weight in weights_by_path(model).items():
            density = np.mean(trunk.masks[path])
            if density > 0:
                value = keras.ops.convert_to_numpy(weight.value)
                scale = np.asarray(density**-0.5, value.dtype)
                weight.variable.assign(value * scale)


@register("lottery_ticket")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LotteryTicket(Branch):
    """Trains the trunk's masks from the trunk's own initial weights.

    With `step=0` this is the lottery ticket of Frankle and Carbin (2019, arXiv
    1803.03635); with a later step it is rewound (Frankle et al. 2020, arXiv
    1912.05671): training goes on at that step, with the weights, batch
    statistics and random states that the trunk had then, the optimizer slots of
    the same variables, and the trunk's data and learning rate.

    Attributes:
        step: Step of the trunk's checkpoint.
    """

    fresh: ClassVar[bool] = False

    step: int = 0

    def __post_init__(self) -> None:
        """Checks the step."""
        check_integer("step", self.step, minimum=0)

    @property
    def first_step(self) -> int:
        """Step at which training begins."""
        return self.step

    def overrides(self, trunk: dict[str, Any]) -> dict[str, Any]:
        """Returns fixed masks and, if it is rewound, the label.

        Raises:
            UsageError: If the trunk will not have or keep the checkpoint.
        """
        first = config_lib.first_step(trunk)
        if self.step < first:
            raise UsageError(
                f"The trunk begins at step {first}, and a lottery ticket of it "
                f"there or later. Received: step={self.step}"
            )
        kept = set(trunk["keep_steps"])
        if trunk["keep"] != "none":
            kept |= {first, trunk["train_steps"]}
        if trunk["keep"] != "all" and self.step not in kept:
            raise UsageError(
                "The trunk must keep the checkpoint from which a lottery "
                f"ticket starts: set its `keep_steps=({self.step},)`. If it is "
                "finished, move its directory away and train it again. "
                f"Received: step={self.step}, and a trunk that keeps the steps "
                f"{sorted(kept)}"
            )
        entries = super().overrides(trunk)
        if self.step:
            entries["label"] = f"lottery ticket, rewound to {self.step}"
        return entries

    def check(self, config: Mapping[str, Any]) -> None:
        """Raises `UsageError` if no step would be left to train."""
        super().check(config)
        if self.step >= config["train_steps"]:
            raise UsageError(
                "`config.branch.step` must be below `train_steps`. Received: "
                f"step={self.step}, train_steps={config['train_steps']}"
            )

    def initialize(
        self,
        trunk: Trunk,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
        *,
        config: ml_collections.ConfigDict,
    ) -> None:
        """Sets the trunk's masks and the values of its checkpoint."""
        masks = _fixed_masks(trunk, model)
        values = trunk.values_for(self.step, model, optimizer)
        set_masks(model, masks)
        for variable, value in values:
            variable.assign(value)


@register("random_mask")
@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomMask(Branch):
    """Trains random masks with as many elements per weight as the trunk's.

    The weights are fresh. It tells how much of a result is due to the sparsity
    of each layer alone.
    """

    def initialize(
        self,
        trunk: Trunk,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
        *,
        config: ml_collections.ConfigDict,
    ) -> None:
        """Sets the masks, a function of the seed and the weights' paths."""
        masks = {
            path: random_mask(path, mask.shape, int(mask.sum()), config.seed)
            for path, mask in _fixed_masks(trunk, model).items()
        }
        set_masks(model, masks)


@register("transferred_profile")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferredProfile(Branch):
    """Prunes fresh weights to the trunk's sparsity of each weight.

    `branch` takes the `technique`, magnitude pruning by default, and its
    hyperparameters. If the trunk is pruned, too, they default to the trunk's.
    The sparsity of each weight is that of the trunk's mask; the hyperparameter
    `sparsity` only names the run in tables.
    """

    takes_hyperparameters: ClassVar[bool] = True

    def overrides(
        self,
        trunk: dict[str, Any],
        *,
        technique: str = "MagnitudePruning",
        **hyperparameters: Any,
    ) -> dict[str, Any]:
        """Returns the label and the technique."""
        if not _is_pruning(technique):
            raise UsageError(
                "`technique` must be a pruning technique, whose `sparsity` the "
                f"trunk determines. Received: technique={technique!r}"
            )
        inherited = {}
        if _is_pruning(trunk["sparsity"]["technique"]):
            inherited = sos.extend.select_hyperparameters(
                technique, trunk["sparsity"]
            )
        name = config_lib.snake_case(technique).replace("_", " ")
        return {
            "label": f"{name}, profile of {config_lib.label(trunk)}",
            "sparsity": {
                "technique": technique,
                "rules": [],
                **inherited,
                **hyperparameters,
            },
        }

    def sparsify_arguments(
        self, trunk: Trunk, arguments: dict[str, Any]
    ) -> dict[str, Any]:
        """Returns a rule for each weight of the trunk's masks."""
        del arguments["rules"]
        # Also of a technique that ranks across weights. It may prune a whole
        # weight, if the trunk did.
        arguments["ranking"] = sos.extend.PerTensorRanking(min_kept=0)
        rules = []
        for path, mask in trunk.masks.items():
            # Below 1, which no schedule accepts; it rounds to the same number.
            sparsity = min(1 - np.mean(mask), np.nextafter(1.0, 0.0))
            rule = {**arguments, "sparsity": float(sparsity)}
            rules.append((f"^{re.escape(path)}$", rule))
        return {"technique": None, "rules": rules}

    def initialize(
        self,
        trunk: Trunk,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
        *,
        config: ml_collections.ConfigDict,
    ) -> None:
        """Checks that the masks are of this model."""
        trunk.masks_for(model)


def _is_pruning(technique: str | None) -> bool:
    cls = sos.extend.techniques().get(technique)
    return cls is not None and issubclass(cls, PruningWrapper)


def _fixed_masks(trunk: Trunk, model: keras.Model) -> dict[str, np.ndarray]:
    """Returns the trunk's masks for a model that keeps them in training."""
    masks = trunk.masks_for(model)
    others = sorted(
        {
            type(weight.technique).__name__
            for weight in weights_by_path(model).values()
            if not isinstance(weight.technique, FixedMask)
        }
    )
    if others:
        raise UsageError(
            "The branch needs the technique 'FixedMask' for all weights in "
            "`config.sparsity`; others would change the trunk's masks. "
            f"Received: {format_values(others)}"
        )
    return masks


def _check_fresh(
    trunk: Trunk, model: keras.Model, optimizer: keras.optimizers.Optimizer
) -> None:
    """Raises `UsageError` if a model has the trunk's initial weights."""
    if 0 not in trunk.steps:
        return
    sparse = {id(w.variable) for w in weights_by_path(model).values()}
    if all(
        np.array_equal(keras.ops.convert_to_numpy(variable), value)
        for variable, value in trunk.values_for(0, model, optimizer)
        if id(variable) in sparse
    ):
        raise UsageError(
            "The weights of this branch must be fresh, but they are the "
            f"initial weights of {trunk.directory}: it would be a lottery "
            f"ticket. Use another `config.seed` than {trunk.config.seed}, and "
            "make initial weights depend on it, or the branch "
            "'lottery_ticket'."
        )
