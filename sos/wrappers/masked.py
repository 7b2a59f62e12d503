"""Techniques that multiply weights by masks of zeros and ones."""

import dataclasses
import math
import types
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from sos import arguments, keras_compat
from sos.errors import ArgumentError, UsageError
from sos.masks import accelerator, check_not_nan
from sos.rankings import PerTensorRanking, Ranking, undecided
from sos.schedules import (
    PruningSchedule,
    Schedule,
    as_schedule,
    make_schedule,
)
from sos.wrappers import dead_weights
from sos.wrappers.base import SparseWrapper
from sos.wrappers.compiled_masks import needs_only_counts, rank_by_count
from sos.wrappers.mask_changes import (
    MaskChanges,
    count_changes,
    total_changes,
)
from sos.wrappers.mask_variable import MaskVariable
from sos.wrappers.sparse_weight import SparseWeight


class MaskedWrapper(SparseWrapper):
    """Base class of techniques that multiply weights by masks.

    The masks (1 = kept) are uint8 variables in `weight.state["mask"]`,
    initially ones. As the mask is part of the forward pass, the gradient of a
    pruned weight is exactly zero. The dense weight keeps its value, and weight
    decay and momentum act on it (Gale et al. 2019, section 3).

    Example: a technique with a fixed pattern, of every second row.
    >>> import keras, numpy as np, sos
    >>> @sos.extend.register
    ... class EvenRows(sos.extend.MaskedWrapper):
    ...     def weights_changed(self):
    ...         masks = [np.ones(w.variable.shape) for w in self.sparse_weights]
    ...         for mask in masks:
    ...             mask[1::2] = 0
    ...         self.set_masks(masks)
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> sos.sparsity_report(sos.sparsify(model, "EvenRows")).sparsity
    0.5
    """

    needs_step = False

    def build_weight(self, weight: SparseWeight) -> None:
        """Adds the mask."""
        mask = self.add_weight_state(
            weight, "mask", dtype="uint8", initializer="ones"
        )
        mask.__class__ = MaskVariable

    def training_weight(self, weight: SparseWeight) -> tf.Tensor:
        """Returns the masked weight."""
        mask = weight.state["mask"].value
        if id(weight.variable) in self._tables():
            return _masked_table(weight.value, mask)
        return weight.value * tf.cast(mask, weight.value.dtype)

    def _tables(self) -> set[int]:
        """Returns the `id` of the tables of embedding layers."""
        return {
            id(keras_compat.embeddings(layer))
            for layer in keras_compat.all_layers(self.layer)
            if isinstance(layer, keras.layers.Embedding)
        }

    def assigned_weight(
        self, weight: SparseWeight, value: tf.Tensor
    ) -> tf.Tensor:
        """Returns assigned values where the mask is 1, old ones elsewhere."""
        kept = tf.cast(weight.state["mask"].value, tf.bool)
        return tf.where(kept, tf.cast(value, weight.value.dtype), weight.value)

    def set_masks(self, masks: Sequence[Any]) -> None:
        """Sets the masks. Call it outside of `strategy.run`.

        Args:
            masks: One array of zeros and ones for each of `sparse_weights`,
                of the weight's shape.

        Raises:
            UsageError: If the number of masks, a shape or a value is invalid.
                Then no mask changes.
        """
        weights = self.sparse_weights
        if len(masks) != len(weights):
            raise UsageError(
                f"The layer {self.name!r} has {len(weights)} masked weights. "
                f"Received: {len(masks)} masks"
            )
        arrays = [
            check_mask(weight, mask)
            for weight, mask in zip(weights, masks, strict=True)
        ]
        for weight, array in zip(weights, arrays, strict=True):
            weight.state["mask"].assign(array)


@tf.custom_gradient
def _masked_table(value: tf.Tensor, mask: tf.Tensor) -> tuple:
    """Masks a table of which some rows are looked up.

    The gradient of a look-up has only these rows, and optimizers update only
    them. The gradient of a plain product would have all rows.
    """

    def grad(upstream: tf.Tensor | tf.IndexedSlices) -> tuple:
        if not isinstance(upstream, tf.IndexedSlices):
            return upstream * tf.cast(mask, upstream.dtype), None
        rows = tf.cast(tf.gather(mask, upstream.indices), upstream.dtype)
        gradient = tf.IndexedSlices(
            upstream.values * rows, upstream.indices, upstream.dense_shape
        )
        return gradient, None

    return value * tf.cast(mask, value.dtype), grad


def check_mask(weight: SparseWeight, mask: Any) -> np.ndarray:
    """Checks the mask of a weight.

    Args:
        weight: The weight.
        mask: Array or tensor of zeros and ones, of the weight's shape.

    Returns:
        The mask as a uint8 array.

    Raises:
        UsageError: If the mask has other values or another shape.
    """
    try:
        array = keras.ops.convert_to_numpy(mask)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"The mask of {weight.path} must be an array of zeros and ones. "
            f"Received: {mask!r}"
        ) from error
    shape = tuple(weight.variable.shape)
    if array.shape != shape or not ((array == 0) | (array == 1)).all():
        raise UsageError(
            f"The mask of {weight.path} must hold zeros and ones and have "
            f"shape {shape}. Received: an array of shape {array.shape} and "
            f"dtype {array.dtype}"
        )
    return array.astype("uint8")


# The numbers that define a schedule.
_NUMBERS = (
    "sparsity",
    "initial_sparsity",
    "begin_step",
    "end_step",
    "frequency",
    "power",
)
# The numbers of polynomial schedules only.
_POLYNOMIAL = ("initial_sparsity", "end_step", "power")
# Key of the schedule's steps in files of weights.
_STEPS = "schedule_steps"


class PruningWrapper(MaskedWrapper):
    """Base class of techniques that update masks by scores, on a schedule.

    A technique overrides `scores`. At the steps of the schedule, between two
    training steps, the updater passes the scores to the ranking. The training
    step itself contains no sort and no condition.

    By default the sparsity grows from `initial_sparsity` at `begin_step` to
    `sparsity` at `end_step` (Zhu and Gupta 2017):
    s(t) = s_final + (s_init - s_final) * (1 - p)^power, where
    p = clip((t - begin) / (end - begin), 0, 1).

    Without an `end_step` the schedule ends after 75 % of the training steps.
    Their number comes from `fit` with `sos.SparsityCallback`, from
    `train_steps` of a config, or from `sos.SparsityUpdater(model, optimizer,
    train_steps=...)`. The steps are fixed when training begins: they are saved
    with models and weights, and a second `fit` does not change them.

    Args:
        layer: The layer to wrap.
        sparsity: Final fraction of zeros, in [0, 1). With a schedule object, it
            replaces the object's.
        initial_sparsity: Fraction of zeros at `begin_step`, in [0, 1).
        begin_step: Training step of the first mask update.
        end_step: Training step of the last mask update; None for 75 % of the
            training steps.
        frequency: Training steps between two mask updates; None for about 100
            updates from `begin_step` to `end_step`, and for 100 steps under a
            constant schedule, but at least `steps_per_execution`.
        power: Exponent of the growth.
        schedule: "polynomial"; or "constant" for a constant `sparsity` from
            `begin_step` until training ends, without `initial_sparsity`,
            `end_step` and `power`; or an object instead of numbers: a tfmot
            schedule (`sos.schedules.PolynomialDecay`,
            `sos.schedules.ConstantSparsity` or a subclass of
            `sos.schedules.PruningSchedule`) or a `sos.schedules.Schedule`.
        ranking: A `sos.extend.Ranking`; by default each tensor is ranked
            separately.
        **kwargs: As for `SparseWrapper`.

    Raises:
        UsageError: If a number is out of range or does not fit the schedule.
        TypeError: If `schedule` or `ranking` has a wrong type, if there are
            numbers with a schedule object, or no `sparsity` without one.

    Example:
    >>> import keras, sos
    >>> layer = sos.MagnitudePruning(
    ...     keras.layers.Dense(8), sparsity=0.9, end_step=1000
    ... )
    >>> layer.schedule.sparsity(500)
    0.7875
    """

    needs_step = True

    #: Whether `weight.state["gradient"]` sums the gradients of the effective
    #: weight since its last mask update, over all replicas. They are gradients
    #: of the loss that the training loop differentiates: in `fit` a mean over
    #: the batch, in the training engine a sum, with loss scaling a multiple.
    #: Elements that are not finite are skipped. Each backward pass, including
    #: those of accumulated gradients, costs an all-reduce of the weight.
    uses_gradient = False

    #: Whether pruned weights stay pruned. Then `scores` should give them the
    #: lowest scores, as in `RandomPruning`, to rank only the others.
    cumulative = False

    def __init__(
        self,
        layer: keras.layers.Layer,
        *,
        sparsity: float | None = None,
        initial_sparsity: float = 0.0,
        begin_step: int = 0,
        end_step: int | None = None,
        frequency: int | None = None,
        power: float = 3.0,
        schedule: PruningSchedule | Schedule | str = "polynomial",
        ranking: Ranking | None = None,
        **kwargs: Any,
    ) -> None:
        numbers = {
            "sparsity": sparsity,
            "initial_sparsity": initial_sparsity,
            "begin_step": begin_step,
            "end_step": end_step,
            "frequency": frequency,
            "power": power,
        }
        if not isinstance(schedule, str):
            # Without the defaults of a subclass.
            numbers = arguments.non_defaults(numbers, self._number_defaults())
        schedule = self._make_schedule(schedule, numbers)
        ranking = PerTensorRanking() if ranking is None else ranking
        if not isinstance(ranking, Ranking):
            raise ArgumentError(
                "`ranking` must be a `sos.extend.Ranking`. "
                f"Received: ranking={ranking!r}"
            )
        super().__init__(layer, **kwargs)
        self._schedule = schedule
        self.ranking = ranking

    @classmethod
    def hyperparameters(cls) -> dict[str, Any]:
        """Returns the schedule's numbers and other hyperparameters."""
        defaults = super().hyperparameters()
        defaults.pop("ranking", None)
        if not isinstance(defaults.get("schedule"), str):
            defaults.pop("schedule", None)
        # The default is None because a schedule object can replace it.
        if defaults.get("sparsity", ...) is None:
            defaults["sparsity"] = arguments.REQUIRED
        return defaults

    @classmethod
    def resolve_hyperparameters(
        cls,
        hyperparameters: Mapping[str, Any],
        inherited: Mapping[str, Any] = types.MappingProxyType({}),
    ) -> dict[str, Any]:
        """Turns the name and the numbers of a schedule into a `Schedule`."""
        schedule = hyperparameters.get("schedule", "polynomial")
        replaced = _POLYNOMIAL if schedule == "constant" else ()
        replaced = replaced if isinstance(schedule, str) else _NUMBERS
        inherited = {k: v for k, v in inherited.items() if k not in replaced}
        resolved = super().resolve_hyperparameters(hyperparameters, inherited)
        default = arguments.defaults(cls, SparseWrapper).get("schedule")
        schedule = resolved.get("schedule", default)
        # A technique may create its own schedule.
        if default is None or schedule is arguments.REQUIRED:
            return resolved
        numbers = {k: v for k, v in resolved.items() if k in _NUMBERS}
        if isinstance(schedule, str):
            numbers = {**cls._number_defaults(), **numbers}
            if numbers["sparsity"] is None:
                return resolved
        schedule = cls._make_schedule(schedule, numbers)
        others = {k: v for k, v in resolved.items() if k not in _NUMBERS}
        return {**others, "schedule": schedule}

    @classmethod
    def _number_defaults(cls) -> dict[str, Any]:
        """Returns the defaults of the schedule's numbers."""
        defaults = {
            **arguments.defaults(PruningWrapper, SparseWrapper),
            **arguments.defaults(cls, SparseWrapper),
        }
        return {name: defaults[name] for name in _NUMBERS}

    @classmethod
    def _make_schedule(
        cls,
        schedule: PruningSchedule | Schedule | str,
        numbers: dict[str, Any],
    ) -> Schedule:
        """Creates a schedule from a name or object, and numbers."""
        if isinstance(schedule, str):
            # Compared with the defaults of a subclass.
            changed = arguments.non_defaults(numbers, cls._number_defaults())
            if numbers.get("sparsity") is None:
                raise ArgumentError(
                    f"{cls.__name__} needs `sparsity`, the fraction of zeros "
                    "to end with, such as `sparsity=0.9`, or a schedule "
                    "object. "
                    "Received: "
                    f"{arguments.format_arguments(changed) or 'neither'}"
                )
            if schedule == "constant":
                numbers = {
                    name: value
                    for name, value in numbers.items()
                    if name in changed or name not in _POLYNOMIAL
                }
            return make_schedule(schedule, **numbers)
        schedule = as_schedule(schedule)
        sparsity = numbers.get("sparsity")
        excess = {k: v for k, v in numbers.items() if k != "sparsity"}
        if excess:
            raise ArgumentError(
                "A `schedule` object excludes "
                f"{arguments.format_names(excess)}: "
                f"give {cls.__name__} the schedule or its numbers. Received: "
                f"{arguments.format_arguments(excess)}, schedule={schedule}"
            )
        return (
            schedule if sparsity is None else schedule.with_sparsity(sparsity)
        )

    @property
    def schedule(self) -> Schedule:
        """The schedule, which may be replaced at any time.

        Raises:
            TypeError: If it is set to an object that is not a schedule.
        """
        return self._schedule

    @schedule.setter
    def schedule(self, schedule: PruningSchedule | Schedule) -> None:
        self._schedule = as_schedule(schedule)

    def scores(self, weight: SparseWeight) -> tf.Tensor:
        """Scores each element of a weight.

        Args:
            weight: The weight.

        Returns:
            Scores of the weight's shape, of any floating dtype and sign. The
            elements with the highest scores are kept. If all are equal, the
            weight keeps its mask.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must override `scores`."
        )

    def build_weight(self, weight: SparseWeight) -> None:
        """Adds the mask, and the gradient if the technique uses it."""
        super().build_weight(weight)
        if self.uses_gradient:
            # Each replica writes its copy, and all write equal values.
            self.add_weight_state(
                weight,
                "gradient",
                aggregation="only_first_replica",
                synchronization="on_read",
            )

    def training_weight(self, weight: SparseWeight) -> tf.Tensor:
        """Returns the masked weight."""
        effective = super().training_weight(weight)
        if not self.uses_gradient:
            return effective

        @tf.custom_gradient
        def keep_gradient(value: tf.Tensor) -> tuple:
            def grad(upstream: tf.Tensor) -> tf.Tensor:
                total = weight.state["gradient"]
                finite = tf.where(tf.math.is_finite(upstream), upstream, 0.0)
                finite = _sum_over_replicas(tf.cast(finite, total.dtype))
                total.assign(total.value + finite)
                return upstream

            return tf.identity(value), grad

        return keep_gradient(effective)

    def evaluation_weight(self, weight: SparseWeight) -> tf.Tensor:
        """Returns the masked weight."""
        return super().training_weight(weight)

    def assign_mask(self, weight: SparseWeight, mask: Any) -> None:
        """Sets the mask of one weight after ranking.

        Args:
            weight: The weight.
            mask: Zeros and ones of the weight's shape.
        """
        variable = weight.state["mask"]
        if self.cumulative:
            mask = tf.cast(mask, tf.bool) & tf.cast(variable.value, tf.bool)
        variable.assign(mask)
        if self.uses_gradient:
            gradient = weight.state["gradient"]
            gradient.assign(tf.zeros(gradient.shape))

    def target_sparsity(self) -> float | None:
        """Returns the schedule's final sparsity, None if unknown."""
        return self.schedule.target_sparsity

    def save_own_variables(self, store: dict[str, Any]) -> None:
        """Saves the variables, and the steps of a polynomial schedule."""
        super().save_own_variables(store)
        steps = self.schedule.steps() if self.schedule.resolved else None
        if steps is not None:
            store[_STEPS] = np.asarray(steps, "int64")

    def load_own_variables(self, store: Mapping[str, Any]) -> None:
        """Loads the variables, and the steps of an unresolved schedule."""
        values = {name: store[name] for name in store.keys()}
        steps = values.pop(_STEPS, None)
        super().load_own_variables(values)
        if steps is not None and not self.schedule.resolved:
            self.schedule = self.schedule.at(*np.asarray(steps).tolist())

    def get_config(self) -> dict[str, Any]:
        """Returns the layer's configuration, for `from_config`."""
        serialize = keras.saving.serialize_keras_object
        return {
            **super().get_config(),
            "schedule": serialize(self.schedule),
            "ranking": serialize(self.ranking),
        }

    @classmethod
    def arguments_from_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Turns entries of a configuration into arguments."""
        config = super().arguments_from_config(config)
        for name in ("schedule", "ranking"):
            config[name] = keras.saving.deserialize_keras_object(config[name])
        return config


def _sum_over_replicas(gradient: tf.Tensor) -> tf.Tensor:
    # At once, not when masks are updated: checkpoints save one replica's value,
    # and a resumed run must continue with the same bits.
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return gradient
    return context.all_reduce(tf.distribute.ReduceOp.SUM, gradient)


def resolve_schedules(
    wrappers: Sequence[SparseWrapper],
    train_steps: int | None,
    *,
    start: int = 0,
    steps_per_execution: int = 1,
) -> None:
    """Resolves the schedules of techniques when training begins.

    Args:
        wrappers: The techniques, with or without a schedule.
        train_steps: As for `Schedule.over`.
        start: As for `Schedule.over`.
        steps_per_execution: As for `Schedule.over`.

    Raises:
        UsageError: As for `Schedule.over`. Then no schedule changes.
    """
    schedules = [
        (
            wrapper,
            wrapper.schedule.over(
                train_steps,
                start=start,
                steps_per_execution=steps_per_execution,
            ),
        )
        for wrapper in wrappers
        if isinstance(wrapper, PruningWrapper)
    ]
    for wrapper, schedule in schedules:
        wrapper.schedule = schedule


def update_masks(updates: dict[PruningWrapper, float]) -> MaskChanges | None:
    """Ranks weights and sets their masks.

    Each ranking is called once with the scores of all its weights, so that it
    may rank across the model. A weight whose scores are all equal keeps its
    mask (`sos.rankings.undecided`). Call it outside of `strategy.run`; all
    replicas get the same bits.

    Args:
        updates: Sparsities by technique.

    Returns:
        The number of changed elements; None without weights.

    Warns:
        UserWarning: If a weight keeps its mask because its scores are all
            equal, or if its sparsity leaves no element. Once per weight.

    Raises:
        ValueError: If a score is NaN, or scores or masks have a wrong shape or
            value. Then no mask changes.
    """
    groups: list[tuple[Ranking, list[tuple[PruningWrapper, float]]]] = []
    for wrapper, sparsity in updates.items():
        for ranking, members in groups:
            if ranking == wrapper.ranking:
                members.append((wrapper, sparsity))
                break
        else:
            groups.append((wrapper.ranking, [(wrapper, sparsity)]))
    results: list[_Ranked] = []
    for ranking, members in groups:
        results += _rank(
            ranking,
            [
                (wrapper, weight, sparsity)
                for wrapper, sparsity in members
                for weight in wrapper.sparse_weights
            ],
        )
    if not results:
        return None
    counts = []
    for ranked in results:
        old = _mask_value(ranked.weight)
        ranked.wrapper.assign_mask(ranked.weight, ranked.mask)
        if ranked.changes is None:
            new = _mask_value(ranked.weight)
            ranked.changes = count_changes(old, new)
        counts.append(ranked.changes)
    if any(map(tf.is_tensor, counts)):
        counts = tf.stack(counts).numpy()  # One transfer from an accelerator.
    counts = np.stack(counts).tolist()
    # Last, as a warning may be an error.
    for ranked, (kept, _, _) in zip(results, counts, strict=True):
        dead_weights.after_update(
            ranked.wrapper,
            ranked.weight,
            ranked.sparsity,
            undecided=ranked.undecided,
            any_left=kept > 0,
        )
    return total_changes((ranked.weight for ranked in results), counts)


def _mask_value(weight: SparseWeight) -> tf.Tensor:
    """Returns the present mask, which does not change with the variable."""
    return tf.convert_to_tensor(weight.state["mask"].value)


@dataclasses.dataclass
class _Ranked:
    """A ranked weight.

    Attributes:
        wrapper: The technique.
        weight: The weight.
        sparsity: The requested fraction of zeros.
        mask: The new mask; the old one if the weight is undecided.
        undecided: Whether only positions would decide (`undecided`).
        changes: The output of `count_changes`; None until the mask is set.
    """

    wrapper: PruningWrapper
    weight: SparseWeight
    sparsity: float
    mask: Any
    undecided: bool
    changes: Any = None


def _rank(
    ranking: Ranking,
    members: Sequence[tuple[PruningWrapper, SparseWeight, float]],
) -> list[_Ranked]:
    """Ranks the weights of one ranking, without setting their masks."""
    scores = [
        _compute_scores(wrapper, weight) for wrapper, weight, _ in members
    ]
    try:
        if needs_only_counts(ranking) and _on_one_accelerator(scores):
            return _rank_on_accelerator(ranking, members, scores)
        masks = ranking.masks(scores, [sparsity for _, _, sparsity in members])
        if not isinstance(ranking, PerTensorRanking):
            masks = [
                check_mask(weight, mask)
                for (_, weight, _), mask in zip(members, masks, strict=True)
            ]
    except ValueError as error:
        paths = [weight.path for _, weight, _ in members]
        raise ValueError(
            f"The masks of {paths} could not be updated: {error}"
        ) from error
    return [
        _Ranked(
            *member, _mask_value(member[1]) if unchanged else mask, unchanged
        )
        for member, mask, unchanged in zip(
            members, masks, undecided(ranking, scores, masks), strict=True
        )
    ]


def _on_one_accelerator(scores: Sequence[Any]) -> bool:
    devices = set(map(accelerator, scores))
    return len(devices) == 1 and None not in devices


def _rank_on_accelerator(
    ranking: PerTensorRanking,
    members: Sequence[tuple[PruningWrapper, SparseWeight, float]],
    scores: Sequence[tf.Tensor],
) -> list[_Ranked]:
    """Ranks with one compiled call and one transfer from the accelerator."""
    counts = [
        ranking.keep_count(math.prod(weight.variable.shape), sparsity)
        for _, weight, sparsity in members
    ]
    with tf.device(scores[0].device):
        masks, statistics = rank_by_count(
            scores,
            tf.constant(counts, tf.int32),
            [_mask_value(weight) for _, weight, _ in members],
            [wrapper.cumulative for wrapper, _, _ in members],
        )
    statistics = statistics.numpy()
    for (_, weight, _), nans in zip(members, statistics[:, 0], strict=True):
        check_not_nan(int(nans), f" of {weight.path}")
    results = []
    for member, mask, row in zip(members, masks, statistics, strict=True):
        ranked = _Ranked(*member, mask, bool(row[1]))
        # A technique that overrides `assign_mask` may set another mask.
        if type(ranked.wrapper).assign_mask is PruningWrapper.assign_mask:
            # A Boolean mask is assigned without reading it back to check it.
            ranked.mask = tf.cast(mask, tf.bool)
            ranked.changes = row[2:]
        results.append(ranked)
    return results


def _compute_scores(wrapper: PruningWrapper, weight: SparseWeight) -> Any:
    scores = wrapper.scores(weight)
    if tuple(scores.shape) != tuple(weight.variable.shape):
        raise ValueError(
            f"`{type(wrapper).__name__}.scores` must return one score for each "
            f"element of {weight.path}, of shape "
            f"{tuple(weight.variable.shape)}. Received: {tuple(scores.shape)}"
        )
    return scores
