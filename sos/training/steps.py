"""The compiled functions of training: steps, evaluation, summaries."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from sos.masks import (
    keep_count,
    nan_count,
    refuse_nan,
    top_k_mask_device,
)
from sos.noise import call_label
from sos.rankings import PerTensorRanking, Ranking
from sos.training.task import Task, WeightedSum, check_metrics
from sos.wrappers.base import SparseWrapper, find_wrappers
from sos.wrappers.masked import PruningWrapper
from sos.wrappers.penalized import PenalizedWrapper
from sos.wrappers.sparse_weight import SparseWeight

_NEVER = 2**31 - 1


class Steps:
    """What runs on the replicas, for one model and its optimizer.

    Make it in the strategy's scope. The functions ending in `_step` are those
    of one replica, to be called in `strategy.run`; the others are compiled and
    called by the host.

    The gradient is that of `loss + sum(model.losses)`, where the loss is the
    mean over the weights of the whole batch: over all replicas and
    micro-batches, even if their weights differ, as those of sentences do.
    `model.losses`, which replicas and micro-batches may have different ones of,
    are averaged with the same weights; of a batch without any weight the
    gradient is zero. With several replicas gradients are clipped after they are
    summed; Keras alone would clip each replica's. What a technique with
    `uses_gradient` gathers are gradients of sums over examples, in which a step
    counts by the weight of its batch.

    Args:
        task: What is trained.
        model: Its model.
        optimizer: The model's optimizer, built.
        gradient_accumulation_steps: The number of parts, computed one after the other, that a
            replica's batch is cut into.

    Raises:
        ValueError: If the optimizer accumulates gradients or scales the loss
            itself, or a replica's batch cannot be cut evenly.
    """

    def __init__(
        self,
        task: Task,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
        *,
        gradient_accumulation_steps: int = 1,
    ) -> None:
        self._task = task
        self._model = model
        self._optimizer = optimizer
        self._micro_batches = gradient_accumulation_steps
        self._strategy = tf.distribute.get_strategy()
        self._replicas = self._strategy.num_replicas_in_sync
        self._check()
        # Every replica has its own, and reading them sums them.
        shape = (len(task.metric_names), 2)
        self._train_totals, self._eval_totals = (
            tf.Variable(
                tf.zeros(shape),
                trainable=False,
                synchronization=tf.VariableSynchronization.ON_READ,
                aggregation=tf.VariableAggregation.SUM,
            )
            for _ in range(2)
        )
        # The same on all replicas, as it is made of sums over them.
        self._bad_step = tf.Variable(
            _NEVER,
            trainable=False,
            synchronization=tf.VariableSynchronization.ON_READ,
            aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
        )
        self.sparse_weights: list[tuple[SparseWrapper, SparseWeight]] = [
            (wrapper, weight)
            for wrapper in find_wrappers(model)
            for weight in wrapper.sparse_weights
        ]

    def _check(self) -> None:
        optimizer, parts = self._optimizer, self._micro_batches
        if getattr(optimizer, "gradient_accumulation_steps", None):
            raise ValueError(
                "The optimizer must not accumulate gradients itself, which "
                "Keras cannot do under a strategy: the training engine does it "
                "under every one, with `gradient_accumulation_steps`. Received: "
                "gradient_accumulation_steps="
                f"{optimizer.gradient_accumulation_steps}"
            )
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            raise ValueError(
                "The optimizer must not scale the loss, as it then skips "
                "steps, and the input of a step would depend on how many were "
                "skipped before. Use bfloat16, which needs no scaling. "
                "Received: a LossScaleOptimizer"
            )
        if optimizer.loss_scale_factor:
            raise ValueError(
                "The optimizer must not scale gradients, as the engine's are "
                "those of the loss itself. Received: loss_scale_factor="
                f"{optimizer.loss_scale_factor}"
            )
        if optimizer.use_ema and not optimizer.ema_overwrite_frequency:
            raise ValueError(
                "The optimizer's moving averages of the weights would be used "
                "by nothing. Give it an `ema_overwrite_frequency`, or leave "
                "`use_ema` away. Received: use_ema=True"
            )
        overwrites = optimizer.use_ema and self._replicas > 1
        if overwrites and not isinstance(
            self._strategy, tf.distribute.TPUStrategy
        ):
            raise ValueError(
                "Keras cannot overwrite weights by their moving averages on "
                "several replicas, but on a TPU. Train on one device, or leave "
                f"`use_ema` away. Received: use_ema=True on {self._replicas} "
                "replicas"
            )
        layers = self._model._flatten_layers()
        if any(layer.compute_dtype == "float16" for layer in layers):
            raise ValueError(
                "float16 needs loss scaling, which the engine has not. Use "
                "bfloat16. Received: a model that computes in float16"
            )
        if "loss" not in self._task.metric_names:
            raise ValueError(
                "The task's `metric_names` must hold 'loss'. "
                f"Received: {self._task.metric_names}"
            )
        batch = self._task.batch_size
        if parts < 1 or batch % (self._replicas * parts):
            raise ValueError(
                "The batch size must be a multiple of replicas times "
                f"micro-batches. Received: batch_size={batch}, "
                f"{self._replicas} replicas, gradient_accumulation_steps={parts}"
            )

    # On the host.

    @tf.function
    def train(self, iterator: Iterator[Any], steps: tf.Tensor) -> None:
        """Makes some optimizer steps.

        Args:
            iterator: Gives a batch for every replica.
            steps: How many, an int32 scalar: another number is no new trace.
        """
        for _ in tf.range(steps):
            self._strategy.run(self.train_step, args=(next(iterator),))

    @tf.function
    def evaluate(self, iterator: Iterator[Any], batches: tf.Tensor) -> None:
        """Adds some batches to what `take_eval_metrics` returns.

        Args:
            iterator: Gives a batch for every replica.
            batches: How many, an int32 scalar.
        """
        for _ in tf.range(batches):
            self._strategy.run(self.eval_step, args=(next(iterator),))

    def wait_for_evaluation(self) -> None:
        """Returns when the devices have done all of `evaluate` so far."""
        totals = self._strategy.experimental_local_results(self._eval_totals)
        np.asarray(totals[0])

    def take_train_metrics(self) -> dict[str, float]:
        """The means since the last call, by metric name."""
        return self._take(self._train_totals)

    def take_eval_metrics(self) -> dict[str, float]:
        """The means of what was evaluated since the last call."""
        return self._take(self._eval_totals)

    def take_bad_step(self) -> int | None:
        """The first step since the last call whose loss was not finite.

        Returns:
            The number of steps completed before it, or None.
        """
        # Read as the replicas have it: it is no sum over them.
        step = int(self._strategy.experimental_local_results(self._bad_step)[0])
        self._bad_step.assign(_NEVER)
        return None if step == _NEVER else step

    def summary(self) -> tuple[dict[str, int], dict[str, float]]:
        """What can be said of every sparse weight now.

        Returns:
            By weight path, the number of zeros in evaluation; and the penalty
            of the weights that have one, none while no driver is bound.
        """
        if not self.sparse_weights:
            return {}, {}
        # The penalties of a function traced without a driver are zero for good.
        driven = any(wrapper.clock.bound for wrapper, _ in self.sparse_weights)
        zeros, penalties = (
            self._strategy.experimental_local_results(x)[0].numpy()
            for x in self._summarize(driven)
        )
        paths = [weight.path for _, weight in self.sparse_weights]
        penalized = [
            weight.path
            for wrapper, weight in self.sparse_weights
            if isinstance(wrapper, PenalizedWrapper)
        ]
        return (
            dict(zip(paths, zeros.tolist(), strict=True)),
            dict(zip(penalized, penalties.tolist(), strict=True))
            if driven
            else {},
        )

    @tf.function
    def _summarize(self, driven: bool = True) -> tuple[tf.Tensor, tf.Tensor]:
        del driven  # For another trace.
        return self._strategy.run(self.summary_step)

    @tf.function
    def _finite(self) -> tf.Tensor:
        return self._strategy.run(self.finite_step)

    @tf.function
    def share_statistics(self) -> None:
        """Gives all replicas the first one's batch statistics.

        They are what a checkpoint holds, so that an evaluation now and one of
        the checkpoint are the same.
        """
        self._strategy.run(self.share_statistics_step)

    def weights_are_finite(self) -> bool:
        """Whether no variable of the model holds NaN or an infinity."""
        finite = self._strategy.experimental_local_results(self._finite())
        return bool(finite[0])

    def _take(self, totals: tf.Variable) -> dict[str, float]:
        sums = np.asarray(totals.read_value(), np.float64)
        totals.assign(tf.zeros_like(sums, tf.float32))
        return {
            name: float(total / weight) if weight else float("nan")
            for name, (total, weight) in zip(
                self._task.metric_names, sums, strict=True
            )
        }

    # On a replica.

    def train_step(self, batch: Any) -> None:
        """Makes one optimizer step, on one replica.

        Args:
            batch: The replica's share of the batch.
        """
        variables = self._model.trainable_variables
        if self._micro_batches == 1:
            gradients, totals, penalty = self._gradients(batch)
        else:
            gradients, totals, penalty = self._accumulated(batch)
        everywhere = totals
        if self._replicas > 1:
            everywhere, penalty = (
                tf.distribute.get_replica_context().all_reduce(
                    tf.distribute.ReduceOp.SUM, [totals, penalty]
                )
            )
        at = self._task.metric_names.index("loss")
        scale = tf.math.divide_no_nan(1.0, everywhere[at, 1])
        gradients = [
            None if g is None else g * tf.cast(scale, g.dtype)
            for g in gradients
        ]
        loss = tf.math.divide_no_nan(*tf.unstack(everywhere[at]))
        step = tf.cast(
            keras.ops.convert_to_tensor(self._optimizer.iterations), tf.int32
        )
        # The sum, too: without any weight the mean is zero, whatever it is.
        told = everywhere[at, 0] + loss + penalty
        bad = tf.where(tf.math.is_finite(told), _NEVER, step)
        self._bad_step.assign(tf.minimum(self._bad_step, bad))
        self._train_totals.assign_add(totals)
        self._optimizer.apply(self._clipped(gradients), variables)

    def eval_step(self, batch: Any) -> None:
        """Measures one batch, on one replica.

        Args:
            batch: The replica's share of the batch.
        """
        measured = self._measure(batch, training=False)
        self._eval_totals.assign_add(self._totals(measured))

    def summary_step(self) -> tuple[tf.Tensor, tf.Tensor]:
        """The zeros and penalties of the sparse weights, on one replica.

        Returns:
            int32 of shape [sparse weights], and float32 of shape [weights with
            a penalty].
        """
        zeros, penalties = [], []
        for wrapper in find_wrappers(self._model):
            for weight, value in wrapper.evaluation_weights().items():
                zeros.append(tf.reduce_sum(tf.cast(value == 0, tf.int32)))
                if isinstance(wrapper, PenalizedWrapper):
                    penalties.append(wrapper.weighted_penalty(weight))
        return (
            tf.stack(zeros),
            tf.stack(penalties) if penalties else tf.zeros([0]),
        )

    def share_statistics_step(self) -> None:
        """Takes over the first replica's batch statistics, on one replica."""
        context = tf.distribute.get_replica_context()
        first = tf.equal(context.replica_id_in_sync_group, 0)
        for variable in self._model.non_trainable_variables:
            # Other variables are the same everywhere, or sums over replicas.
            if variable.aggregation == "none" and variable.dtype == "float32":
                value = variable.value
                value = tf.where(first, value, tf.zeros_like(value))
                variable.assign(
                    context.all_reduce(tf.distribute.ReduceOp.SUM, value)
                )

    def finite_step(self) -> tf.Tensor:
        """Whether all variables of the model are finite, on one replica."""
        finite = [
            tf.reduce_all(tf.math.is_finite(variable.value))
            for variable in self._model.variables
            if variable.dtype.startswith(("float", "bfloat"))
        ]
        return tf.reduce_all(tf.stack(finite))

    def _gradients(self, batch: Any) -> tuple[list[Any], tf.Tensor, tf.Tensor]:
        """The gradients of a batch's sum, its totals, and the penalty.

        Sums can be added over micro-batches, replicas and steps, and are
        divided by the weight of all of them in the end.
        """
        variables = self._model.trainable_variables
        with tf.GradientTape() as tape:
            measured = self._measure(batch, training=True)
            objective, weight = measured["loss"]
            # Those of activities may be bfloat16.
            losses = [tf.cast(x, tf.float32) for x in self._model.losses]
            penalty = tf.add_n(losses) if losses else tf.zeros([])
            objective += tf.cast(
                tf.stop_gradient(tf.cast(weight, penalty.dtype)) * penalty,
                objective.dtype,
            )
        # Dense, as Keras's Adam squares each occurrence of an embedding's row
        # by itself, in place of their sum.
        gradients = [
            None if g is None else tf.convert_to_tensor(g)
            for g in tape.gradient(objective, variables)
        ]
        return gradients, self._totals(measured), penalty

    def _accumulated(
        self, batch: Any
    ) -> tuple[list[Any], tf.Tensor, tf.Tensor]:
        """As `_gradients`, of one micro-batch after the other."""
        sums: list[Any] = []
        totals = tf.zeros([])
        penalties = tf.zeros([])
        for index in range(self._micro_batches):
            # One after the other, as the point is to have the activations of
            # one only in memory; each with activation noise of its own.
            done = [g for g in sums if g is not None]
            with (
                tf.control_dependencies(done),
                call_label(f"micro_batch_{index}"),
            ):
                part = tf.nest.map_structure(
                    lambda x, index=index: self._part(x, index), batch
                )
                gradients, part_totals, penalty = self._gradients(part)
            sums = [
                None if g is None else total + g
                for total, g in zip(
                    sums or [0.0] * len(gradients), gradients, strict=True
                )
            ]
            totals += part_totals
            penalties += penalty
        return sums, totals, penalties

    def _part(self, tensor: tf.Tensor, index: int) -> tf.Tensor:
        size = tensor.shape[0] // self._micro_batches
        return tf.identity(tensor[index * size : (index + 1) * size])

    def _totals(self, measured: dict[str, WeightedSum]) -> tf.Tensor:
        """float32 of shape [metrics, 2]: sums and weights."""
        return tf.stack(
            [
                tf.stack([tf.cast(x, tf.float32) for x in measured[name]])
                for name in self._task.metric_names
            ]
        )

    def _measure(self, batch: Any, training: bool) -> dict[str, WeightedSum]:
        measured = self._task.compute_metrics(
            self._model, batch, training=training
        )
        check_metrics(self._task, measured)
        return measured

    def _clipped(self, gradients: list[Any]) -> list[Any]:
        """Gradients such that the optimizer clips the sum over replicas."""
        optimizer = self._optimizer
        by_value = getattr(optimizer, "clipvalue", None)
        by_norm = getattr(optimizer, "clipnorm", None)
        by_global_norm = getattr(optimizer, "global_clipnorm", None)
        if self._replicas == 1 or not (by_value or by_norm or by_global_norm):
            return gradients
        present = [g for g in gradients if g is not None]
        present = tf.distribute.get_replica_context().all_reduce(
            tf.distribute.ReduceOp.SUM, present
        )
        if by_value:
            present = [
                tf.clip_by_value(g, -by_value, by_value) for g in present
            ]
        elif by_norm:
            present = [tf.clip_by_norm(g, by_norm) for g in present]
        else:
            present, _ = tf.clip_by_global_norm(present, by_global_norm)
        # Keras sums over the replicas once more. Its own clipping leaves the
        # parts alone, as they are within the limit.
        parts = iter([g / self._replicas for g in present])
        return [None if g is None else next(parts) for g in gradients]


class CompiledMaskUpdate:
    """Does what `sos.wrappers.masked.update_masks` does, on a TPU.

    There nothing can run but compiled code inside `strategy.run`. The number of
    weights to keep is an argument of that code, so that there is one
    compilation for a ranking of single tensors; other rankings are compiled for
    each sparsity.
    """

    def __init__(self) -> None:
        self._strategy = tf.distribute.get_strategy()
        self._functions: dict[Any, Any] = {}

    def __call__(self, updates: dict[PruningWrapper, float]) -> None:
        """Ranks weights and sets their masks.

        Args:
            updates: The sparsity to reach, by wrapper.

        Raises:
            ValueError: If a score is NaN; all masks stay as they are.
        """
        if not updates:
            return
        jobs = _jobs(updates)
        counts = [
            keep_count(math.prod(weight.variable.shape), updates[wrapper])
            for wrapper, weight in jobs
        ]
        # Python sparsities are part of a compilation only where they must be.
        identity = (
            tuple(id(wrapper) for wrapper in updates),
            tuple(
                sparsity
                for wrapper, sparsity in updates.items()
                if not _ranks_by_count(wrapper.ranking)
            ),
        )
        if identity not in self._functions:
            self._functions[identity] = self._compile(dict(updates))
        nans = self._functions[identity](tf.constant(counts, tf.int32))
        nans = self._strategy.experimental_local_results(nans)[0].numpy()
        for (_, weight), nan in zip(jobs, nans, strict=True):
            refuse_nan(int(nan), f" of {weight.path}")

    def _compile(self, updates: dict[PruningWrapper, float]) -> Any:
        def step(counts: tf.Tensor) -> tuple[list[tf.Tensor], tf.Tensor]:
            return mask_update_step(updates, counts)

        def here(value: Any) -> tf.Tensor:
            return self._strategy.experimental_local_results(value)[0]

        @tf.function
        def update(counts: tf.Tensor) -> tf.Tensor:
            masks, nans = self._strategy.run(step, args=(counts,))
            nans = here(nans)
            refused = tf.reduce_sum(nans) > 0
            # Not on the replicas, where an assignment sends every mask to every
            # other replica, although all have the same.
            for (wrapper, weight), mask in zip(
                _jobs(updates), masks, strict=True
            ):
                old = weight.state["mask"].value
                wrapper.assign_mask(weight, tf.where(refused, old, here(mask)))
            return nans

        return update


def mask_update_step(
    updates: dict[PruningWrapper, float], counts: tf.Tensor
) -> tuple[list[tf.Tensor], tf.Tensor]:
    """Ranks weights, on one replica.

    Args:
        updates: The sparsity to reach, by wrapper.
        counts: int32 of shape [weights]: how many elements each weight keeps.

    Returns:
        The uint8 masks, one for each weight; and int32 of shape [weights], the
        number of scores that are NaN.
    """
    groups: dict[Any, list[tuple[PruningWrapper, SparseWeight, int]]] = {}
    for place, (wrapper, weight) in enumerate(_jobs(updates)):
        groups.setdefault(wrapper.ranking, []).append((wrapper, weight, place))
    masks: list[Any] = [None] * len(_jobs(updates))
    nans = list(masks)
    for ranking, members in groups.items():
        scores = [wrapper.scores(weight) for wrapper, weight, _ in members]
        if _ranks_by_count(ranking):
            found: Sequence[Any] = [
                top_k_mask_device(score, counts[i])
                for score, (_, _, i) in zip(scores, members, strict=True)
            ]
        else:
            found = ranking.masks(
                scores, [updates[wrapper] for wrapper, _, _ in members]
            )
        for (_, _, i), score, mask in zip(members, scores, found, strict=True):
            nans[i] = nan_count(score)
            masks[i] = tf.cast(mask, tf.uint8)
    return masks, tf.stack(nans)


def _jobs(
    updates: dict[PruningWrapper, float],
) -> list[tuple[PruningWrapper, SparseWeight]]:
    return [
        (wrapper, weight)
        for wrapper in updates
        for weight in wrapper.sparse_weights
    ]


def _ranks_by_count(ranking: Ranking) -> bool:
    # Of a subclass nobody knows what it does with the sparsity.
    return type(ranking) is PerTensorRanking
