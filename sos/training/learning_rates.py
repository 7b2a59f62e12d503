"""Learning-rate schedules, made from the entries of a config.

A schedule is a function of t, the number of completed optimizer steps
(`optimizer.iterations`): the first step uses the rate at t = 0. With B the base
rate, and W the warm-up and T the training length in steps, the schedules are:

- "constant": B * min(1, t / W).
- "cosine": B * t / W for t < W, then
  B * (alpha + (1 - alpha) * (1 + cos(pi * (t - W) / (T - W))) / 2)
  (Loshchilov and Hutter 2016, arXiv 1608.03983).
- "piecewise": B * t / W for t < W, then B, then B * factors[i] for
  t >= boundaries[i].
- "rsqrt": B * min(1, t / W) / sqrt(max(t, W) * hidden_size)
  (Vaswani et al. 2017, arXiv 1706.03762).

`defaults` lists the entries of each. A rate is a float32 scalar. Its constants
become part of a compiled step.
"""

import fractions
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
from keras import ops

from sos.arguments import check_integer, check_number, format_values
from sos.errors import UsageError

# Intervals of valid numbers.
_POSITIVE = "(0, inf)"
_NOT_NEGATIVE = "[0, inf)"

# None marks an entry that a config must set, except `base_batch_size` and
# `reference_steps`.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "constant": {
        "base": None,
        "base_batch_size": None,
        "reference_steps": None,
        "warmup_steps": 0,
    },
    "cosine": {
        "base": None,
        "base_batch_size": None,
        "reference_steps": None,
        "warmup_steps": 0,
        "alpha": 0.0,
    },
    "piecewise": {
        "base": None,
        "base_batch_size": None,
        "reference_steps": None,
        "warmup_steps": 0,
        "boundaries": (),
        "factors": (),
    },
    "rsqrt": {
        "base": None,
        "base_batch_size": None,
        "reference_steps": None,
        "warmup_steps": 8000,
        "hidden_size": None,
    },
}

# How `lengthen` fits a schedule to a longer training, and the schedules that it
# fits.
_VARIANTS = {
    "scale": tuple(_DEFAULTS),
    "hold": ("constant", "piecewise"),
    "drop": ("piecewise",),
    "drop_from_start": ("piecewise",),
}


def names() -> tuple[str, ...]:
    """Returns the names of all schedules.

    Example:
    >>> from sos.training import learning_rates
    >>> learning_rates.names()
    ('constant', 'cosine', 'piecewise', 'rsqrt')
    """
    return tuple(_DEFAULTS)


def defaults(schedule: str) -> dict[str, Any]:
    """Returns the config entries of a schedule with their default values.

    The entries are:

    - `base`: Base learning rate, greater than 0. Required.
    - `base_batch_size`: Batch size for which `base` was chosen. The base is
      multiplied by batch_size / base_batch_size (the linear scaling rule of
      Goyal et al. 2017, arXiv 1706.02677). None: it is not scaled.
    - `warmup_steps`: Number of steps over which the rate grows linearly from 0;
      at least 0 (for "rsqrt" greater than 0), not necessarily an integer.
    - `alpha` ("cosine"): Final rate as a fraction of the base, in [0, 1].
    - `boundaries` and `factors` ("piecewise"): Increasing steps, not
      necessarily integers, and for each the factor of the *base* rate from
      that step on.
    - `reference_steps`: Training length for which `warmup_steps` and
      `boundaries` were chosen. They are multiplied by
      train_steps / reference_steps. None: they are not scaled.
    - `hidden_size` ("rsqrt"): Width d of the model; 1 omits the factor d^-1/2.
      Required.

    Args:
        schedule: Name of a schedule.

    Returns:
        Default values by name; None for required entries.

    Raises:
        UsageError: If `schedule` is unknown.

    Example:
    >>> from sos.training import learning_rates
    >>> defaults = learning_rates.defaults("rsqrt")
    >>> defaults["warmup_steps"], defaults["hidden_size"]
    (8000, None)
    """
    if not isinstance(schedule, str) or schedule not in _DEFAULTS:
        raise UsageError(
            f"`schedule` must be one of {format_values(names())}. "
            f"Received: schedule={schedule!r}"
        )
    return dict(_DEFAULTS[schedule])


def make_learning_rate(
    config: Mapping[str, Any],
    *,
    train_steps: int,
    batch_size: int | None = None,
) -> keras.optimizers.schedules.LearningRateSchedule:
    """Returns the learning-rate schedule that a config describes.

    Args:
        config: `schedule`, the name of a schedule, and its entries; see
            `defaults`. Missing entries take their default.
        train_steps: Total number of training steps.
        batch_size: Number of examples in a step, over all replicas. Used only
            if `base_batch_size` is set.

    Returns:
        A schedule that Keras can serialize.

    Raises:
        UsageError: If an entry is unknown, invalid or missing.

    Example:
    The authors' recipes for ResNet-50 on ImageNet (drops after 30, 60 and 80
    epochs of 1,281,167 images) and for the Transformer:
    >>> from sos.training import make_learning_rate
    >>> epoch = 1_281_167 / 1024
    >>> resnet = make_learning_rate(
    ...     {
    ...         "schedule": "piecewise",
    ...         "base": 0.1,
    ...         "base_batch_size": 256,
    ...         "warmup_steps": 5 * epoch,
    ...         "boundaries": [30 * epoch, 60 * epoch, 80 * epoch],
    ...         "factors": [0.1, 0.01, 0.001],
    ...         "reference_steps": 128_000,
    ...     },
    ...     train_steps=256_000,  # Twice as long: all drops at twice the step.
    ...     batch_size=1024,
    ... )
    >>> [round(float(resnet(step)), 6) for step in (20_000, 100_000)]
    [0.4, 0.04]
    >>> transformer = make_learning_rate(
    ...     {"schedule": "rsqrt", "base": 2.0, "hidden_size": 512},
    ...     train_steps=500_000,
    ... )
    >>> round(float(transformer(8000)), 6)
    0.000988
    """
    entries = _entries(config)
    name = entries.pop("schedule", None)
    valid = defaults(name)
    unknown = sorted(set(entries) - set(valid))
    if unknown:
        raise UsageError(
            f"The learning rate schedule {name!r} has the entries "
            f"{format_values(valid)}. Received: {format_values(unknown)}"
        )
    entries = {**valid, **entries}
    train_steps = check_integer("train_steps", train_steps, minimum=1)
    base = check_number("base", entries.pop("base"), _POSITIVE)
    base_batch_size = entries.pop("base_batch_size")
    if base_batch_size is not None:
        if batch_size is None:
            raise UsageError(
                "`base_batch_size` scales the base learning rate with the "
                "batch size: pass `batch_size`, or remove `base_batch_size`. "
                f"Received: base_batch_size={base_batch_size!r}, "
                "batch_size=None"
            )
        base *= check_integer("batch_size", batch_size, minimum=1)
        base /= check_integer("base_batch_size", base_batch_size, minimum=1)
    scale = fractions.Fraction(1)
    reference_steps = entries.pop("reference_steps")
    if reference_steps is not None:
        reference_steps = check_number(
            "reference_steps", reference_steps, _POSITIVE
        )
        scale = train_steps / fractions.Fraction(reference_steps)
    return _MAKERS[name](base, train_steps, scale, **entries)


def lengthen(
    entries: Mapping[str, Any],
    *,
    train_steps: int,
    multiplier: float,
    variant: str,
) -> dict[str, Any]:
    """Returns the entries of a learning rate for a longer training.

    The longer run has `round(multiplier * train_steps)` steps. With T the
    original length, m the multiplier and r(t) the original rate, the rate at
    step t is:

    - "scale": r(t / m). Every boundary and the warm-up are multiplied by m.
    - "hold": r(t), and after T the last rate. Boundaries and the warm-up stay.
    - "drop": r(t) before T. The rate goes on dropping after the last boundary
      B_n, at B_n + k * B_1 for k = 1, 2, ..., as far as this is not before T,
      each time by the last ratio, factors[n] / factors[n - 1].
    - "drop_from_start": base * factors[1]^k from step k * B_1 on, without a
      warm-up.

    "hold" requires the schedule "constant" or "piecewise", the last two
    "piecewise". Gale et al. 2019 published results of four such schemes for
    sparse networks that are trained from scratch, but not the steps at which
    the last two of theirs drop.

    Args:
        entries: `schedule` and its entries, as for `make_learning_rate`. Others
            are returned as they are.
        train_steps: Number of steps of the original training.
        multiplier: Length of the longer training as a multiple of the original
            one; at least 1.
        variant: `"scale"`, `"hold"`, `"drop"` or `"drop_from_start"`.

    Returns:
        Entries for `make_learning_rate`, to use with the larger `train_steps`.

    Raises:
        UsageError: If an argument is invalid, or the variant does not fit the
            schedule.

    Example:
    >>> from sos.training import learning_rates
    >>> longer = learning_rates.lengthen(
    ...     {
    ...         "schedule": "piecewise",
    ...         "base": 0.4,
    ...         "boundaries": [30, 60, 80],
    ...         "factors": [0.1, 0.01, 0.001],
    ...     },
    ...     train_steps=100,
    ...     multiplier=2,
    ...     variant="drop",
    ... )
    >>> longer["boundaries"]
    [30, 60, 80, 110, 140, 170]
    """
    entries = _entries(entries)
    name = entries.get("schedule")
    known = {*defaults(name), "schedule"}
    make_learning_rate(
        # The batch size does not matter here.
        {k: v for k, v in entries.items() if k in known - {"base_batch_size"}},
        train_steps=train_steps,
    )
    multiplier = check_number("multiplier", multiplier, "[1, inf)")
    if not isinstance(variant, str) or variant not in _VARIANTS:
        raise UsageError(
            f"`variant` must be one of {format_values(_VARIANTS)}. "
            f"Received: variant={variant!r}"
        )
    if name not in _VARIANTS[variant]:
        raise UsageError(
            f"The variant {variant!r} requires a learning rate with regions: "
            f"the schedule {' or '.join(map(repr, _VARIANTS[variant]))}. Use "
            f"the variant 'scale'. Received: schedule={name!r}"
        )
    if variant == "scale":
        return _scale(entries, train_steps, multiplier)
    if multiplier == 1 and variant != "drop_from_start":
        return entries
    return _in_steps(
        entries, train_steps, round(multiplier * train_steps), variant
    )


@keras.saving.register_keras_serializable(package="sos")
class WarmupPiecewise(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up to a base rate, then factors of it at boundaries.

    The rate is base * t / warmup_steps for t < warmup_steps, then base, then
    base * factors[i] for t >= boundaries[i].

    Args:
        base: Base learning rate.
        warmup_steps: Length of the warm-up in steps, not necessarily an
            integer; 0 for no warm-up.
        boundaries: Integer steps in increasing order.
        factors: For each boundary, the factor of the base rate.

    Example:
    >>> from sos.training import learning_rates
    >>> rate = learning_rates.WarmupPiecewise(
    ...     0.4, 5, boundaries=[30, 60], factors=[0.1, 0.01]
    ... )
    >>> [round(float(rate(t)), 6) for t in (0, 5, 30, 60)]
    [0.0, 0.4, 0.04, 0.004]
    """

    def __init__(
        self,
        base: float,
        warmup_steps: float = 0,
        boundaries: Sequence[int] = (),
        factors: Sequence[float] = (),
    ) -> None:
        super().__init__()
        self.base = base
        self.warmup_steps = warmup_steps
        self.boundaries = list(boundaries)
        self.factors = list(factors)

    def __call__(self, step: Any) -> Any:
        """Returns the rate after `step` completed steps, a float32 scalar."""
        step = ops.convert_to_tensor(step)
        rate = _float32(self.base)
        # Integers are compared exactly at any size.
        for boundary, factor in zip(self.boundaries, self.factors, strict=True):
            rate = ops.where(
                step >= boundary, _float32(self.base * factor), rate
            )
        if not self.warmup_steps:
            return rate
        fraction = ops.cast(step, "float32") / _float32(self.warmup_steps)
        return ops.where(
            step < math.ceil(self.warmup_steps),
            _float32(self.base) * fraction,
            rate,
        )

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {
            "base": self.base,
            "warmup_steps": self.warmup_steps,
            "boundaries": self.boundaries,
            "factors": self.factors,
        }


@keras.saving.register_keras_serializable(package="sos")
class InverseSquareRoot(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up to a peak, then a decay with 1 / sqrt(t).

    The rate is peak * t / W for t <= W = warmup_steps, then
    peak * sqrt(W / t). This is base * min(1, t / W) * max(t, W)^-1/2 * d^-1/2
    with peak = base * (W * d)^-1/2.

    t is the number of completed steps, as in the authors' tensor2tensor
    schedule "constant*linear_warmup*rsqrt_decay*rsqrt_hidden_size". Vaswani et
    al. (2017) count the steps from 1.

    Args:
        peak: Rate at the end of the warm-up.
        warmup_steps: Length of the warm-up in steps, greater than 0.

    Example:
    >>> from sos.training import learning_rates
    >>> rate = learning_rates.InverseSquareRoot(1e-3, warmup_steps=8000)
    >>> [round(float(rate(t)), 6) for t in (4000, 8000, 32000)]
    [0.0005, 0.001, 0.0005]
    """

    def __init__(self, peak: float, warmup_steps: float) -> None:
        super().__init__()
        self.peak = peak
        self.warmup_steps = warmup_steps

    def __call__(self, step: Any) -> Any:
        """Returns the rate after `step` completed steps, a float32 scalar."""
        step = ops.cast(step, "float32")
        warmup = _float32(self.warmup_steps)
        return _float32(self.peak) * ops.minimum(
            step / warmup, ops.sqrt(warmup / ops.maximum(step, warmup))
        )

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {"peak": self.peak, "warmup_steps": self.warmup_steps}


def _constant(
    base: float,
    train_steps: int,
    scale: fractions.Fraction,
    *,
    warmup_steps: Any,
) -> WarmupPiecewise:
    del train_steps
    warmup_steps = check_number("warmup_steps", warmup_steps, _NOT_NEGATIVE)
    return WarmupPiecewise(base, _scaled(warmup_steps, scale))


def _cosine(
    base: float,
    train_steps: int,
    scale: fractions.Fraction,
    *,
    warmup_steps: Any,
    alpha: Any,
) -> keras.optimizers.schedules.CosineDecay:
    warmup_steps = check_number("warmup_steps", warmup_steps, _NOT_NEGATIVE)
    warmup_steps = _scaled(warmup_steps, scale)
    alpha = check_number("alpha", alpha, "[0, 1]")
    if warmup_steps >= train_steps:
        raise UsageError(
            "`warmup_steps` must be less than `train_steps`. "
            f"Received: warmup_steps={warmup_steps}, train_steps={train_steps}"
        )
    if not warmup_steps:
        return keras.optimizers.schedules.CosineDecay(
            base, train_steps, alpha=alpha
        )
    return keras.optimizers.schedules.CosineDecay(
        0.0,
        train_steps - warmup_steps,
        alpha=alpha,
        warmup_target=base,
        warmup_steps=warmup_steps,
    )


def _piecewise(
    base: float,
    train_steps: int,
    scale: fractions.Fraction,
    *,
    warmup_steps: Any,
    boundaries: Any,
    factors: Any,
) -> WarmupPiecewise:
    del train_steps
    warmup_steps = check_number("warmup_steps", warmup_steps, _NOT_NEGATIVE)
    boundaries = _numbers("boundaries", boundaries)
    factors = _numbers("factors", factors)
    if len(boundaries) != len(factors):
        raise UsageError(
            "`factors` must have one number for each of `boundaries`. "
            f"Received: boundaries={boundaries}, factors={factors}"
        )
    starts = [0.0, *boundaries]
    if any(a >= b for a, b in zip(starts, boundaries, strict=False)):
        raise UsageError(
            "`boundaries` must be steps after 0 in increasing order. "
            f"Received: boundaries={boundaries}"
        )
    if boundaries and warmup_steps > boundaries[0]:
        raise UsageError(
            "`warmup_steps` must not exceed the first of `boundaries`. "
            f"Received: warmup_steps={warmup_steps}, boundaries={boundaries}"
        )
    return WarmupPiecewise(
        base,
        _scaled(warmup_steps, scale),
        # A factor applies from the first integer step that is not before its
        # boundary. Fractions are exact: no rounding error adds a step.
        [math.ceil(fractions.Fraction(b) * scale) for b in boundaries],
        factors,
    )


def _rsqrt(
    base: float,
    train_steps: int,
    scale: fractions.Fraction,
    *,
    warmup_steps: Any,
    hidden_size: Any,
) -> InverseSquareRoot:
    del train_steps
    warmup_steps = check_number("warmup_steps", warmup_steps, _POSITIVE)
    warmup_steps = _scaled(warmup_steps, scale)
    hidden_size = check_integer("hidden_size", hidden_size, minimum=1)
    return InverseSquareRoot(
        base / math.sqrt(warmup_steps * hidden_size), warmup_steps
    )


_MAKERS: dict[str, Callable[..., Any]] = {
    "constant": _constant,
    "cosine": _cosine,
    "piecewise": _piecewise,
    "rsqrt": _rsqrt,
}


def _scale(
    entries: dict[str, Any], train_steps: int, multiplier: float
) -> dict[str, Any]:
    """Stretches a schedule over a longer training."""
    if multiplier == 1:
        return entries
    if entries.get("reference_steps") is None:
        entries["reference_steps"] = train_steps
    if entries["schedule"] == "rsqrt":
        # The formula divides by the square root of the step.
        entries["base"] *= math.sqrt(multiplier)
    return entries


def _in_steps(
    entries: dict[str, Any], train_steps: int, longer_steps: int, variant: str
) -> dict[str, Any]:
    """Returns entries that do not scale with the length of the training."""
    scale = fractions.Fraction(1)
    if entries.get("reference_steps") is not None:
        scale = train_steps / fractions.Fraction(entries["reference_steps"])
        entries["reference_steps"] = None
    warmup_steps = _scaled(entries.get("warmup_steps", 0), scale)
    # Exact: a rounding error could add a step.
    boundaries = [
        fractions.Fraction(boundary) * scale
        for boundary in entries.get("boundaries", ())
    ]
    factors = list(entries.get("factors", ()))
    if variant == "drop":
        boundaries, factors = _drop_further(
            boundaries, factors, train_steps, longer_steps
        )
    elif variant == "drop_from_start":
        warmup_steps = 0
        boundaries, factors = _drop_further(
            boundaries[:1], factors[:1], 0, longer_steps
        )
    entries["warmup_steps"] = warmup_steps
    if entries["schedule"] == "piecewise":
        # As in `_piecewise`; of several drops at one step, the last one counts.
        drops = dict(zip(map(math.ceil, boundaries), factors, strict=True))
        entries["boundaries"] = list(drops)
        entries["factors"] = list(drops.values())
    return entries


def _drop_further(
    boundaries: list[fractions.Fraction],
    factors: list[float],
    begin: int,
    end: int,
) -> tuple[list[fractions.Fraction], list[float]]:
    """Adds drops in [begin, end), at multiples of the first boundary."""
    before, after = [1.0, 1.0, *factors][-2:]
    if not 0 < after < before:
        raise UsageError(
            "To go on dropping, a learning rate must have `boundaries` at "
            "which it drops, to a factor greater than 0. Received: "
            f"boundaries={[float(b) for b in boundaries]}, factors={factors}"
        )
    boundaries, factors = list(boundaries), list(factors)
    interval = boundaries[0]
    step = boundaries[-1] + interval
    while step < end:
        if step >= begin:
            boundaries.append(step)
            factors.append(factors[-1] * after / before)
        step += interval
    return boundaries, factors


def _scaled(steps: float, scale: fractions.Fraction) -> float:
    return float(fractions.Fraction(steps) * scale)


def _entries(config: Any) -> dict[str, Any]:
    try:
        # A ConfigDict is not a `Mapping`.
        return dict(config)
    except (TypeError, ValueError):
        raise UsageError(
            "The config of a learning rate must be a mapping such as "
            "{'schedule': 'constant', 'base': 0.1}. "
            f"Received: {config!r} of type {type(config).__name__}"
        ) from None


def _float32(value: float) -> Any:
    return ops.convert_to_tensor(value, dtype="float32")


def _numbers(entry: str, values: Any) -> list[float]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise UsageError(
            f"`{entry}` must be a list of numbers. Received: {entry}={values!r}"
        )
    return [check_number(entry, value, _NOT_NEGATIVE) for value in values]
