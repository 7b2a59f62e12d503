"""How long compiled loops may be."""


class Pace:
    """Chooses the lengths of compiled loops, by how long a step takes.

    Nothing can interrupt a loop: neither a signal nor a save. So loops are
    bounded in steps and, once the duration of a step is known, in seconds. The
    first loop is of one step, and its duration, which includes tracing, says
    nothing; the second is of one step and measured.

    Args:
        max_steps: The number of steps in a loop, at most.
        max_seconds: The duration of a loop, at most and about.

    Attributes:
        traced: Whether a loop was made, so that durations mean something.

    Raises:
        ValueError: If a bound is not positive.
    """

    def __init__(self, *, max_steps: int, max_seconds: float) -> None:
        if max_steps < 1 or not max_seconds > 0:
            raise ValueError(
                "`steps_per_loop` must be at least 1 and "
                "`max_seconds_per_loop` positive. Received: "
                f"steps_per_loop={max_steps}, "
                f"max_seconds_per_loop={max_seconds}"
            )
        self._max_steps = max_steps
        self._max_seconds = max_seconds
        self._step_seconds: float | None = None
        self.traced = False

    def loop_end(self, step: int) -> int:
        """The step at which a loop that begins at a step ends, at the latest.

        Loops end at multiples of `max_steps`, wherever training began.
        """
        if self._step_seconds is None:
            limit = 1
        else:
            limit = max(1, int(self._max_seconds / self._step_seconds))
        return min(
            (step // self._max_steps + 1) * self._max_steps, step + limit
        )

    def measured(self, step_seconds: float) -> None:
        """Takes note of the last loop.

        Args:
            step_seconds: The duration of one of its steps.
        """
        if self.traced:
            self._step_seconds = step_seconds
        self.traced = True
