"""When to prune, and how much.

Pruning schedules are tfmot's, and so are any that a user derived from its
`PruningSchedule`. `Schedule` adapts them to what training needs: exact values
on the host, serialisation, and no lost last update. `RelativeSchedule` becomes
one when training begins and its length is known.

This is the only module that imports tensorflow-model-optimization (tfmot).
"""

import functools
import os
from types import ModuleType
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from sos.arguments import (
    changed,
    check_integer,
    check_number,
    listed,
    quoted,
    received,
)
from sos.errors import ArgumentError, UsageError


def _import_tfmot_schedules() -> ModuleType:
    """Returns `tfmot.sparsity.keras`, with no trace left in the process.

    Importing tfmot sets TF_USE_LEGACY_KERAS=1 for this process and its
    children, which turns `tf.keras` into Keras 2 wherever it was not used yet.
    """
    name = "TF_USE_LEGACY_KERAS"
    before = os.environ.get(name)
    # `tf.keras` is loaded at its first use, by what the environment says then.
    _ = tf.keras.__version__
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

# The classes whose formulas are known here, and which of their arguments is
# the sparsity that they end with. A subclass may compute anything.
_TARGETS = {
    PolynomialDecay: "final_sparsity",
    ConstantSparsity: "target_sparsity",
}
_NAMES = {cls.__name__: cls for cls in _TARGETS}

#: The schedules that have a name, as configs give it.
NAMES = ("polynomial", "constant")

# Where a polynomial schedule ends by default, as a fraction of the training.
_END = 0.75
# About how many updates there are by default.
_UPDATES = 100
# Steps between two updates of a constant schedule by default, as tfmot's.
_CONSTANT_FREQUENCY = 100
_TRAIN_STEPS = (
    "Train with `fit` and `callbacks=[sos.SparsityCallback()]` on data of "
    "known length (or with `steps_per_epoch`), in a loop with "
    "`sos.SparsityUpdater(model, optimizer, train_steps=...)`, or by a config "
    "with `train_steps`."
)


@keras.saving.register_keras_serializable(package="sos")
class Schedule:
    """A tfmot pruning schedule, as training uses it.

    It differs from the tfmot object in three points:

    - The update at `end_step` always takes place. tfmot, as the authors'
      library, updates only every `frequency` steps, and so misses the final
      sparsity when `frequency` does not divide the schedule's length.
    - Sparsities are computed in float64, for tfmot's two classes from
      s(t) = s_final + (s_init - s_final) * (1 - p)^power, where
      p = clip((t - begin) / (end - begin), 0, 1) (Zhu and Gupta 2017,
      arXiv 1710.01878). tfmot computes in float32.
    - It survives `from_config(get_config())` and Keras serialisation, which
      tfmot's objects do not.

    Two schedules are equal if their classes and configs are.

    Args:
        inner: A tfmot schedule, or an object of your own class derived from
            `PruningSchedule`. To be saved, such a class must be registered
            with `@keras.saving.register_keras_serializable()`.

    Raises:
        TypeError: If `inner` is not a `PruningSchedule`.
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
        """Whether all steps are known, whatever training it is used in."""
        return True

    def over(
        self,
        train_steps: int | None,
        *,
        start: int = 0,
        steps_per_execution: int = 1,
    ) -> "Schedule":
        """Returns the schedule for one training: itself, if it is resolved.

        Args:
            train_steps: Number of optimizer steps of the training; None if it
                is not known.
            start: The optimizer's step at which the training begins.
            steps_per_execution: Optimizer steps between two chances to update
                masks, at most.

        Raises:
            UsageError: If the schedule needs `train_steps`, or does not fit
                into them.
        """
        del train_steps, start, steps_per_execution
        return self

    @property
    def begin_step(self) -> int:
        """The first step at which an update may take place."""
        return int(getattr(self.inner, "begin_step", 0))

    @property
    def end_step(self) -> int | None:
        """The step of the last update; None if endless or not known."""
        end = getattr(self.inner, "end_step", None)
        return None if end is None or end < 0 else int(end)

    @property
    def frequency(self) -> int | None:
        """Steps from one regular update to the next; None if not known."""
        frequency = getattr(self.inner, "frequency", None)
        return None if frequency is None else int(frequency)

    def steps(self) -> tuple[int, int, int] | None:
        """Returns begin, end and frequency of tfmot's `PolynomialDecay`.

        They are None for all other schedules.
        """
        if type(self.inner) is not PolynomialDecay:
            return None
        return self.begin_step, self.end_step, self.frequency

    @property
    def target_sparsity(self) -> float | None:
        """The sparsity to end with; None for a user's endless schedule."""
        target = _TARGETS.get(type(self.inner))
        if target is not None:
            return float(getattr(self.inner, target))
        return None if self.end_step is None else self.sparsity(self.end_step)

    def due(self, step: int) -> bool:
        """Returns whether masks are updated at `step`.

        For tfmot's classes that is every `frequency` steps from `begin_step`
        to `end_step` (without end if that is -1), and at `end_step`.
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
            # The ends come first, as a schedule may have the length 0.
            if step >= end:
                return final
            if step <= begin:
                return initial
            p = (step - begin) / (end - begin)
            return final + (initial - final) * (1.0 - p) ** inner.power
        # A user's schedule computes in float32, and means 0.9 where it returns
        # 0.89999998: the shortest decimal that names the same float32.
        sparsity = float(str(np.float32(self._call(step)[1])))
        if not 0.0 <= sparsity <= 1.0:
            raise UsageError(
                "A pruning schedule must return a sparsity in [0, 1]. "
                f"Received: sparsity={sparsity} at step={step} from {inner!r}"
            )
        return sparsity

    def _call(self, step: int) -> tuple[Any, Any]:
        """Calls a schedule whose formula is not known here, eagerly."""
        with tf.init_scope():
            due, sparsity = self.inner(tf.constant(step, tf.int64))
            return np.asarray(due), np.asarray(sparsity)

    def due_steps(self, after: int, until: int) -> list[int]:
        """Returns the steps t with after < t <= until at which masks change.

        A user's own schedule is called once per step of the range.
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
        """Raises an error if blocks of steps would skip updates.

        Args:
            steps: Number of training steps in a block, such as
                `steps_per_execution` of `compile`. Only one mask update can
                take place per block, at its end.

        Raises:
            UsageError: If `frequency` is smaller than that.
        """
        if self.frequency is not None and self.frequency < steps:
            raise UsageError(
                f"The schedule updates masks every {self.frequency} steps, but "
                f"{steps} training steps run as one block, with room for one "
                "update only. Choose a `frequency` of at least "
                f"{steps}, or a `steps_per_execution` of at most "
                f"{self.frequency}. Received: steps={steps}, "
                f"frequency={self.frequency}"
            )

    def with_sparsity(self, sparsity: float) -> "Schedule":
        """Returns the same schedule with another sparsity to end with.

        Args:
            sparsity: The new final (or constant) sparsity, in [0, 1).

        Raises:
            TypeError: If this is a user's own schedule, as nobody else knows
                what it computes.
            UsageError: If `sparsity` is out of range.
        """
        cls = type(self.inner)
        if cls not in _TARGETS:
            raise ArgumentError(
                f"The sparsity of a `{cls.__name__}` cannot be replaced, as "
                "only tfmot's own schedules are known here. Give the weight a "
                "schedule of its own, not a sparsity. Received: "
                f"sparsity={sparsity}"
            )
        sparsity = _check_sparsity("sparsity", sparsity)
        return Schedule(cls(**{**self._options(), _TARGETS[cls]: sparsity}))

    def _options(self) -> dict[str, Any]:
        """Returns the config of the inner schedule for its `from_config`."""
        options = self.inner.get_config()
        # tfmot nests the arguments in a dict that its own `from_config` cannot
        # read. A class with another `from_config` gets what it wrote.
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
                    f"The schedule class `{cls.__name__}` is not registered, "
                    "so it could be saved but not loaded. Put "
                    "`@keras.saving.register_keras_serializable()` in front "
                    f"of it. Received: {self.inner!r}"
                )
        return {"schedule": name, "options": self._options()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Schedule":
        """Returns a schedule made from the result of `get_config`.

        Raises:
            UsageError: If the class is a user's and not registered with Keras.
        """
        name = config["schedule"]
        inner = _NAMES.get(name) or keras.saving.get_registered_object(name)
        if inner is None:
            raise UsageError(
                f"There is no schedule class named {name!r}. Import the "
                "module that defines it, with "
                "`@keras.saving.register_keras_serializable()` in front of "
                "the class, before loading; or pass it in `custom_objects`. "
                f"Known without that: {sorted(_NAMES)}. Received: "
                f"config={config}"
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
    """A schedule with steps that follow from the length of training.

    `over` returns the schedule of one training. Until then the sparsity at a
    step is unknown, except if there is an `end_step`: then only the default of
    `frequency` depends on the training. `make_schedule` explains the arguments.

    Raises:
        UsageError: When a step or a sparsity is read that is not known yet.

    Example:
    >>> schedule = RelativeSchedule(sparsity=0.9)
    >>> schedule.target_sparsity, schedule.resolved
    (0.9, False)
    >>> laid_out = schedule.over(train_steps=1000)
    >>> laid_out.begin_step, laid_out.end_step, laid_out.frequency
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
        self._numbers = {
            "sparsity": sparsity,
            "initial_sparsity": initial_sparsity,
            "begin_step": begin_step,
            "end_step": end_step,
            "frequency": frequency,
            "power": power,
        }

    @property
    def inner(self) -> PruningSchedule:
        """The tfmot schedule, as far as it does not depend on the training."""
        return self.over(None).inner

    @property
    def resolved(self) -> bool:
        """False: `over` resolves it."""
        return False

    @property
    def target_sparsity(self) -> float:
        """The sparsity to end with."""
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
            steps_per_execution: The least default of `frequency`.

        Raises:
            UsageError: If `train_steps` is needed and None or below 1, or
                pruning would begin after its end.
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
                    "The schedule is laid over the training, but the number of "
                    f"training steps is unknown. {_TRAIN_STEPS} Or give the "
                    f"schedule an `end_step`. Received: {self!r}, "
                    "train_steps=None"
                )
            train_steps = check_integer("train_steps", train_steps, minimum=1)
            end = start + round(_END * train_steps)
            begin = max(numbers["begin_step"], start)
            if begin > end:
                raise UsageError(
                    f"Pruning must begin by step {end}, which is after "
                    f"{_END:.0%} of the {train_steps} training steps that "
                    f"follow step {start}. Lower `begin_step`, or give an "
                    f"`end_step`. Received: begin_step={begin}, "
                    f"train_steps={train_steps}"
                )
            numbers.update(begin_step=begin, end_step=end)
        if frequency is None:
            length = numbers["end_step"] - numbers["begin_step"]
            frequency = max(1, round(length / _UPDATES), steps_per_execution)
        return make_schedule(**{**numbers, "frequency": frequency})

    def at(self, begin_step: int, end_step: int, frequency: int) -> Schedule:
        """Returns the schedule as it was laid out in a training before.

        Args:
            begin_step: The first step, unless there is an `end_step`.
            end_step: The last step, unless there is one.
            frequency: The frequency, unless there is one.
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
        """Returns the same schedule with another sparsity to end with.

        Args:
            sparsity: The new sparsity, in [0, 1).

        Raises:
            UsageError: If `sparsity` is out of range.
        """
        sparsity = _check_sparsity("sparsity", sparsity)
        return _relative(self._name, **{**self._numbers, "sparsity": sparsity})

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {"schedule": self._name, **self._numbers}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "RelativeSchedule":
        """Returns a schedule made from the result of `get_config`."""
        return _relative(**config)

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
    """Returns a `Schedule` for either kind of schedule object.

    Raises:
        TypeError: If it is neither.
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
    """Returns the schedule that a name and numbers describe.

    - "polynomial": tfmot's `PolynomialDecay` (Zhu and Gupta 2017),
      s(t) = s_final + (s_init - s_final) * (1 - p)^power, where
      p = clip((t - begin) / (end - begin), 0, 1).
    - "constant": tfmot's `ConstantSparsity`; masks are updated for the rest of
      training.

    Args:
        schedule: The name.
        sparsity: Fraction of zeros to end with, in [0, 1).
        initial_sparsity: Fraction of zeros at `begin_step`, in [0, 1); of a
            polynomial schedule.
        begin_step: Training step of the first mask update.
        end_step: Training step of the last mask update of a polynomial
            schedule; None for 75 % of the training steps.
        frequency: Training steps between two mask updates; None for about 100
            updates from `begin_step` to `end_step`, and for 100 steps under a
            constant schedule, but at least `steps_per_execution`.
        power: Exponent of the polynomial.

    Returns:
        A `Schedule`: the same object for the same numbers, so that it is asked
        once a step for all layers that share it. It is a `RelativeSchedule` if
        steps follow from the training.

    Raises:
        UsageError: If there is no such schedule, a number is out of range or
            does not fit the schedule.

    Example:
    >>> make_schedule("constant", sparsity=0.5, frequency=10).sparsity(0)
    0.5
    >>> schedule = make_schedule(sparsity=0.9, begin_step=100, end_step=300)
    >>> [schedule.sparsity(step) for step in (100, 200, 300)]
    [0.0, 0.7875, 0.9]
    >>> make_schedule(sparsity=0.9).over(train_steps=1000).end_step
    750
    """
    if schedule not in NAMES:
        raise UsageError(
            f"`schedule` must be one of {listed(NAMES)} or a schedule, such as "
            "`sos.schedules.PolynomialDecay(0.0, 0.9, begin_step=1000, "
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
        excess = changed(polynomial, make_schedule.__kwdefaults__)
        if excess:
            raise UsageError(
                f"{quoted(excess)} do not fit a constant schedule. Leave them "
                "out, or choose schedule='polynomial'. "
                f"Received: schedule='constant', {received(excess)}"
            )
        if frequency is not None:
            return _constant(**numbers)
    elif frequency is not None and end_step is not None:
        return _polynomial(**numbers, **polynomial)
    return _relative(schedule, **numbers, **polynomial)


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
