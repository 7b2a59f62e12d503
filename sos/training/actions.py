"""What the host does between two steps."""

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Action:
    """Something that the host does between two steps.

    It is done at most once: if the process ends after a checkpoint is saved and
    before the actions of its step, they are not made up for after a restart.

    Attributes:
        call: What is done; called with the trainer.
        every: Do it whenever this many more steps are done.
        at: Do it after these numbers of steps.
        at_end: Do it after the last step.

    Raises:
        ValueError: If `every` is below 1.
    """

    call: Callable[[Any], Any]
    every: int | None = None
    at: tuple[int, ...] = ()
    at_end: bool = False

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise ValueError(
                f"`every` must be at least 1. Received: every={self.every}"
            )

    def next_after(self, step: int) -> int | None:
        """The first step after a step at which it is due, but for the end."""
        steps = [s for s in self.at if s > step]
        if self.every is not None:
            steps.append((step // self.every + 1) * self.every)
        return min(steps, default=None)

    def due(self, step: int, last: int) -> bool:
        """Whether it is due after a step."""
        return self.next_after(step - 1) == step or (
            self.at_end and step == last
        )
