"""Pruning schedules: the sparsity of masks by training step.

`Schedule` wraps schedules of tensorflow-model-optimization (tfmot) and user
classes derived from its `PruningSchedule`. It adds exact values on the host,
serialisation and an update at the last step. A `RelativeSchedule` turns into a
`Schedule` when training begins and its length is known.

This is the only module that imports tfmot.
"""

import functools
import os
from types import ModuleType
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from sos.arguments import (
    check_integer,
    check_number,
    format_arguments,
    format_names,
    format_values,
    non_defaults,
)
from sos.errors import ArgumentError, UsageError


def _import_tfmot_schedules() -> ModuleType:
    """Imports `tfmot.sparsity.keras` and restores the environment.

    The import sets TF_USE_LEGACY_KERAS=1 for this process and its children,
    which turns `tf.keras` into Keras 2 if it was not used before.
    """
    name = "TF_USE_LEGACY_KERAS"
    before = os.environ.get(name)
    # The first use of `tf.keras` reads the variable. If tfmot was imported
    # before, it is a Keras 2 whose module has no version.
    getattr(tf.keras, "__version__", None)
    try:
        import tensorflow_model_optimization as tfmot
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before
    return tfmot.sparsity.keras


_tfmot = _import_tfmot_schedules()
PruningSchedule = _tfmot.PruningSchedule
PolynomialDecay = _tfmot.PolynomialDecay
ConstantSparsity = _tfmot.ConstantSparsity

# The classes whose formulas this module implements (not their subclasses), with
# the names of their final sparsity.
_TARGETS = {
    PolynomialDecay: "final_sparsity",
    ConstantSparsity: "target_sparsity",
}
_NAMES = {cls.__name__: cls for cls in _TARGETS}

#: Names of schedules in configs.
NAMES = ("polynomial", "constant")

# Default end of a polynomial schedule, as a fraction of the training steps.
_END = 0.75
# Approximate default number of updates of a polynomial schedule.
_UPDATES = 100
# Default steps between two updates of a constant schedule, as in tfmot.
_CONSTANT_FREQUENCY = 100
_TRAIN_STEPS = (
    "Train with `fit` and `callbacks=[sos.SparsityCallback()]` on data of "
    "known length (or with `steps_per_epoch`), in a loop with "
    "`sos.SparsityUpdater(model, optimizer, train_steps=...)`, or by a config "
    "with `train_steps`."
)


@keras.saving.register_keras_serializable(package="sos")
class Schedule:
    """A tfmot pruning schedule for training.

    It differs from the tfmot object in three points:

    - The update at `end_step` always takes place. tfmot, like the authors'
      library, updates only every `frequency` steps, and so misses the final
      sparsity if `frequency` does not divide the schedule's length.
    - Sparsities are computed in float64; in tfmot in float32. For
      `PolynomialDecay` s(t) = s_final + (s_init - s_final) * (1 - p)^power,
      where p = clip((t - begin) / (end - begin), 0, 1) (Zhu and Gupta 2017,
      arXiv 1710.01878).
    - It supports `from_config(get_config())` and Keras serialisation, which
      tfmot's objects do not.

    Schedules are equal if their classes and configs are.

    Args:
        inner: A tfmot schedule, or an object of a user class derived from
            `PruningSchedule`. To be saved, such a class must be registered
            with `@keras.saving.register_keras_serializable()`.

    Raises:
        TypeError: If `inner` is not a `PruningSchedule`.

    Example:
    >>> import sos
    >>> schedule = sos.schedules.Schedule(
    ...     sos.schedules.PolynomialDecay(
    ...         0.0, 0.9, begin_step=100, end_step=300
    ...     )
    ... )
    >>> [schedule.sparsity(step) for step in (100, 200, 300)]
    [0.0, 0.7875, 0.9]
    """

    def __init__(self, inner: PruningSchedule):
        if not isinstance(inner, PruningSchedule):
            raise ArgumentError(
                "`inner` must be a tfmot pruning schedule, such as "
                "`sos.schedules.PolynomialDecay(0.0, 0.9, begin_step=1000, "
                "end_step=5000)`, or an object of a class derived from "
                f"`PruningSchedule`. Received: inner={inner!r} of type "
                f"{type(inner).__name__}"
            )
        self.inner = inner

    @property
    def resolved(self) -> bool:
        """Whether the steps do not depend on the length of training."""
        return True

    def over(
        self,
        train_steps: int | None,
        *,
        start: int = 0,
        steps_per_execution: int = 1,
    ) -> "Schedule":
        """Returns the schedule for one training; itself if it is resolved.

        Args:
            train_steps: Number of optimizer steps of the training, None if
                unknown.
            start: Optimizer step at which the training begins.
            steps_per_execution: Largest number of optimizer steps between two
                opportunities to update masks.

        Raises:
            UsageError: If the schedule needs `train_steps`, or does not fit
                into them.
        """
        del train_steps, start, steps_per_execution
        return self

    @property
    def begin_step(self) -> int:
        """First step at which an update may take place."""
        return int(getattr(self.inner, "begin_step", 0))

    @property
    def end_step(self) -> int | None:
        """Step of the last update; None without an end, or if unknown."""
        end = getattr(self.inner, "end_step", None)
        return None if end is None or end < 0 else int(end)

    @property
    def frequency(self) -> int | None:
        """Steps between two regular updates, None if unknown."""
        frequency = getattr(self.inner, "frequency", None)
        return None if frequency is None else int(frequency)

    def steps(self) -> tuple[int, int, int] | None:
        """Returns begin, end and frequency; None without tfmot's polynomial."""
        if type(self.inner) is not PolynomialDecay:
            return None
        return self.begin_step, self.end_step, self.frequency

    @property
    def target_sparsity(self) -> float | None:
        """Final sparsity; None for a user's schedule without an end."""
        target = _TARGETS.get(type(self.inner))
        if target is not None:
            return float(getattr(self.inner, target))
        return None if self.end_step is None else self.sparsity(self.end_step)

    def due(self, step: int) -> bool:
        """Returns whether masks are updated at `step`.

        tfmot's classes update every `frequency` steps from `begin_step` to
        `end_step` (-1 for no end), and at `end_step`.
        """
        step = int(step)
        if step == self.end_step:
            return True
        if type(self.inner) not in _TARGETS:
            return bool(self._call(step)[0])
        begin, end = self.begin_step, self.end_step
        return (
            begin <= step
            and (end is None or step <= end)
            and (step - begin) % self.frequency == 0
        )

    def sparsity(self, step: int) -> float:
        """Returns the fraction of zeros that an update at `step` sets.

        Raises:
            UsageError: If a user's own schedule returns a value outside of
                [0, 1].
        """
        step = int(step)
        inner = self.inner
        if type(inner) is ConstantSparsity:
            return float(inner.target_sparsity)
        if type(inner) is PolynomialDecay:
            initial = float(inner.initial_sparsity)
            final = float(inner.final_sparsity)
            begin, end = self.begin_step, self.end_step
            # Compared first, as the length may be 0.
            if step >= end:
                return final
            if step <= begin:
                return initial
            p = (step - begin) / (end - begin)
            return final + (initial - final) * (1.0 - p) ** inner.power
        # The shortest decimal of the float32 that a user's schedule returns:
        # 0.9, not 0.89999998.
        sparsity = float(str(np.float32(self._call(step)[1])))
        if not 0.0 <= sparsity <= 1.0:
            raise UsageError(
                "A pruning schedule must return a sparsity in [0, 1]. "
                f"Received: sparsity={sparsity} at step={step} from {inner!r}"
            )
        return sparsity

    def _call(self, step: int) -> tuple[Any, Any]:
        """Calls a user's schedule eagerly."""
        with tf.init_scope():
            due, sparsity = self.inner(tf.constant(step, tf.int64))
            return np.asarray(due), np.asarray(sparsity)

    def due_steps(self, after: int, until: int) -> list[int]:
        """Returns the steps t with after < t <= until at which masks change.

        A user's schedule is called once per step of the range.
        """
        first, last = int(after) + 1, int(until)
        if type(self.inner) not in _TARGETS:
            return [t for t in range(first, last + 1) if self.due(t)]
        begin, end = self.begin_step, self.end_step
        frequency = self.frequency
        stop = last if end is None else min(last, end)
        skipped = -(-max(first - begin, 0) // frequency)  # rounded up
        steps = list(range(begin + skipped * frequency, stop + 1, frequency))
        if end is not None and first <= end <= last and end not in steps:
            steps.append(end)
        return steps

    def check_steps_per_execution(self, steps: int) -> None:
        """Checks that an execution of several steps skips no mask update.

        Args:
            steps: Training steps per execution, as in `compile`. One mask
                update can take place at the end of each.

        Raises:
            UsageError: If `frequency` is below `steps`.
        """
        if self.frequency is not None and self.frequency < steps:
            raise UsageError(
                f"The schedule updates masks every {self.frequency} steps, but "
                f"{steps} training steps run in one execution, which allows "
                f"one update. Choose a `frequency` of at least {steps}, or a "
                f"`steps_per_execution` of at most {self.frequency}. "
                f"Received: steps={steps}, frequency={self.frequency}"
            )

    def with_sparsity(self, sparsity: float) -> "Schedule":
        """Returns the schedule with another final sparsity.

        Args:
            sparsity: The new final (or constant) sparsity, in [0, 1).

        Raises:
            TypeError: If this is a user's schedule, whose formula is unknown.
            UsageError: If `sparsity` is out of range.
        """
        cls = type(self.inner)
        if cls not in _TARGETS:
            raise ArgumentError(
                f"The sparsity of a `{cls.__name__}` cannot be replaced, as "
                "its formula is unknown. Pass another `schedule` instead of a "
                f"sparsity. Received: sparsity={sparsity}"
            )
        sparsity = _check_sparsity("sparsity", sparsity)
        return Schedule(cls(**{**self._options(), _TARGETS[cls]: sparsity}))

    def _options(self) -> dict[str, Any]:
        """Returns the config of the inner schedule for its `from_config`."""
        options = self.inner.get_config()
        # tfmot nests the arguments in a dictionary that its own `from_config`
        # cannot read. User classes with another `from_config` can.
        inherited = (
            type(self.inner).from_config.__func__
            is PruningSchedule.from_config.__func__
        )
        if inherited and set(options) == {"class_name", "config"}:
            options = options["config"]
        return {
            key: value.item() if isinstance(value, np.generic) else value
            for key, value in options.items()
        }

    def get_config(self) -> dict[str, Any]:
        """Returns the name of the schedule's class and its own config.

        Raises:
            UsageError: If a user's class is not registered with Keras.
        """
        cls = type(self.inner)
        if cls in _TARGETS:
            name = cls.__name__
        else:
            name = keras.saving.get_registered_name(cls)
            registered = keras.saving.get_registered_object(name)
            if name in _NAMES or registered is not cls:
                raise UsageError(
                    f"The schedule class `{cls.__name__}` is not registered: "
                    "it could be saved but not loaded. Decorate it with "
                    "`@keras.saving.register_keras_serializable()`. "
                    f"Received: {self.inner!r}"
                )
        return {"schedule": name, "options": self._options()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Schedule":
        """Creates a schedule from the result of `get_config`.

        Raises:
            UsageError: If a user's class is not registered with Keras.
        """
        name = config["schedule"]
        inner = _NAMES.get(name) or keras.saving.get_registered_object(name)
        if inner is None:
            raise UsageError(
                f"There is no schedule class named {name!r}. Import the "
                "module that defines it, decorated with "
                "`@keras.saving.register_keras_serializable()`, before "
                "loading; or pass it in `custom_objects`. Built-in classes: "
                f"{sorted(_NAMES)}. Received: config={config}"
            )
        return cls(inner.from_config(config["options"]))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Schedule):
            return NotImplemented
        return (
            type(self.inner) is type(other.inner)
            and self._options() == other._options()
        )

    def __hash__(self) -> int:
        return hash(type(self.inner))

    def __repr__(self) -> str:
        arguments = (f"{k}={v!r}" for k, v in self._options().items())
        return f"Schedule({type(self.inner).__name__}({', '.join(arguments)}))"


@keras.saving.register_keras_serializable(package="sos")
class RelativeSchedule(Schedule):
    """A schedule whose steps depend on the length of training.

    `over` returns the schedule for one training. Before, steps and sparsities
    are unknown unless there is an `end_step`. The arguments are those of
    `make_schedule`.

    Raises:
        UsageError: As for `make_schedule`; later, if a step or sparsity is read
            before it is known.

    Example:
    >>> import sos
    >>> schedule = sos.schedules.RelativeSchedule(sparsity=0.9)
    >>> schedule.target_sparsity, schedule.resolved
    (0.9, False)
    >>> resolved = schedule.over(train_steps=1000)
    >>> resolved.begin_step, resolved.end_step, resolved.frequency
    (0, 750, 8)
    """

    def __init__(
        self,
        schedule: str = "polynomial",
        *,
        sparsity: float,
        initial_sparsity: float = 0.0,
        begin_step: int = 0,
        end_step: int | None = None,
        frequency: int | None = None,
        power: float = 3.0,
    ):
        self._name = schedule
        self._numbers = _check_numbers(
            schedule,
            sparsity=sparsity,
            initial_sparsity=initial_sparsity,
            begin_step=begin_step,
            end_step=end_step,
            frequency=frequency,
            power=power,
        )

    @property
    def inner(self) -> PruningSchedule:
        """The tfmot schedule, if it does not depend on `train_steps`."""
        return self.over(None).inner

    @property
    def resolved(self) -> bool:
        """False, as only `over` returns a resolved schedule."""
        return False

    @property
    def target_sparsity(self) -> float:
        """Final sparsity."""
        return self._numbers["sparsity"]

    def over(
        self,
        train_steps: int | None,
        *,
        start: int = 0,
        steps_per_execution: int = 1,
    ) -> Schedule:
        """Returns the schedule for one training.

        Without an `end_step` it ends after 75 % of the training steps (rounded)
        and begins at `start`, or at `begin_step` if that is later.

        Args:
            train_steps: As for `Schedule.over`.
            start: As for `Schedule.over`.
            steps_per_execution: Lower limit of the default `frequency`.

        Returns:
            The resolved schedule.

        Raises:
            UsageError: If `train_steps` is needed and None or below 1, or if
                `begin_step` is after the end.
        """
        numbers = dict(self._numbers)
        frequency = numbers["frequency"]
        if self._name == "constant":
            if frequency is None:
                frequency = max(_CONSTANT_FREQUENCY, steps_per_execution)
            return make_schedule(
                "constant",
                sparsity=numbers["sparsity"],
                begin_step=numbers["begin_step"],
                frequency=frequency,
            )
        if numbers["end_step"] is None:
            if train_steps is None:
                raise UsageError(
                    "The schedule depends on the number of training steps, "
                    f"which is unknown. {_TRAIN_STEPS} Or pass an `end_step`. "
                    f"Received: {self!r}, train_steps=None"
                )
            if train_steps == 0:
                raise UsageError(
                    "The training makes no optimizer step: it has fewer "
                    "batches than the optimizer accumulates "
                    "(`gradient_accumulation_steps`), or none. Train for more "
                    "epochs, or pass an `end_step`. Received: train_steps=0"
                )
            train_steps = check_integer("train_steps", train_steps, minimum=1)
            end = start + round(_END * train_steps)
            begin = max(numbers["begin_step"], start)
            if begin > end:
                raise UsageError(
                    f"`begin_step` must be at most {end}, where the schedule "
                    f"ends: after {_END:.0%} of the {train_steps} training "
                    f"steps from step {start}. Lower it, or pass an "
                    f"`end_step`. Received: begin_step={begin}, "
                    f"train_steps={train_steps}"
                )
            numbers.update(begin_step=begin, end_step=end)
        if frequency is None:
            length = numbers["end_step"] - numbers["begin_step"]
            frequency = max(1, round(length / _UPDATES), steps_per_execution)
        return make_schedule(**{**numbers, "frequency": frequency})

    def at(self, begin_step: int, end_step: int, frequency: int) -> Schedule:
        """Returns the schedule resolved by the steps of an earlier training.

        Args:
            begin_step: First step; ignored if the schedule has an `end_step`.
            end_step: Last step; ignored if the schedule has one.
            frequency: Frequency; ignored if the schedule has one.
        """
        if self._name == "constant":
            return self
        numbers = dict(self._numbers)
        if numbers["end_step"] is None:
            numbers.update(begin_step=begin_step, end_step=end_step)
        if numbers["frequency"] is None:
            numbers["frequency"] = frequency
        return make_schedule(**numbers)

    def with_sparsity(self, sparsity: float) -> Schedule:
        """Returns the schedule with another final sparsity.

        Args:
            sparsity: The new sparsity, in [0, 1).

        Raises:
            UsageError: If `sparsity` is out of range.
        """
        return make_schedule(**{**self.get_config(), "sparsity": sparsity})

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {"schedule": self._name, **self._numbers}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "RelativeSchedule":
        """Creates a schedule from the result of `get_config`."""
        return make_schedule(**config)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, RelativeSchedule)
            and self.get_config() == other.get_config()
        )

    def __hash__(self) -> int:
        return hash(tuple(self.get_config().items()))

    def __repr__(self) -> str:
        shown = ", ".join(f"{k}={v!r}" for k, v in self._numbers.items())
        return f"RelativeSchedule({self._name!r}, {shown})"


def as_schedule(schedule: Schedule | PruningSchedule) -> Schedule:
    """Converts a tfmot schedule to a `Schedule`; returns others as is.

    Args:
        schedule: The schedule.

    Raises:
        TypeError: If it is not a schedule.

    Example:
    >>> import sos
    >>> sos.schedules.as_schedule(
    ...     sos.schedules.ConstantSparsity(0.5, begin_step=0)
    ... ).sparsity(0)
    0.5
    """
    if isinstance(schedule, Schedule):
        return schedule
    if isinstance(schedule, PruningSchedule):
        return Schedule(schedule)
    raise ArgumentError(
        "`schedule` must be a `Schedule` or a tfmot pruning schedule, such as "
        "`sos.schedules.PolynomialDecay(0.0, 0.9, begin_step=1000, "
        "end_step=5000)` or `sos.schedules.ConstantSparsity(0.9, "
        f"begin_step=0)`. Received: schedule={schedule!r} of type "
        f"{type(schedule).__name__}"
    )


def make_schedule(
    schedule: str = "polynomial",
    *,
    sparsity: float,
    initial_sparsity: float = 0.0,
    begin_step: int = 0,
    end_step: int | None = None,
    frequency: int | None = None,
    power: float = 3.0,
) -> Schedule:
    """Creates a schedule from its name and numbers.

    - "polynomial": tfmot's `PolynomialDecay` (Zhu and Gupta 2017),
      s(t) = s_final + (s_init - s_final) * (1 - p)^power, where
      p = clip((t - begin) / (end - begin), 0, 1).
    - "constant": tfmot's `ConstantSparsity`; masks are updated until training
      ends.

    Args:
        schedule: The name.
        sparsity: Final fraction of zeros, in [0, 1).
        initial_sparsity: Fraction of zeros at `begin_step` of a polynomial
            schedule, in [0, 1).
        begin_step: Training step of the first mask update.
        end_step: Training step of the last mask update of a polynomial
            schedule; None for 75 % of the training steps.
        frequency: Training steps between two mask updates; None for about 100
            updates from `begin_step` to `end_step`, and for 100 steps under a
            constant schedule, but at least `steps_per_execution`.
        power: Exponent of the polynomial.

    Returns:
        A `Schedule`; a `RelativeSchedule` if its steps depend on the training.
        Equal arguments return the same object, so that layers share it.

    Raises:
        UsageError: If the name is unknown, or a number is out of range or does
            not fit the schedule.

    Example:
    >>> from sos.schedules import make_schedule
    >>> make_schedule("constant", sparsity=0.5, frequency=10).sparsity(0)
    0.5
    >>> schedule = make_schedule(sparsity=0.9, begin_step=100, end_step=300)
    >>> [schedule.sparsity(step) for step in (100, 200, 300)]
    [0.0, 0.7875, 0.9]
    >>> make_schedule(sparsity=0.9).over(train_steps=1000).end_step
    750
    """
    numbers = _check_numbers(
        schedule,
        sparsity=sparsity,
        initial_sparsity=initial_sparsity,
        begin_step=begin_step,
        end_step=end_step,
        frequency=frequency,
        power=power,
    )
    if numbers["frequency"] is not None:
        if schedule == "constant":
            names = ("sparsity", "begin_step", "frequency")
            return _constant(**{name: numbers[name] for name in names})
        if numbers["end_step"] is not None:
            return _polynomial(**numbers)
    return _relative(schedule, **numbers)


def _check_numbers(
    schedule: str,
    *,
    sparsity: float,
    initial_sparsity: float,
    begin_step: int,
    end_step: int | None,
    frequency: int | None,
    power: float,
) -> dict[str, Any]:
    """Returns the checked arguments of `make_schedule`, without the name."""
    if schedule not in NAMES:
        raise UsageError(
            f"`schedule` must be one of {format_values(NAMES)} or a schedule, "
            "such as `sos.schedules.PolynomialDecay(0.0, 0.9, begin_step=1000, "
            f"end_step=5000)`. Received: schedule={schedule!r}"
        )
    numbers = {
        "sparsity": _check_sparsity("sparsity", sparsity),
        "begin_step": check_integer("begin_step", begin_step),
        "frequency": frequency,
    }
    if frequency is not None:
        numbers["frequency"] = check_integer("frequency", frequency, minimum=1)
    polynomial = {
        "initial_sparsity": _check_sparsity(
            "initial_sparsity", initial_sparsity
        ),
        "end_step": end_step,
        "power": check_number("power", power, "[0, inf)"),
    }
    if end_step is not None:
        polynomial["end_step"] = check_integer("end_step", end_step)
        if numbers["begin_step"] > polynomial["end_step"]:
            raise UsageError(
                "`begin_step` must not be after `end_step`. Received: "
                f"begin_step={begin_step}, end_step={end_step}"
            )
    if schedule == "constant":
        excess = non_defaults(polynomial, make_schedule.__kwdefaults__)
        if excess:
            raise UsageError(
                f"A constant schedule takes no {format_names(excess)}. "
                "Choose schedule='polynomial' to use these numbers. "
                f"Received: schedule='constant', {format_arguments(excess)}"
            )
    return {**numbers, **polynomial}


def _check_sparsity(name: str, value: Any) -> float:
    return check_number(name, value, "[0, 1)", ", the fraction of zeros")


# Cached, so that layers with the same numbers share one schedule.
@functools.cache
def _relative(schedule: str, **numbers: Any) -> RelativeSchedule:
    return RelativeSchedule(schedule, **numbers)


@functools.cache
def _constant(*, sparsity: float, begin_step: int, frequency: int) -> Schedule:
    return Schedule(ConstantSparsity(sparsity, begin_step, frequency=frequency))


@functools.cache
def _polynomial(
    *,
    sparsity: float,
    initial_sparsity: float,
    begin_step: int,
    end_step: int,
    frequency: int,
    power: float,
) -> Schedule:
    return Schedule(
        PolynomialDecay(
            initial_sparsity,
            sparsity,
            begin_step,
            end_step,
            power=power,
            frequency=frequency,
        )
    )
