"""Compiled functions of training: steps, evaluation, summaries, masks."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from sos import keras_compat
from sos.errors import UsageError, reason
from sos.masks import check_not_nan, top_k_masks
from sos.noise import noise_scope
from sos.training.strategies import several_processes
from sos.training.task import Task, WeightedSum, check_metrics
from sos.wrappers import dead_weights
from sos.wrappers.base import SparseWrapper, find_wrappers
from sos.wrappers.compiled_masks import needs_only_counts, new_masks
from sos.wrappers.mask_changes import MaskChanges, total_changes
from sos.wrappers.masked import PruningWrapper
from sos.wrappers.penalized import PenalizedWrapper
from sos.wrappers.sparse_weight import SparseWeight

# TensorFlow's errors about a step that XLA cannot compile contain one of these.
_XLA_ERRORS = ("tf2xla conversion failed", "XLA_CPU_JIT", "XLA_GPU_JIT")
_UNSUPPORTED = "Detected unsupported operations"


@dataclasses.dataclass(frozen=True)
class Totals:
    """Metrics of several steps or evaluation batches, over all replicas.

    Attributes:
        names: The names of the metrics.
        sums: float32 of shape [steps, metrics, 2]: weighted sums and sums of
            weights.
        penalties: float32 of shape [steps]: sums of `model.losses` over the
            replicas and the parts of their batches; zeros in evaluation.
    """

    names: tuple[str, ...]
    sums: np.ndarray
    penalties: np.ndarray

    @classmethod
    def concatenate(cls, parts: Sequence["Totals"]) -> "Totals":
        """Concatenates the totals of successive loops."""
        return cls(
            names=parts[0].names,
            sums=np.concatenate([part.sums for part in parts]),
            penalties=np.concatenate([part.penalties for part in parts]),
        )

    def means(self) -> dict[str, float]:
        """Returns weighted means of the metrics; NaN if the weights are 0."""
        sums = self.sums.sum(axis=0, dtype=np.float64)
        return {
            name: float(total / weight) if weight else math.nan
            for name, (total, weight) in zip(self.names, sums, strict=True)
        }

    def first_non_finite(self) -> int | None:
        """Returns the index of the first step with a NaN or infinite loss."""
        losses = self.sums[:, self.names.index("loss")]
        # The sum is checked as well: without any weight the mean is zero.
        values = np.column_stack([losses, _means(losses), self.penalties])
        indices = np.flatnonzero(~np.isfinite(values).all(axis=1))
        return int(indices[0]) if len(indices) else None


def _means(totals: np.ndarray) -> np.ndarray:
    """Divides sums by weights as the devices do: x / 0 is 0."""
    sums, weights = totals.T
    with np.errstate(all="ignore"):
        return np.where(weights == 0, np.float32(0), sums / weights)


class Steps:
    """The compiled functions of one model and its optimizer.

    Create it in the strategy's scope. Functions that end in `_step` run on one
    replica, within `strategy.run`. Those that end in `_function` are the
    compiled functions around them. The host calls the others.

    The gradient is that of `loss + sum(model.losses)`, where the loss is the
    weighted mean over the whole batch: over all replicas and all parts of an
    accumulated gradient, even if their weights differ, as those of sentences
    do. `model.losses`, which may differ between replicas and parts, are
    averaged with the same weights. The gradient of a batch of weight 0 is zero.
    With several replicas gradients are clipped after they are summed; Keras
    would clip on each replica. A technique with `uses_gradient` gathers
    gradients of sums over examples, in which a step counts by the weight of its
    batch.

    Args:
        task: The task.
        model: The task's model.
        optimizer: The model's optimizer, built.
        gradient_accumulation_steps: Number of parts into which a replica's
            batch is split. They are computed one after the other.
        jit_compile: Whether to compile the training and evaluation steps with
            XLA, which needs one device. Default: only on a GPU. The default for
            a GPU has not been tried on a GPU yet. A TPU always compiles.

    Attributes:
        task: The task. It is called only while a function is traced.
        sparse_weights: Pairs of a wrapper and one of its sparse weights.
        jit_compile: Whether the steps are compiled with XLA.

    Raises:
        UsageError: If the optimizer accumulates gradients or scales the loss
            itself, the batch cannot be split evenly, or `jit_compile` is true
            for several replicas.
    """

    def __init__(
        self,
        task: Task,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
        *,
        gradient_accumulation_steps: int = 1,
        jit_compile: bool | None = None,
    ) -> None:
        self.task = task
        self._model = model
        self._optimizer = optimizer
        self._parts = gradient_accumulation_steps
        self._strategy = tf.distribute.get_strategy()
        self._replicas = self._strategy.num_replicas_in_sync
        self._check()
        self.jit_compile = _uses_xla(self._strategy, jit_compile)
        # Names of the metrics, by `training`; set while a step is traced.
        self._names: dict[bool, tuple[str, ...]] = {}
        self._replica_train_step, self._replica_eval_step = (
            tf.function(step, jit_compile=True) if self.jit_compile else step
            for step in (self.train_step, self.eval_step)
        )
        self.sparse_weights: list[tuple[SparseWrapper, SparseWeight]] = [
            (wrapper, weight)
            for wrapper in find_wrappers(model)
            for weight in wrapper.sparse_weights
        ]

    def _check(self) -> None:
        optimizer, parts = self._optimizer, self._parts
        if getattr(optimizer, "gradient_accumulation_steps", None):
            raise UsageError(
                "The optimizer must not accumulate gradients itself, which "
                "Keras cannot do under a strategy. Set "
                "`gradient_accumulation_steps` of the trainer instead. "
                "Received: gradient_accumulation_steps="
                f"{optimizer.gradient_accumulation_steps}"
            )
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            raise UsageError(
                "The optimizer must not scale the loss, because it would skip "
                "steps, on whose number the input depends. Use bfloat16, which "
                "needs no scaling. Received: a LossScaleOptimizer"
            )
        if optimizer.loss_scale_factor:
            raise UsageError(
                "The optimizer must not scale gradients, because the engine "
                "computes gradients of the loss itself. Received: "
                f"loss_scale_factor={optimizer.loss_scale_factor}"
            )
        if optimizer.use_ema and not optimizer.ema_overwrite_frequency:
            raise UsageError(
                "The optimizer's moving averages of the weights would be "
                "unused. Set its `ema_overwrite_frequency`, or remove "
                "`use_ema`. Received: use_ema=True"
            )
        overwrites = optimizer.use_ema and self._replicas > 1
        if overwrites and not isinstance(
            self._strategy, tf.distribute.TPUStrategy
        ):
            raise UsageError(
                "Keras can overwrite weights with their moving averages only "
                "on one device or on a TPU. Train on one device, or remove "
                f"`use_ema`. Received: use_ema=True on {self._replicas} "
                "replicas"
            )
        layers = keras_compat.all_layers(self._model)
        if any(layer.compute_dtype == "float16" for layer in layers):
            raise UsageError(
                "float16 needs loss scaling, which the engine does not do. Use "
                "bfloat16. Received: a model that computes in float16"
            )
        batch = self.task.batch_size
        if parts < 1 or batch % (self._replicas * parts):
            raise UsageError(
                "The batch size must be a multiple of the number of replicas "
                "times `gradient_accumulation_steps`. Received: "
                f"batch_size={batch}, {self._replicas} replicas, "
                f"gradient_accumulation_steps={parts}"
            )

    # On the host.

    def train(self, iterator: Iterator[Any], steps: int) -> Totals:
        """Runs optimizer steps and waits for them.

        Args:
            iterator: Yields a batch for every replica.
            steps: Number of steps, at least 1. A new number does not retrace.

        Returns:
            The totals of each step.

        Raises:
            UsageError: If XLA cannot compile the step.
        """
        return self._run(True, self.train_function, iterator, steps)

    def evaluate(self, iterator: Iterator[Any], batches: int) -> Totals:
        """Evaluates batches and waits for the result.

        Args:
            iterator: Yields a batch for every replica.
            batches: Number of batches for each replica, at least 1.

        Returns:
            The totals of each batch.

        Raises:
            UsageError: If XLA cannot compile the step.
        """
        return self._run(False, self.eval_function, iterator, batches)

    def _run(
        self, training: bool, function: Any, iterator: Any, steps: int
    ) -> Totals:
        try:
            outputs = function(iterator, tf.constant(steps, tf.int32))
            sums, penalties = (output.numpy() for output in outputs)
        except tf.errors.OpError as error:
            if not any(text in error.message for text in _XLA_ERRORS):
                raise
            step = "training" if training else "evaluation"
            raise UsageError(
                f"XLA cannot compile the {step} step: {_xla_reason(error)}. "
                "Train without XLA (`--nojit_compile`, in Python "
                "`jit_compile=False`), or move the operation to the input "
                "pipeline."
            ) from error
        return Totals(self._names[training], sums, penalties)

    def summary(self) -> tuple[dict[str, int], dict[str, float]]:
        """Counts zeros and computes penalties of the current weights.

        Returns:
            Number of zeros in evaluation, by weight path; and penalties of the
            weights that have one, by weight path, empty outside of training.
        """
        if not self.sparse_weights:
            return {}, {}
        # A function traced outside of training would always return zeros.
        training = any(
            wrapper.step_counter.bound for wrapper, _ in self.sparse_weights
        )
        zeros, penalties = (
            self._first(output).numpy()
            for output in self.summary_function(training)
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
            if training
            else {},
        )

    def weights_are_finite(self) -> bool:
        """Returns whether no variable of the model holds NaN or infinity."""
        return bool(self._first(self.finite_function()))

    def _first(self, output: Any) -> tf.Tensor:
        """Returns the first replica's output; all return the same."""
        return self._strategy.experimental_local_results(output)[0]

    # Compiled.

    @tf.function
    def train_function(
        self, iterator: Iterator[Any], steps: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Runs optimizer steps on all replicas.

        Args:
            iterator: Yields a batch for every replica.
            steps: int32 scalar, at least 1.

        Returns:
            Totals of shape [steps, metrics, 2] and penalties of shape [steps].
        """
        totals = tf.TensorArray(tf.float32, steps, element_shape=[None, 2])
        penalties = tf.TensorArray(tf.float32, steps, element_shape=[])
        for step in tf.range(steps):
            outputs = self._strategy.run(
                self._replica_train_step, args=(next(iterator),)
            )
            totals = totals.write(step, self._first(outputs[0]))
            penalties = penalties.write(step, self._first(outputs[1]))
        return totals.stack(), penalties.stack()

    @tf.function
    def eval_function(
        self, iterator: Iterator[Any], batches: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Evaluates batches on all replicas.

        Args:
            iterator: Yields a batch for every replica.
            batches: int32 scalar, at least 1.

        Returns:
            Totals of shape [batches, metrics, 2] and zeros of shape [batches].
        """
        totals = tf.TensorArray(tf.float32, batches, element_shape=[None, 2])
        for index in tf.range(batches):
            outputs = self._strategy.run(
                self._replica_eval_step, args=(next(iterator),)
            )
            totals = totals.write(index, self._first(outputs))
        return totals.stack(), tf.zeros([batches])

    @tf.function
    def summary_function(self, training: bool) -> tuple[tf.Tensor, tf.Tensor]:
        """Runs `summary_step`; `training` selects one of two traces."""
        del training
        return self._strategy.run(self.summary_step)

    @tf.function
    def finite_function(self) -> tf.Tensor:
        """Runs `finite_step`."""
        return self._strategy.run(self.finite_step)

    @tf.function
    def share_statistics(self) -> None:
        """Copies the first replica's batch statistics to all replicas.

        A checkpoint holds the first replica's. Copying makes an evaluation
        before saving equal to one of the checkpoint.
        """
        self._strategy.run(self.share_statistics_step)

    # On a replica.

    def train_step(self, batch: Any) -> tuple[tf.Tensor, tf.Tensor]:
        """Runs one optimizer step, on one replica.

        Args:
            batch: The replica's share of the batch.

        Returns:
            Totals, float32 of shape [metrics, 2], and the penalty, a float32
            scalar, both summed over all replicas.
        """
        variables = self._model.trainable_variables
        if self._parts == 1:
            gradients, totals, penalty = self._gradients(batch)
        else:
            gradients, totals, penalty = self._accumulated(batch)
        if self._replicas > 1:
            totals, penalty = self._sum_over_replicas([totals, penalty])
        loss_index = self._names[True].index("loss")
        scale = tf.math.divide_no_nan(1.0, totals[loss_index, 1])
        gradients = [
            None if g is None else g * tf.cast(scale, g.dtype)
            for g in gradients
        ]
        self._optimizer.apply(self._clipped(gradients), variables)
        return totals, penalty

    def eval_step(self, batch: Any) -> tf.Tensor:
        """Evaluates one batch, on one replica.

        Args:
            batch: The replica's share of the batch.

        Returns:
            Totals, float32 of shape [metrics, 2], summed over all replicas.
        """
        metrics = self._metrics(batch, training=False)
        totals = self._totals(metrics, training=False)
        if self._replicas > 1:
            totals = self._sum_over_replicas(totals)
        return totals

    def summary_step(self) -> tuple[tf.Tensor, tf.Tensor]:
        """Counts zeros and computes penalties, on one replica.

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
        """Assigns the first replica's batch statistics, on one replica."""
        context = tf.distribute.get_replica_context()
        first = tf.equal(context.replica_id_in_sync_group, 0)
        for variable in self._model.non_trainable_variables:
            # Others are equal on all replicas, or are summed over them.
            if variable.aggregation == "none" and _is_floating(variable):
                value = variable.value
                value = tf.where(first, value, tf.zeros_like(value))
                variable.assign(self._sum_over_replicas(value))

    def finite_step(self) -> tf.Tensor:
        """Returns whether all variables are finite, on one replica."""
        finite = [
            tf.reduce_all(tf.math.is_finite(variable.value))
            for variable in self._model.variables
            if _is_floating(variable)
        ]
        return tf.reduce_all(tf.stack(finite))

    def _sum_over_replicas(self, values: Any) -> Any:
        return tf.distribute.get_replica_context().all_reduce(
            tf.distribute.ReduceOp.SUM, values
        )

    def _gradients(self, batch: Any) -> tuple[list[Any], tf.Tensor, tf.Tensor]:
        """Returns the gradients of the batch's sum, its totals and its penalty.

        Sums can be added over parts, replicas and steps. `train_step` divides
        them by the total weight.
        """
        variables = self._model.trainable_variables
        with tf.GradientTape() as tape:
            metrics = self._metrics(batch, training=True)
            objective, weight = metrics["loss"]
            # Activity losses may be bfloat16.
            losses = [tf.cast(x, tf.float32) for x in self._model.losses]
            penalty = tf.add_n(losses) if losses else tf.zeros([])
            objective += tf.cast(
                tf.stop_gradient(tf.cast(weight, penalty.dtype)) * penalty,
                objective.dtype,
            )
        # Dense, because for an embedding's row Keras's Adam squares each
        # occurrence instead of their sum.
        gradients = [
            None if g is None else tf.convert_to_tensor(g)
            for g in tape.gradient(objective, variables)
        ]
        return gradients, self._totals(metrics, training=True), penalty

    def _accumulated(
        self, batch: Any
    ) -> tuple[list[Any], tf.Tensor, tf.Tensor]:
        """Computes `_gradients` part by part."""
        sums: list[Any] = []
        totals = tf.zeros([])
        penalties = tf.zeros([])
        for index in range(self._parts):
            # One after the other, so that memory holds the activations of only
            # one part. Each part has its own activation noise.
            previous = [g for g in sums if g is not None]
            with (
                tf.control_dependencies(previous),
                noise_scope(f"accumulation_step_{index}"),
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
        size = tensor.shape[0] // self._parts
        return tf.identity(tensor[index * size : (index + 1) * size])

    def _metrics(self, batch: Any, training: bool) -> dict[str, WeightedSum]:
        metrics = self.task.compute_metrics(
            self._model, batch, training=training
        )
        self._names[training] = check_metrics(
            self.task, metrics, self._names.get(training)
        )
        return metrics

    def _totals(
        self, metrics: dict[str, WeightedSum], training: bool
    ) -> tf.Tensor:
        """Returns sums and weights, float32 of shape [metrics, 2]."""
        return tf.stack(
            [
                tf.stack([tf.cast(x, tf.float32) for x in metrics[name]])
                for name in self._names[training]
            ]
        )

    def _clipped(self, gradients: list[Any]) -> list[Any]:
        """Returns gradients whose sum over the replicas is clipped."""
        optimizer = self._optimizer
        by_value = getattr(optimizer, "clipvalue", None)
        by_norm = getattr(optimizer, "clipnorm", None)
        by_global_norm = getattr(optimizer, "global_clipnorm", None)
        if self._replicas == 1 or not (by_value or by_norm or by_global_norm):
            return gradients
        present = [g for g in gradients if g is not None]
        present = self._sum_over_replicas(present)
        if by_value:
            present = [
                tf.clip_by_value(g, -by_value, by_value) for g in present
            ]
        elif by_norm:
            present = [tf.clip_by_norm(g, by_norm) for g in present]
        else:
            present, _ = tf.clip_by_global_norm(present, by_global_norm)
        # Keras sums over the replicas again. Its clipping does not change these
        # parts, because they are within the limit.
        parts = iter([g / self._replicas for g in present])
        return [None if g is None else next(parts) for g in gradients]


def _is_floating(variable: keras.Variable) -> bool:
    return tf.as_dtype(variable.dtype).is_floating


def _uses_xla(
    strategy: tf.distribute.Strategy, jit_compile: bool | None
) -> bool:
    """Resolves `jit_compile` for a strategy; raises if it cannot be true."""
    replicas = strategy.num_replicas_in_sync
    if isinstance(strategy, tf.distribute.TPUStrategy):
        if jit_compile:
            raise UsageError(
                "A TPU compiles every step with XLA anyway. Remove "
                "`--jit_compile`. Received: jit_compile=True"
            )
        return False
    if replicas > 1 or several_processes(strategy):
        if jit_compile:
            raise UsageError(
                "XLA compiles the step of one device only. Train with "
                "`--nojit_compile` (in Python `jit_compile=False`), or on one "
                "device (`--strategy=one_device`). Received: jit_compile=True "
                f"with {replicas} replicas"
            )
        return False
    if jit_compile is not None:
        return jit_compile
    if tf.distribute.has_strategy():
        devices = strategy.extended.worker_devices
    else:
        # TensorFlow's default strategy does not list its device.
        devices = [device.name for device in tf.config.list_logical_devices()]
    return any("GPU" in name for name in devices)


def _xla_reason(error: tf.errors.OpError) -> str:
    """Returns the line of an error that names the operation."""
    lines = [line.strip() for line in error.message.splitlines()]
    for line in lines:
        if _UNSUPPORTED in line:
            # Without the name of the graph and the repeated node.
            line = line.split("_JIT: ", 1)[-1].split("{{node", 1)[0]
            return line.strip().rstrip(".") + ")" * (
                line.count("(") - line.count(")")
            )
    return reason(error)


class CompiledMaskUpdate:
    """Updates masks on a TPU, as `update_masks` does on other devices.

    A TPU runs only compiled code inside `strategy.run`. The number of weights
    to keep is an argument of that code, so a ranking of single tensors is
    compiled once. Other rankings are compiled for each sparsity.
    """

    def __init__(self) -> None:
        self._strategy = tf.distribute.get_strategy()
        self._functions: dict[Any, Any] = {}

    def __call__(
        self, updates: dict[PruningWrapper, float]
    ) -> MaskChanges | None:
        """Ranks weights and sets their masks.

        Args:
            updates: Target sparsity by wrapper.

        Returns:
            As `update_masks`.

        Warns:
            UserWarning: As `update_masks`.

        Raises:
            ValueError: If a score is NaN. All masks are unchanged.
        """
        pairs = _weights(updates)
        if not pairs:
            return None
        counts = [
            wrapper.ranking.keep_count(
                math.prod(weight.variable.shape), updates[wrapper]
            )
            if needs_only_counts(wrapper.ranking)
            else 0
            for wrapper, weight in pairs
        ]
        # A Python sparsity is part of the compiled code only if it must be.
        key = (
            tuple((id(wrapper), wrapper.ranking) for wrapper in updates),
            tuple(
                sparsity
                for wrapper, sparsity in updates.items()
                if not needs_only_counts(wrapper.ranking)
            ),
        )
        if key not in self._functions:
            self._functions[key] = self.compile(dict(updates))
        statistics = self._functions[key](tf.constant(counts, tf.int32))
        statistics = self._strategy.experimental_local_results(statistics)[
            0
        ].numpy()
        for (_, weight), nans in zip(pairs, statistics[:, 0], strict=True):
            check_not_nan(int(nans), f" of {weight.path}")
        for (wrapper, weight), (_, undecided, kept, _, _) in zip(
            pairs, statistics, strict=True
        ):
            dead_weights.after_update(
                wrapper,
                weight,
                updates[wrapper],
                undecided=bool(undecided),
                any_left=kept > 0,
            )
        return total_changes(
            (weight for _, weight in pairs), statistics[:, 2:].tolist()
        )

    def compile(self, updates: dict[PruningWrapper, float]) -> Any:
        """Returns the compiled function of an update.

        Args:
            updates: Target sparsity by wrapper.

        Returns:
            A `tf.function` that takes the numbers of elements to keep, int32 of
            shape [weights], sets the masks, and returns the second output of
            `mask_update_step`.
        """

        def step(counts: tf.Tensor) -> tuple[list[tf.Tensor], tf.Tensor]:
            return mask_update_step(updates, counts)

        def first_replica(value: Any) -> tf.Tensor:
            return self._strategy.experimental_local_results(value)[0]

        @tf.function
        def update(counts: tf.Tensor) -> tf.Tensor:
            masks, statistics = self._strategy.run(step, args=(counts,))
            statistics = first_replica(statistics)
            invalid = tf.reduce_sum(statistics[:, 0]) > 0
            # Not on the replicas, where an assignment would send every mask to
            # every other replica, although all are equal.
            for (wrapper, weight), mask in zip(
                _weights(updates), masks, strict=True
            ):
                old = weight.state["mask"].value
                new = tf.where(invalid, old, first_replica(mask))
                wrapper.assign_mask(weight, new)
            return statistics

        return update


def mask_update_step(
    updates: dict[PruningWrapper, float], counts: tf.Tensor
) -> tuple[list[tf.Tensor], tf.Tensor]:
    """Ranks weights, on one replica.

    Args:
        updates: Target sparsity by wrapper.
        counts: Number of elements that each weight keeps, int32 of shape
            [weights].

    Returns:
        The output of `new_masks` for all weights.
    """
    pairs = _weights(updates)
    groups: dict[Any, list[tuple[PruningWrapper, SparseWeight, int]]] = {}
    for index, (wrapper, weight) in enumerate(pairs):
        groups.setdefault(wrapper.ranking, []).append((wrapper, weight, index))
    masks: list[Any] = [None] * len(pairs)
    statistics = list(masks)
    for ranking, members in groups.items():
        scores = [wrapper.scores(weight) for wrapper, weight, _ in members]
        indices = [index for _, _, index in members]
        if needs_only_counts(ranking):
            ranked, _ = top_k_masks(scores, tf.gather(counts, indices))
        else:
            ranked = ranking.masks(
                scores, [updates[wrapper] for wrapper, _, _ in members]
            )
        group_masks, group_statistics = new_masks(
            ranking,
            scores,
            [tf.cast(mask, tf.uint8) for mask in ranked],
            [weight.state["mask"].value for _, weight, _ in members],
            [wrapper.cumulative for wrapper, _, _ in members],
        )
        for index, mask, row in zip(
            indices, group_masks, tf.unstack(group_statistics), strict=True
        ):
            masks[index], statistics[index] = mask, row
    return masks, tf.stack(statistics)


def _weights(
    updates: dict[PruningWrapper, float],
) -> list[tuple[PruningWrapper, SparseWeight]]:
    return [
        (wrapper, weight)
        for wrapper in updates
        for weight in wrapper.sparse_weights
    ]
