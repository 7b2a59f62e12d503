"""The runs of a study: what each is made of, and the list a config asks for."""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import keras

from sos.ramps import LinearRamp
from sos.registry import get_technique
from sos.schedules import PolynomialDecay
from sos.wrappers.masked import PruningWrapper
from sos.wrappers.penalized import PenalizedWrapper


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """All that decides what a run computes: its identity.

    The fields are also the columns of the results table, but for the title,
    which decides nothing. Two runs that differ only in `sparsity`, `penalty`
    and `seed` have one shape and share one compiled training step.

    Attributes:
        technique: The technique's name in the config.
        title: The technique's name for people. By default it is made of
            `technique`.
        sparsity: The sparsity that a pruning technique is to reach.
        penalty: The weight of a penalty, as a multiple of 1 / (number of
            training examples).
        seed: Seed of the initial weights, the order of the data and the noise.
        model: Name of the network.
        dataset: Name of the data set.
        train_examples: The number of training examples.
        steps: The number of optimizer steps.
        batch_size: The number of examples in one step.
        learning_rate: Initial learning rate of Adam; a cosine takes it to 0.
        weight_decay: Decoupled weight decay (Loshchilov and Hutter 2019, the
            factor of the learning rate) of the weights of rank 2 or more; not
            of biases, norms and what a technique adds.
        keep_dense: Regular expression on weight paths; what it matches is not
            made sparse. Empty for none.
        wrapper: Name of the registered technique; None for a dense run.
        begin_step: The step at which pruning, or the ramp of a penalty, begins.
        end_step: The step at which it is complete.
        frequency: The number of steps between two mask updates.
        learning_rate_multiplier: Factor of the learning rate for the trainable
            variables that the technique adds.
        arguments: Further arguments of the technique, as a JSON object.
    """

    technique: str
    title: str = dataclasses.field(default="", compare=False)
    sparsity: float | None = None
    penalty: float | None = None
    seed: int
    model: str
    dataset: str
    train_examples: int
    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.0
    keep_dense: str = ""
    wrapper: str | None = None
    begin_step: int | None = None
    end_step: int | None = None
    frequency: int | None = None
    learning_rate_multiplier: float | None = None
    arguments: str = "{}"

    def __post_init__(self) -> None:
        if not self.title:
            object.__setattr__(self, "title", _title(self.technique))

    def identity(self) -> dict[str, Any]:
        """The fields that tell runs apart, by name: all but the title."""
        return {name: getattr(self, name) for name in IDENTITY}

    @property
    def setting(self) -> str:
        """What sets the run apart in its technique, for people: 90%, 0.1/N."""
        if self.sparsity is not None:
            return f"{100 * self.sparsity:.6g}%"
        if self.penalty is not None:
            return f"{self.penalty:.6g}/N"
        return ""

    @property
    def name(self) -> str:
        """A readable name, different for different runs, fit for a file."""
        parts = [self.technique]
        for key in ("sparsity", "penalty", "seed"):
            if getattr(self, key) is not None:
                parts.append(f"{key}-{getattr(self, key):.6g}")
        settings = json.dumps(self.identity(), sort_keys=True)
        digest = hashlib.blake2s(settings.encode(), digest_size=4)
        return "_".join([*parts, digest.hexdigest()])

    @property
    def shape(self) -> "Run":
        """The run without the values that can change in a compiled step."""
        return dataclasses.replace(
            self,
            sparsity=None if self.sparsity is None else 0.0,
            penalty=None if self.penalty is None else 0.0,
            seed=0,
        )

    @property
    def penalty_weight(self) -> float:
        """The factor of the penalty in the loss."""
        return self.penalty / self.train_examples

    def technique_settings(self) -> dict[str, Any]:
        """The arguments of the technique, for `sos.sparsify`."""
        settings = json.loads(self.arguments)
        if self.sparsity is not None:
            settings["schedule"] = PolynomialDecay(
                0.0,
                self.sparsity,
                begin_step=self.begin_step,
                end_step=self.end_step,
                frequency=self.frequency,
            )
        if self.penalty is not None:
            settings["penalty_weight"] = self.penalty_weight
            settings["ramp"] = LinearRamp(self.begin_step, self.end_step)
        if hasattr(get_technique(self.wrapper), "seed"):
            settings["seed"] = self.seed
        return settings


#: The names of the fields that tell runs apart.
IDENTITY = tuple(
    field.name for field in dataclasses.fields(Run) if field.compare
)


def expand(config: Mapping[str, Any], *, train_examples: int) -> list[Run]:
    """Makes the list of runs that a config asks for.

    Args:
        config: The config, such as that of `configs/fashion_mnist.py`, which
            says what it has to contain.
        train_examples: The number of training examples of its data set.

    Returns:
        The runs: technique by technique, then by sparsity or penalty, then by
        seed.

    Raises:
        ValueError: If a value in the config is wrong; the text names it.
    """
    common = {
        "model": _text(config, "model"),
        "dataset": _text(config, "dataset"),
        "train_examples": train_examples,
        "steps": _integer(config, "steps", 1),
        "batch_size": _integer(config, "batch_size", 1, train_examples),
        "learning_rate": _number(config, "learning_rate", above=0.0),
        "weight_decay": _number(config, "weight_decay"),
    }
    # It is no setting of a run, but no better known after hours of training.
    _number(config, "layerwise_sparsity", maximum=1.0)
    seeds = _values(config, "seeds", "config.seeds", integer=True)
    runs = []
    for name in technique_names(config):
        title = str(config[name].get("title", ""))
        for settings in _sweep(name, config[name], common):
            for seed in seeds:
                run = Run(
                    technique=name, title=title, seed=seed, **settings, **common
                )
                _check_technique(run)
                runs.append(run)
    return runs


def technique_names(config: Mapping[str, Any]) -> list[str]:
    """The techniques that a config selects, checked, in its order."""
    valid = [
        name
        for name in config
        if isinstance(config[name], Mapping) or hasattr(config[name], "keys")
    ]
    names = [part.strip() for part in config["techniques"].split(",")]
    for name in names:
        if name not in valid or names.count(name) > 1:
            raise ValueError(
                "`config.techniques` must name techniques of the config, each "
                f"once, with commas between: {','.join(valid)}. "
                f"Received: {name!r} in {config['techniques']!r}"
            )
    return names


def _sweep(
    name: str, technique: Mapping[str, Any], common: Mapping[str, Any]
) -> Iterable[dict[str, Any]]:
    """The settings of each run of one technique, but for seeds."""
    if technique["wrapper"] is None:
        yield {}
        return
    at = f"config.{name}"
    keep_dense = technique.get("keep_dense", "")
    try:
        re.compile(keep_dense)
    except (TypeError, re.error) as error:
        raise ValueError(
            f"`{at}.keep_dense` must be a regular expression ({error}). "
            f"Received: {keep_dense!r}"
        ) from error
    try:
        wrapper = get_technique(technique["wrapper"])
    except ValueError as error:
        raise ValueError(f"`{at}.wrapper`: {error}") from error
    begin = _number(technique, "begin", at=at, maximum=1.0)
    end = _number(technique, "end", at=at, maximum=1.0)
    steps = common["steps"]
    settings = {
        "keep_dense": keep_dense,
        "wrapper": technique["wrapper"],
        "begin_step": round(begin * steps),
        "end_step": round(end * steps),
        "arguments": json.dumps(dict(technique["arguments"]), sort_keys=True),
    }
    if issubclass(wrapper, PruningWrapper):
        if begin > end:
            raise ValueError(
                f"`{at}.begin` must not be above `{at}.end`. "
                f"Received: begin={begin}, end={end}"
            )
        frequency = _number(technique, "frequency", at=at, above=0.0)
        settings["frequency"] = max(1, round(frequency * steps))
        for sparsity in _values(technique, "sparsities", f"{at}.sparsities"):
            if sparsity >= 1:
                raise ValueError(
                    f"`{at}.sparsities` must be in [0, 1): the fraction of "
                    f"zeros. Received: {sparsity}"
                )
            yield {"sparsity": sparsity, **settings}
    elif issubclass(wrapper, PenalizedWrapper):
        if settings["begin_step"] >= settings["end_step"]:
            raise ValueError(
                f"`{at}.begin` must be below `{at}.end`, by one step at least. "
                f"Received: begin={begin}, end={end} with steps={steps}"
            )
        settings["learning_rate_multiplier"] = _number(
            technique, "learning_rate_multiplier", at=at, above=0.0
        )
        for penalty in _values(technique, "penalties", f"{at}.penalties"):
            yield {"penalty": penalty, **settings}
    else:
        raise ValueError(
            f"`{at}.wrapper` must be a technique with a pruning schedule or a "
            f"penalty. Received: {technique['wrapper']!r}"
        )


def _check_technique(run: Run) -> None:
    """Lets the technique itself check its arguments, on a layer of no use."""
    if run.wrapper is None:
        return
    technique = get_technique(run.wrapper)
    try:
        technique(keras.layers.Dense(1), **run.technique_settings())
    except (TypeError, ValueError) as error:
        raise ValueError(f"`config.{run.technique}`: {error}") from error


def _text(config: Mapping[str, Any], name: str) -> str:
    value = config.get(name)
    if not isinstance(value, str) or not value:
        raise ValueError(f"`config.{name}` must be a name. Received: {value!r}")
    return value


def _integer(
    config: Mapping[str, Any], name: str, minimum: int, maximum: int = 2**31 - 1
) -> int:
    value = config[name]
    if not minimum <= value <= maximum:
        raise ValueError(
            f"`config.{name}` must be in [{minimum}, {maximum}]. "
            f"Received: {value}"
        )
    return int(value)


def _number(
    config: Mapping[str, Any],
    name: str,
    *,
    at: str = "config",
    above: float = -math.inf,
    maximum: float = math.inf,
) -> float:
    value = config[name]
    minimum = 0.0
    if not (
        math.isfinite(value) and minimum <= value and above < value <= maximum
    ):
        least = f"above {above:g}" if above >= minimum else "at least 0"
        most = f" and at most {maximum:g}" if maximum < math.inf else ""
        raise ValueError(
            f"`{at}.{name}` must be {least}{most}. Received: {value}"
        )
    return float(value)


def _values(
    config: Mapping[str, Any], key: str, name: str, *, integer: bool = False
) -> list[float]:
    """A tuple of numbers that are not negative, each once, sorted."""
    values = config[key]
    kind = int if integer else (int, float)
    valid = (
        len(values) > 0
        and all(
            isinstance(value, kind)
            and not isinstance(value, bool)
            and 0 <= value < 2**31
            for value in values
        )
        and len(set(values)) == len(values)
    )
    if not valid:
        raise ValueError(
            f"`{name}` must be one or more different "
            f"{'integers' if integer else 'numbers'}, not negative, with "
            f"commas between. Received: {tuple(values)}"
        )
    return sorted(int(v) if integer else float(v) for v in values)


def _title(technique: str) -> str:
    """The name of a technique in a config, as text for people."""
    # Names as short as this are abbreviations.
    return (
        technique.upper() if len(technique) < 3 else technique.replace("_", " ")
    )
