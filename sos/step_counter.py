"""The training step, as every technique reads it."""

import weakref
from typing import Any

import keras
import tensorflow as tf


class StepCounter:
    """Reads the training step from the optimizer that an updater binds.

    The step is the optimizer's `iterations`: schedules, ramps and noise are
    functions of it, so nothing of theirs has to be saved and nothing can run
    out of step with training. It is a plain object, not a Keras one, so
    that neither the optimizer nor the counter is saved with the layer.

    Between `unbind` and the next `bind` there is no step, and a training call
    of a layer that needs one raises.
    """

    def __init__(self) -> None:
        self._optimizer = None
        self._owner = None
        #: Whether a gradient of the layer's penalty was computed, or traced,
        #: while an optimizer was bound.
        self.penalty_trained = False

    @property
    def bound(self) -> bool:
        """Whether an optimizer is bound, by an owner that still exists."""
        if self._owner is not None and self._owner() is None:
            self.unbind()
        return self._optimizer is not None

    def bound_by_another(self, owner: Any) -> bool:
        """Returns whether an owner other than this one has bound it."""
        return self.bound and self._owner is not None and not self._is(owner)

    @property
    def step(self) -> tf.Tensor:
        """The number of completed optimizer steps, an int32 scalar.

        It is read anew each time: `iterations` is computed when gradients are
        accumulated and belongs to the inner optimizer under loss scaling.

        Raises:
            RuntimeError: If no optimizer is bound.
        """
        if not self.bound:
            raise RuntimeError(
                "There is no training step, as no optimizer is bound. Train "
                "inside `with sos.SparsityUpdater(model, optimizer) as "
                "updater:` or pass `callbacks=[sos.SparsityCallback()]` to "
                "`fit`."
            )
        return tf.cast(
            keras.ops.convert_to_tensor(self._optimizer.iterations), tf.int32
        )

    def bind(
        self, optimizer: keras.optimizers.Optimizer, owner: Any = None
    ) -> None:
        """Makes `optimizer.iterations` the step.

        Args:
            optimizer: A Keras optimizer.
            owner: Who binds it, held weakly: a counter whose owner was lost in
                an error counts as not bound.

        Raises:
            RuntimeError: If another owner has bound it.
        """
        if self.bound_by_another(owner):
            raise RuntimeError("The step counter is bound by another owner.")
        self._optimizer = optimizer
        self._owner = None if owner is None else weakref.ref(owner)

    def unbind(self, owner: Any = None) -> None:
        """Forgets the optimizer.

        Args:
            owner: Who unbinds it. If another owner has bound it, it stays so.
        """
        if owner is not None and self.bound_by_another(owner):
            return
        self._optimizer = None
        self._owner = None

    def _is(self, owner: Any) -> bool:
        return self._owner is not None and self._owner() is owner
