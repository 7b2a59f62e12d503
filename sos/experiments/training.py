"""Trains the runs of a study, those of one shape with one compiled step."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import keras
import numpy as np
import tensorflow as tf

from sos.driver import Driver, set_all
from sos.experiments.runs import Run
from sos.report import sparsity_report
from sos.surgery import sparsify
from sos.wrappers.base import find_wrappers

#: Called after every step with the number of steps done and the loss.
OnStep = Callable[[int, float], Any]

#: Makes a network from the shape of an image, the number of classes and a seed.
BuildModel = Callable[[Sequence[int], int, int], keras.Model]


class Data(Protocol):
    """Images and labels, as `sos.datasets.fashion_mnist.load` gives them."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    class_names: Sequence[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run gave; the fields are columns of the results table.

    Attributes:
        achieved_sparsity: Fraction of zeros in the weights made sparse, as
            evaluation sees them.
        model_sparsity: Fraction of zeros in all weights of the model.
        test_accuracy: Fraction of the test examples classified correctly.
        test_loss: Mean cross-entropy on the test examples, in nats.
        train_loss: Mean cross-entropy of the last tenth of the steps, in nats,
            without penalties and with the technique's noise.
        seconds: Duration of training and evaluation.
    """

    achieved_sparsity: float
    model_sparsity: float
    test_accuracy: float
    test_loss: float
    train_loss: float
    seconds: float


class Trainer:
    """Trains runs of one shape.

    The model, the optimizer and the compiled functions are made once. A run
    sets every variable anew, so that it computes what it would compute alone.

    Args:
        shape: A run whose `shape` all runs have.
        data: The examples.
        build_model: Makes the dense network from the shape of an image, the
            number of classes and a seed. Its layers must have names.
    """

    def __init__(
        self,
        shape: Run,
        data: Data,
        build_model: BuildModel,
    ) -> None:
        self.shape = shape.shape
        self._data = data
        self._build_model = build_model
        self.model = self._build(shape)
        self.optimizer = _make_optimizer(shape, self.model)
        self._optimizer_state = [
            keras.ops.convert_to_numpy(v) for v in self.optimizer.variables
        ]
        self._images = tf.constant(data.x_train)
        self._labels = tf.constant(data.y_train)
        self.train_step = tf.function(self._train_step)
        self.evaluation_step = tf.function(
            self._evaluation_step, reduce_retracing=True
        )

    def train(self, run: Run, on_step: OnStep | None = None) -> Outcome:
        """Trains and evaluates one run.

        Args:
            run: The run.
            on_step: Called after every step.

        Returns:
            What it gave.

        Raises:
            ValueError: If the run has another shape than this trainer.
            FloatingPointError: If the loss is not finite.
        """
        if run.shape != self.shape:
            raise ValueError(
                "The run must have the shape of the trainer. "
                f"Received: run={run}"
            )
        start = time.perf_counter()
        self._reset(run)
        losses = []
        with self._driver() as driver:
            for step in range(run.steps):
                loss = float(self.train_step(batch_indices(run, step)))
                if not math.isfinite(loss):
                    raise FloatingPointError(
                        f"The loss of the run {run.name} is {loss} at step "
                        f"{step}. A lower learning rate or penalty may help. "
                        f"Received: learning_rate={run.learning_rate}"
                    )
                if driver is not None:
                    driver.step()
                losses.append(loss)
                if on_step is not None:
                    on_step(step + 1, loss)
        accuracy, test_loss = self._evaluate()
        report = sparsity_report(self.model)
        return Outcome(
            achieved_sparsity=report.sparsity,
            model_sparsity=report.model_sparsity,
            test_accuracy=accuracy,
            test_loss=test_loss,
            train_loss=float(np.mean(losses[-math.ceil(run.steps / 10) :])),
            seconds=time.perf_counter() - start,
        )

    def _build(self, run: Run) -> keras.Model:
        model = self._build_model(
            self._data.x_train.shape[1:],
            len(self._data.class_names),
            run.seed,
        )
        if run.wrapper is None:
            return model
        return sparsify(
            model,
            run.wrapper,
            rules={run.keep_dense: None} if run.keep_dense else None,
            **run.technique_settings(),
        )

    def _reset(self, run: Run) -> None:
        """Puts everything into the state of a run that has not begun."""
        fresh = self._build(run)
        for own, new in zip(self.model.variables, fresh.variables, strict=True):
            if own.path != new.path:
                raise ValueError(
                    "`build_model` must give all layers the same names each "
                    f"time. Received: {own.path!r}, then {new.path!r}"
                )
            own.assign(keras.ops.convert_to_tensor(new))
        for own, value in zip(
            self.optimizer.variables, self._optimizer_state, strict=True
        ):
            own.assign(value)
        if run.sparsity is not None:
            set_all(self.model, schedule=run.technique_settings()["schedule"])

    def _driver(self) -> contextlib.AbstractContextManager:
        if find_wrappers(self.model):
            return Driver(self.model, self.optimizer)
        return contextlib.nullcontext()

    def _train_step(self, indices: tf.Tensor) -> tf.Tensor:
        images = tf.gather(self._images, indices)
        labels = tf.gather(self._labels, indices)
        with tf.GradientTape() as tape:
            logits = self.model(images, training=True)
            loss = tf.reduce_mean(_cross_entropy(labels, logits))
            objective = tf.add_n([loss, *self.model.losses])
        variables = self.model.trainable_variables
        self.optimizer.apply(tape.gradient(objective, variables), variables)
        return loss

    def _evaluation_step(
        self, images: tf.Tensor, labels: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        logits = self.model(images, training=False)
        correct = tf.argmax(logits, axis=-1, output_type=labels.dtype) == labels
        return (
            tf.reduce_sum(tf.cast(correct, tf.int32)),
            tf.reduce_sum(_cross_entropy(labels, logits)),
        )

    def _evaluate(self, batch_size: int = 1000) -> tuple[float, float]:
        """Accuracy and mean loss on all test examples."""
        images, labels = self._data.x_test, self._data.y_test
        correct, loss = 0, 0.0
        for i in range(0, len(labels), batch_size):
            batch = self.evaluation_step(
                tf.constant(images[i : i + batch_size]),
                tf.constant(labels[i : i + batch_size]),
            )
            correct += int(batch[0])
            loss += float(batch[1])
        return correct / len(labels), loss / len(labels)


def batch_indices(run: Run, step: int) -> tf.Tensor:
    """The training examples of a step: a function of seed, epoch and step.

    Every epoch has an order of its own; examples that do not fill a batch at
    its end are left out.

    Args:
        run: The run.
        step: The step, from 0 on.

    Returns:
        int32 of shape (batch_size,).
    """
    epoch, batch = divmod(step, run.train_examples // run.batch_size)
    generator = np.random.default_rng((run.seed, epoch))
    order = generator.permutation(run.train_examples)
    begin = batch * run.batch_size
    return tf.constant(order[begin : begin + run.batch_size], tf.int32)


class ScaledAdam(keras.optimizers.Adam):
    """Adam with a learning rate of its own for some variables.

    What a technique adds, such as log alpha, is no weight of a network: it has
    another scale and other distances to go.
    """

    def __init__(self, multipliers: dict[int, float], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._multipliers = multipliers

    def update_step(
        self, gradient: Any, variable: keras.Variable, learning_rate: Any
    ) -> None:
        """Updates one variable at its own rate."""
        factor = self._multipliers.get(_key(variable), 1.0)
        super().update_step(gradient, variable, learning_rate * factor)


def _make_optimizer(run: Run, model: keras.Model) -> keras.optimizers.Optimizer:
    multipliers = {
        _key(variable): run.learning_rate_multiplier
        for wrapper in find_wrappers(model)
        for weight in wrapper.sparse_weights
        for variable in weight.state.values()
        if variable.trainable
    }
    optimizer = ScaledAdam(
        multipliers,
        learning_rate=keras.optimizers.schedules.CosineDecay(
            run.learning_rate, run.steps
        ),
    )
    optimizer.build(model.trainable_variables)
    return optimizer


def _key(variable: Any) -> int:
    """The same for a Keras variable and the TensorFlow variable in it."""
    if isinstance(variable, keras.Variable):
        variable = variable.value
    return id(variable)


def _cross_entropy(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
