"""The training step that techniques read."""

import weakref
from typing import Any

import keras
import tensorflow as tf


class StepCounter:
    """Reads the training step from an optimizer.

    The step is the optimizer's `iterations`. Schedules, ramps and noise are
    functions of it, so they have no state to save, and always match training.
    The counter is not a Keras object, so that neither it nor the optimizer is
    saved with the layer.

    An updater binds the optimizer. Without one there is no step, and a training
    call of a layer that needs it raises an error.
    """

    def __init__(self) -> None:
        self._optimizer = None
        self._owner = None
        #: Whether a gradient of the layer's penalty was computed or traced
        #: while an optimizer was bound.
        self.penalty_trained = False

    @property
    def bound(self) -> bool:
        """Whether an optimizer is bound, and its owner still exists."""
        if self._owner is not None and self._owner() is None:
            self.unbind()
        return self._optimizer is not None

    def bound_by_another(self, owner: Any) -> bool:
        """Returns whether an owner other than `owner` has bound it."""
        return self.bound and self._owner is not None and not self._is(owner)

    @property
    def step(self) -> tf.Tensor:
        """Number of completed optimizer steps, an int32 scalar.

        `iterations` is read each time, not stored: with gradient accumulation
        it is a computed value, with loss scaling the inner optimizer's.

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
            owner: The object that binds it. The counter keeps a weak reference:
                once the owner is deleted, as after an error, it is not bound.

        Raises:
            RuntimeError: If another owner has bound it.
        """
        if self.bound_by_another(owner):
            raise RuntimeError("The step counter is bound by another owner.")
        self._optimizer = optimizer
        self._owner = None if owner is None else weakref.ref(owner)

    def unbind(self, owner: Any = None) -> None:
        """Releases the optimizer.

        Args:
            owner: The object that unbinds it. Nothing happens if another owner
                has bound it.
        """
        if owner is not None and self.bound_by_another(owner):
            return
        self._optimizer = None
        self._owner = None

    def _is(self, owner: Any) -> bool:
        return self._owner is not None and self._owner() is owner
