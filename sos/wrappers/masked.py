"""Techniques that multiply weights by masks of zeros and ones."""

import types
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from sos import arguments, keras_compat
from sos.errors import ArgumentError, UsageError
from sos.rankings import PerTensorRanking, Ranking, undecided
from sos.schedules import (
    PruningSchedule,
    Schedule,
    as_schedule,
    make_schedule,
)
from sos.wrappers import dead_weights
from sos.wrappers.base import SparseWrapper
from sos.wrappers.mask_variable import MaskVariable
from sos.wrappers.sparse_weight import SparseWeight


class MaskedWrapper(SparseWrapper):
    """Runs a layer with `weight * mask`.

    The masks (1 = kept) are uint8 variables in `weight.state["mask"]`,
    initially all ones. As the mask is part of the forward pass, the
    gradient of a masked weight is exactly zero; the weight keeps its value and
    still feels weight decay and momentum (Gale et al. 2019, section 3).
    """

    needs_step = False

    def build_weight(self, weight: SparseWeight) -> None:
        """Adds the mask."""
        mask = self.add_weight_state(
            weight, "mask", dtype="uint8", initializer="ones"
        )
        mask.__class__ = MaskVariable

    def training_weight(self, weight: SparseWeight) -> tf.Tensor:
        """The masked weight."""
        mask = weight.state["mask"].value
        if id(weight.variable) in self._tables():
            return _masked_table(weight.value, mask)
        return weight.value * tf.cast(mask, weight.value.dtype)

    def _tables(self) -> set[int]:
        """Returns the variables in which layers look rows up, by their `id`."""
        return {
            id(keras_compat.embeddings(layer))
            for layer in keras_compat.all_layers(self.layer)
            if isinstance(layer, keras.layers.Embedding)
        }

    def assigned_weight(
        self, weight: SparseWeight, value: tf.Tensor
    ) -> tf.Tensor:
        """What was assigned where the mask is 1, the dense weight elsewhere."""
        kept = tf.cast(weight.state["mask"].value, tf.bool)
        return tf.where(kept, tf.cast(value, weight.value.dtype), weight.value)

    def set_masks(self, masks: Sequence[Any]) -> None:
        """Sets the masks. Call it outside of `strategy.run`.

        Args:
            masks: One array of zeros and ones for each of `sparse_weights`,
                of the weight's shape.

        Raises:
            UsageError: If the number of masks, a shape or a value is wrong;
                no mask is changed then.
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
    """Masks a table of which a few rows are looked up.

    The gradient of a look-up has these rows alone, which optimizers update as
    in a dense layer. That of a product would have all.
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
        mask: What is to be its mask.

    Returns:
        The mask as a uint8 array.

    Raises:
        UsageError: If it does not hold zeros and ones, or has another shape.
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


# The hyperparameters of which a schedule is made.
_NUMBERS = (
    "sparsity",
    "initial_sparsity",
    "begin_step",
    "end_step",
    "frequency",
    "power",
)


class PruningWrapper(MaskedWrapper):
    """Sets masks by scores, to a sparsity that follows a schedule.

    A technique overrides `scores`. The updater asks for the scores at the steps
    of the schedule, between two training steps, and hands them to the ranking;
    the training step itself carries no sort and no condition.

    The schedule is given as numbers or as an object. With an `end_step` the
    sparsity grows from `initial_sparsity` at `begin_step` to `sparsity` (Zhu
    and Gupta 2017): s(t) = s_final + (s_init - s_final) * (1 - p)^power, where
    p = clip((t - begin) / (end - begin), 0, 1). Without one it is constant from
    `begin_step` on.

    Args:
        layer: The layer to wrap.
        sparsity: Fraction of zeros to end with, in [0, 1). With a `schedule`,
            it replaces the schedule's own.
        initial_sparsity: Fraction of zeros at `begin_step`, in [0, 1).
        begin_step: Training step of the first mask update.
        end_step: Training step of the last mask update; None for a constant
            sparsity, whose masks are updated for the rest of training.
        frequency: Training steps between two mask updates.
        power: Exponent of the growth.
        schedule: A pruning schedule of tfmot (`sos.schedules.PolynomialDecay`,
            `sos.schedules.ConstantSparsity` or a subclass of
            `sos.schedules.PruningSchedule`), or a `sos.schedules.Schedule`,
            instead of the numbers.
        ranking: How scores become masks; by default each tensor for itself.
        **kwargs: As for `SparseWrapper`.

    Raises:
        UsageError: If a number is out of range.
        TypeError: If `schedule` or `ranking` is not one, or the numbers come
            together with a `schedule`, or neither is there.

    Example:
    >>> import keras, sos
    >>> layer = sos.MagnitudePruning(
    ...     keras.layers.Dense(8), sparsity=0.9, end_step=1000
    ... )
    >>> layer.schedule.sparsity(500)
    0.7875
    """

    needs_step = True

    #: Sums the gradients of each effective weight since its last mask update,
    #: dense and over all replicas, in `weight.state["gradient"]`. They are of
    #: what the training loop differentiates: in `fit` a mean over the batch, in
    #: the training engine a sum, under loss scaling a multiple. Elements that
    #: are not finite are left out. Each backward pass, also one of several for
    #: an accumulated gradient, costs another all-reduce of the weight.
    uses_gradient = False

    #: A weight once pruned stays so. Give the pruned ones the lowest scores, as
    #: `RandomPruning` does: the others are then ranked among themselves.
    cumulative = False

    def __init__(
        self,
        layer: keras.layers.Layer,
        *,
        sparsity: float | None = None,
        initial_sparsity: float = 0.0,
        begin_step: int = 0,
        end_step: int | None = None,
        frequency: int = 100,
        power: float = 3.0,
        schedule: PruningSchedule | Schedule | None = None,
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
        if schedule is not None:
            # A subclass may pass on defaults of its own.
            numbers = arguments.changed(numbers, self._number_defaults())
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
        """Returns the numbers of the schedule, and the technique's own."""
        defaults = super().hyperparameters()
        for name in ("schedule", "ranking"):
            defaults.pop(name, None)
        # The default is None because a schedule can replace it.
        if defaults.get("sparsity", ...) is None:
            defaults["sparsity"] = arguments.REQUIRED
        return defaults

    @classmethod
    def resolve_hyperparameters(
        cls,
        hyperparameters: Mapping[str, Any],
        inherited: Mapping[str, Any] = types.MappingProxyType({}),
    ) -> dict[str, Any]:
        """Turns the numbers of a schedule into a `Schedule`."""
        if hyperparameters.get("schedule") is not None:
            inherited = {
                name: value
                for name, value in inherited.items()
                if name not in _NUMBERS
            }
        resolved = super().resolve_hyperparameters(hyperparameters, inherited)
        numbers = {k: v for k, v in resolved.items() if k in _NUMBERS}
        schedule = resolved.get("schedule")
        # A technique may have a schedule of its own.
        if "schedule" not in arguments.defaults(cls, SparseWrapper):
            return resolved
        if schedule is None and numbers.get("sparsity") is None:
            return resolved
        if schedule is None:
            numbers = {**cls._number_defaults(), **numbers}
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
        schedule: PruningSchedule | Schedule | None,
        numbers: dict[str, Any],
    ) -> Schedule:
        """Makes a schedule of numbers, or of a schedule and a sparsity."""
        sparsity = numbers.get("sparsity")
        if schedule is None:
            if sparsity is None:
                numbers = arguments.changed(numbers, cls._number_defaults())
                raise ArgumentError(
                    f"{cls.__name__} needs `sparsity`, the fraction of zeros "
                    "to end with, such as `sparsity=0.9`, or a `schedule`. "
                    f"Received: {arguments.received(numbers) or 'neither'}"
                )
            return make_schedule(**numbers)
        schedule = as_schedule(schedule)
        excess = {k: v for k, v in numbers.items() if k != "sparsity"}
        if excess:
            raise ArgumentError(
                f"A `schedule` excludes {arguments.quoted(excess)}: give "
                f"{cls.__name__} the schedule or its numbers. "
                f"Received: {arguments.received(excess)}, schedule={schedule}"
            )
        return (
            schedule if sparsity is None else schedule.with_sparsity(sparsity)
        )

    @property
    def schedule(self) -> Schedule:
        """The schedule. It lives on the host and may be replaced at any time.

        Raises:
            TypeError: If it is set to anything other than a schedule.
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
            elements with the highest scores are kept. Where all are equal, the
            weight keeps its mask.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must override `scores`."
        )

    def build_weight(self, weight: SparseWeight) -> None:
        """Adds the mask, and the gradient where the technique uses it."""
        super().build_weight(weight)
        if self.uses_gradient:
            # Each replica writes its own, and all write the same.
            self.add_weight_state(
                weight,
                "gradient",
                aggregation="only_first_replica",
                synchronization="on_read",
            )

    def training_weight(self, weight: SparseWeight) -> tf.Tensor:
        """The masked weight."""
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
        """The masked weight."""
        return super().training_weight(weight)

    def assign_mask(self, weight: SparseWeight, mask: Any) -> None:
        """Sets the mask of one weight that was ranked.

        Args:
            weight: The weight.
            mask: Zeros and ones of the weight's shape.
        """
        variable = weight.state["mask"]
        if self.cumulative:
            mask = tf.minimum(tf.cast(mask, tf.uint8), variable.value)
        variable.assign(mask)
        if self.uses_gradient:
            gradient = weight.state["gradient"]
            gradient.assign(tf.zeros(gradient.shape))

    def target_sparsity(self) -> float | None:
        """The sparsity at the end of the schedule, None for an open end."""
        return self.schedule.target_sparsity

    def get_config(self) -> dict[str, Any]:
        """The layer's configuration, which `from_config` takes."""
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
    # Not when masks are updated: a checkpoint holds the sum of one replica, and
    # training is to go on from it to the same bits.
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return gradient
    return context.all_reduce(tf.distribute.ReduceOp.SUM, gradient)


def update_masks(updates: dict[PruningWrapper, float]) -> None:
    """Ranks weights and sets their masks.

    Every ranking is called once with all tensors that it applies to, so that it
    may rank over the whole model. A weight whose scores are all equal keeps its
    mask (`sos.rankings.undecided`). Call it outside of `strategy.run`; all
    replicas get the same bits.

    Args:
        updates: The sparsity to reach, by wrapper.

    Warns:
        UserWarning: If a weight keeps its mask because its scores are all
            equal, or its sparsity would leave or has left nothing of it. Each
            weight is named once.

    Raises:
        ValueError: If a score is NaN, or scores or masks have a wrong shape or
            value; no mask is changed then.
    """
    groups: list[tuple[Ranking, list[tuple[PruningWrapper, float]]]] = []
    for wrapper, sparsity in updates.items():
        for ranking, members in groups:
            if ranking == wrapper.ranking:
                members.append((wrapper, sparsity))
                break
        else:
            groups.append((wrapper.ranking, [(wrapper, sparsity)]))
    results = []
    for ranking, members in groups:
        ranked = [
            (wrapper, weight, sparsity)
            for wrapper, sparsity in members
            for weight in wrapper.sparse_weights
        ]
        scores = [
            _checked_scores(wrapper, weight) for wrapper, weight, _ in ranked
        ]
        try:
            masks = ranking.masks(
                scores, [sparsity for _, _, sparsity in ranked]
            )
            if not isinstance(ranking, PerTensorRanking):
                masks = [
                    check_mask(weight, mask)
                    for (_, weight, _), mask in zip(ranked, masks, strict=True)
                ]
        except ValueError as error:
            paths = [weight.path for _, weight, _ in ranked]
            raise ValueError(
                f"The masks of {paths} could not be updated: {error}"
            ) from error
        unchanged = undecided(ranking, scores, masks)
        results.extend(zip(ranked, masks, unchanged, strict=True))
    for (wrapper, weight, _), mask, unchanged in results:
        if unchanged:
            mask = weight.state["mask"].value
        wrapper.assign_mask(weight, mask)
    # Last, as a warning may be an error.
    for ((wrapper, weight, sparsity), _, unchanged), any_left in zip(
        results, _any_left(results), strict=True
    ):
        dead_weights.after_update(
            wrapper, weight, sparsity, undecided=unchanged, any_left=any_left
        )


def _any_left(results: list[tuple]) -> list[bool]:
    """Returns which masks keep any element after they were set."""
    found = []
    for (wrapper, weight, _), mask, unchanged in results:
        if unchanged or wrapper.cumulative:
            mask = weight.state["mask"].value
        found.append(
            mask.any()
            if isinstance(mask, np.ndarray)
            else tf.reduce_any(tf.cast(mask, tf.bool))
        )
    # In one transfer from an accelerator.
    return tf.stack(found).numpy().tolist() if found else []


def _checked_scores(wrapper: PruningWrapper, weight: SparseWeight) -> Any:
    scores = wrapper.scores(weight)
    if tuple(scores.shape) != tuple(weight.variable.shape):
        raise ValueError(
            f"`{type(wrapper).__name__}.scores` must return one score for each "
            f"element of {weight.path}, of shape "
            f"{tuple(weight.variable.shape)}. Received: {tuple(scores.shape)}"
        )
    return scores
