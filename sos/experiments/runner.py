"""Trains the runs of a study, those of one shape with one compiled step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np

from sos.driver import set_all
from sos.experiments.classification import BuildModel, Classification, Data
from sos.experiments.results import Outcome, weight_sparsities
from sos.experiments.runs import Run
from sos.report import sparsity_report
from sos.training.checkpoints import (
    Checkpoints,
    canonical_path,
    remove_unfinished,
)
from sos.training.memory import PeakMemory
from sos.training.reporting import Summary
from sos.training.signals import StopSource
from sos.training.strategies import make_strategy
from sos.training.trainer import Trainer

_SAVE_EVERY = 1000


class Runner:
    """Trains runs of one shape.

    The model, the optimizer and the compiled functions are made once. A run
    sets every variable anew, so that it computes what it would compute alone.

    Args:
        shape: A run whose `shape` all runs have.
        data: The examples.
        build_model: Makes the dense network from the shape of an image, the
            number of classes and a seed. Its layers must have names.
        steps_per_loop: The number of steps between two records, at most.
    """

    def __init__(
        self,
        shape: Run,
        data: Data,
        build_model: BuildModel,
        *,
        steps_per_loop: int = 50,
    ) -> None:
        self.shape = shape.shape
        strategy = make_strategy("one_device")
        with strategy.scope():
            self._task = Classification(shape, data, build_model)
        self.trainer = Trainer(
            self._task, strategy=strategy, steps_per_loop=steps_per_loop
        )
        self._warm = False
        self._optimizer_state = [
            keras.ops.convert_to_numpy(v)
            for v in self.trainer.optimizer.variables
        ]

    def train(
        self,
        run: Run,
        *,
        checkpoints: Path | None = None,
        on_summary: Callable[[Summary], Any] | None = None,
        stop: StopSource | None = None,
    ) -> Outcome:
        """Trains and evaluates one run.

        Args:
            run: The run.
            checkpoints: A directory of its own, where it is saved when it is
                stopped and in the end, and goes on from.
            on_summary: Called after every loop.
            stop: Tells when to stop before the end.

        Returns:
            What the run gave. If it was stopped in between, its peak memory is
            that since then.

        Raises:
            ValueError: If the run has another shape than this trainer.
            NonFiniteLossError: If the loss is not finite.
            Stopped: If it was asked to stop.
            CheckpointError: If a checkpoint cannot be written, or the one that
                is there is of something else.
        """
        if run.shape != self.shape:
            raise ValueError(
                "The run must have the shape of the runner. "
                f"Received: run={run}"
            )
        if not self._warm:
            # So that the first run's duration is like that of the others.
            self._reset(run)
            self.trainer.train(1)
            self.trainer.evaluate()
            self._warm = True
        with PeakMemory() as memory:
            self._reset(run)
            self._train(run, checkpoints, on_summary, stop)
            evaluated = self.trainer.evaluate(stop=stop)
            report = sparsity_report(self.trainer.model)
        return Outcome(
            achieved_sparsity=report.sparsity,
            model_sparsity=report.model_sparsity,
            test_accuracy=evaluated.metrics["accuracy"],
            test_loss=evaluated.metrics["loss"],
            seconds=self.trainer.seconds + evaluated.seconds,
            peak_memory=memory.host,
            parameters_trained=sum(
                int(np.prod(v.shape))
                for v in self.trainer.model.trainable_variables
            ),
            weights=weight_sparsities(report),
        )

    def _train(
        self,
        run: Run,
        directory: Path | None,
        on_summary: Callable[[Summary], Any] | None,
        stop: StopSource | None,
    ) -> None:
        checkpoints = None
        if directory is not None:
            checkpoints = Checkpoints(
                directory, configuration=self.trainer.configuration(), keep=1
            )
            remove_unfinished(directory)
            self.trainer.restore(checkpoints)
        self.trainer.train(
            run.steps,
            checkpoints=checkpoints,
            save_every=_SAVE_EVERY,
            on_summary=[on_summary] if on_summary else [],
            stop=stop,
        )

    def _reset(self, run: Run) -> None:
        """Puts everything into the state of a run that has not begun."""
        self._task.run = run
        trainer = self.trainer
        with trainer.strategy.scope():
            fresh = self._task.build_model()
        for own, new in zip(
            trainer.model.variables, fresh.variables, strict=True
        ):
            if canonical_path(own.path) != canonical_path(new.path):
                raise ValueError(
                    "`build_model` must give all layers the same names each "
                    f"time. Received: {own.path!r}, then {new.path!r}"
                )
            own.assign(keras.ops.convert_to_tensor(new))
        for own, value in zip(
            trainer.optimizer.variables, self._optimizer_state, strict=True
        ):
            own.assign(value)
        trainer.seconds = 0.0
        trainer.saved_step = None
        if run.sparsity is not None:
            set_all(
                trainer.model, schedule=run.technique_settings()["schedule"]
            )
