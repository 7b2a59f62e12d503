"""Configs of runs: one schema, and what identifies a run.

A config is an `ml_collections.ConfigDict` with the entries of `base_config`.
Files in `configs/` make them:

```python
def get_config(arg=""):   # --config=configs/FILE.py:arg
    ...                   # a config of one run
def sweep(config):        # the runs of a study
    ...                   # overrides of that config, one mapping per run
```

A run is identified by the entries that differ from the defaults of its task
and its technique. So a new entry with a default changes the name of no run.
"""

import ast
import hashlib
import importlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

import sos
from sos.errors import UsageError
from sos.training.checkpoints import diff
from sos.training.task import Task

#: What stays of a finished run's checkpoints: all, step 0 and the last step
#: (where branches start), or none.
KEEP = ("all", "trunk", "none")
#: Entries that do not identify a run, as they change nothing it computes.
NOT_IDENTIFYING = ("keep", "label")
# Entries whose names depend on a choice, such as that of an optimizer: whoever
# reads them checks the names.
_OPEN = ("data", "learning_rate", "model", "optimizer", "sparsity")
_DTYPE_POLICIES = ("float32", "mixed_bfloat16")


def base_config() -> ml_collections.ConfigDict:
    """Returns the entries that every run's config has, with their defaults.

    A task adds its own entries and changes defaults: see
    `ExperimentTask.default_config`.

    Returns:
        A config with these entries:

        - `task`: the task's class, as `"package.module:Class"`.
        - `model`, `data`, `optimizer`, `learning_rate`: mappings whose entries
          the task reads.
        - `batch_size`: examples in one optimizer step, over all replicas.
        - `train_steps`: number of optimizer steps.
        - `seed`: seed of initial weights, order of the data and noise; `run`
          also passes it to `keras.utils.set_random_seed`.
        - `sparsity`: the arguments of `sos.sparsify`: `technique` (None for a
          dense model), `rules` as a mapping or as pairs of a regular expression
          and a rule, and the technique's hyperparameters
          (`sos.extend.hyperparameters`). Its seed is that of the run unless one
          is given.
        - `dtype_policy`: `"float32"` or `"mixed_bfloat16"`.
        - `gradient_accumulation_steps`: parts, computed one after the other,
          of each replica's batch.
        - `parent`: directory of the finished run that this one starts from,
          for a task whose `initialize` reads it.
        - `label`: name in tables and figures; empty for one that is made of
          the technique.
        - `keep`: see `KEEP`.
    """
    return ml_collections.ConfigDict(
        {
            "task": "",
            "model": {},
            "data": {},
            "optimizer": {},
            "learning_rate": {},
            "batch_size": 0,
            "train_steps": 0,
            "seed": 0,
            "sparsity": {
                "technique": config_dict.placeholder(str),
                "rules": (),
            },
            "dtype_policy": "float32",
            "gradient_accumulation_steps": 1,
            "parent": config_dict.placeholder(str),
            "label": "",
            "keep": "trunk",
        }
    )


def load_task(path: str) -> type[Task]:
    """Imports the class of a task.

    Args:
        path: Such as `"models.fashion_mnist:FashionMnist"`.

    Returns:
        The class, derived from `sos.experiments.task.ExperimentTask`.

    Raises:
        UsageError: If there is no such class.
    """
    module_name, _, class_name = str(path).partition(":")
    try:
        module = importlib.import_module(module_name)
    # A relative name raises TypeError, an empty one ValueError.
    except (ModuleNotFoundError, TypeError, ValueError) as error:
        missing = getattr(error, "name", None) or module_name
        if not f"{module_name}.".startswith(f"{missing}."):
            # A module that the task's own module needs.
            raise
        raise UsageError(
            "`config.task` must name a class, as 'package.module:Class', in a "
            f"module that can be imported. Received: {path!r}"
        ) from error
    task = getattr(module, class_name, None)
    # Not by the class itself, which builds upon this module.
    if not (
        isinstance(task, type)
        and issubclass(task, Task)
        and hasattr(task, "default_config")
    ):
        raise UsageError(
            "`config.task` must name a subclass of ExperimentTask. "
            f"Received: {path!r}"
        )
    return task


def resolve(config: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """Completes and checks the config of a run.

    Args:
        config: A config or a part of one: entries that are missing take the
            defaults of the task and of the technique.

    Returns:
        The whole config, locked. The argument stays as it is.

    Raises:
        UsageError: If an entry is unknown or has an invalid value.
    """
    given = plain(config)
    sparsity = given.get("sparsity")
    if isinstance(sparsity, dict) and isinstance(sparsity.get("rules"), dict):
        # One form for one run. Patterns may hold dots, names of entries not.
        sparsity["rules"] = [list(rule) for rule in sparsity["rules"].items()]
    defaults = _defaults(given)
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise UsageError(
            f"A config has no entry {', '.join(map(repr, unknown))}. Valid "
            f"entries: {', '.join(sorted(defaults))}"
        )
    resolved = _merge(defaults, given)
    _check(resolved)
    try:
        return ml_collections.ConfigDict(resolved, convert_dict=True).lock()
    except ValueError as error:
        # A name with a dot.
        raise UsageError(f"The config is invalid: {error}") from error


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries that identify a run.

    Args:
        config: A resolved config.

    Returns:
        The task and, by dotted name, every entry that differs from its
        default; JSON values, with whole numbers as integers: 1 and 1.0 are the
        same.
    """
    values = plain(config)
    defaults = flatten(_defaults(values))
    return {
        name: _canonical(value)
        for name, value in sorted(flatten(values).items())
        if name.partition(".")[0] not in NOT_IDENTIFYING
        and (
            name == "task"
            or name not in defaults
            or _json_text(value) != _json_text(defaults[name])
        )
    }


def run_name(config: Mapping[str, Any]) -> str:
    """Returns the name of a run's directory, different for different runs.

    Args:
        config: A resolved config.

    Returns:
        The technique, what it cannot do without, the seed, and a hash of
        `identity`, such as `magnitude_pruning_sparsity-0.9_seed-0_1a2b3c4d`.
    """
    text = _json_text(identity(config))
    digest = hashlib.blake2s(text.encode(), digest_size=4).hexdigest()
    sparsity = plain(config["sparsity"])
    technique = sparsity["technique"]
    parts = [_snake_case(technique) if technique else "dense"]
    for name in required_hyperparameters(sparsity):
        parts.append(f"{name}-{_short(sparsity[name])}")
    parts.append(f"seed-{config['seed']}")
    return "_".join([*parts, digest])


def label(config: Mapping[str, Any]) -> str:
    """Returns a run's name in tables and figures, without seed and sparsity."""
    if config["label"]:
        return config["label"]
    technique = config["sparsity"]["technique"]
    if technique is None:
        return "by rules" if config["sparsity"]["rules"] else "dense"
    return _snake_case(technique).replace("_", " ")


def value_text(value: Any, *, digits: int = 4) -> str:
    """Returns a hyperparameter as text for people.

    Args:
        value: A JSON value.
        digits: Significant digits of a number.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:.{digits}g}"
    return str(value)


def required_hyperparameters(sparsity: Mapping[str, Any]) -> list[str]:
    """Returns the names of the hyperparameters that a run had to give.

    These have no default, or the technique needs one of several.

    Args:
        sparsity: The entry `sparsity` of a resolved config.
    """
    technique = sparsity["technique"]
    names = [
        name
        for name, default in sos.extend.hyperparameters(technique).items()
        if default is sos.extend.REQUIRED
    ]
    alternatives = _needs_one_of(technique)
    given = [n for n in alternatives if sparsity.get(n) is not None]
    return list(dict.fromkeys([*names, *given]))


def _needs_one_of(technique: str | None) -> tuple[str, ...]:
    if technique is None:
        return ()
    return sos.extend.techniques()[technique].needs_one_of


def config_diff(
    stored: Mapping[str, Any], config: Mapping[str, Any]
) -> list[str]:
    """Compares the config that a run was started with to a resolved one.

    An entry that the stored config lacks is no difference: it was computed
    with what is the default now.

    Args:
        stored: The stored config.
        config: A resolved config.

    Returns:
        A line for each difference.
    """
    new = flatten(plain(config))
    old = flatten(_merge(_defaults(plain(config)), plain(stored)))
    for name in {*old, *new}:
        if name.partition(".")[0] in NOT_IDENTIFYING:
            old.pop(name, None)
            new.pop(name, None)
    return list(diff(old, new))


def parse_argument(
    argument: str, default: str = ""
) -> tuple[str, dict[str, Any]]:
    """Parses what follows the colon in `--config=FILE:ARGUMENT`.

    ```python
    parse_argument("magnitude,sparsity=0.9")  # ("magnitude", {"sparsity": 0.9})
    ```

    Args:
        argument: A name and pairs `name=value`, with commas between. Values are
            Python literals, or texts.
        default: The name if there is none.

    Returns:
        The name and the values.

    Raises:
        UsageError: If it has another form.
    """
    name, values = default, {}
    for index, part in enumerate(filter(None, argument.split(","))):
        key, equals, value = part.partition("=")
        if not equals and index == 0:
            name = key
        elif equals and key.isidentifier() and key not in values:
            values[key] = _literal(value)
        else:
            raise UsageError(
                "The argument of a config file must be a name and different "
                "pairs name=value, with commas between, such as "
                f"magnitude,sparsity=0.9. Received: {argument!r}"
            )
    return name, values


def plain(value: Any) -> Any:
    """Returns a value as JSON has it: configs as dictionaries, no tuples."""
    if isinstance(value, ml_collections.ConfigDict):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if value is None or isinstance(value, bool | int | float | str):
        # NaN is unequal to itself, so that such a run could not be resumed.
        if value == value:
            return value
    raise UsageError(
        "The values of a config must be numbers (not NaN), texts, booleans, "
        f"None, lists and mappings. Received: {value!r} of type "
        f"{type(value).__name__}"
    )


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested mappings as one, by dotted name."""
    return dict(_flatten(values, prefix))


def _flatten(
    values: Mapping[str, Any], prefix: str
) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the defaults of a config's task and technique.

    Those of required hyperparameters are None.
    """
    defaults = plain(load_task(values.get("task", "")).default_config())
    defaults["task"] = values["task"]
    given = values.get("sparsity", {})
    if not isinstance(given, Mapping):
        raise UsageError(
            f"`config.sparsity` must be a mapping. Received: {given!r}"
        )
    default = defaults["sparsity"]["technique"]
    technique = given.get("technique", default)
    if technique != default:
        # The task's defaults are for the hyperparameters of another one.
        defaults["sparsity"] = {
            "technique": default,
            "rules": defaults["sparsity"]["rules"],
        }
    try:
        hyperparameters = sos.extend.hyperparameters(technique)
    except ValueError as error:
        raise UsageError(f"`config.sparsity.technique`: {error}") from error
    defaults["sparsity"] = {
        **{
            name: None if default is sos.extend.REQUIRED else default
            for name, default in hyperparameters.items()
        },
        **defaults["sparsity"],
    }
    if "seed" in hyperparameters:
        defaults["sparsity"]["seed"] = None
    return defaults


def _merge(
    defaults: Mapping[str, Any], values: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the defaults, replaced by the values.

    An integer becomes a float where the default is one.
    """
    merged = dict(defaults)
    for name, value in values.items():
        default = defaults.get(name)
        if isinstance(default, Mapping) and isinstance(value, Mapping):
            merged[name] = _merge(default, value)
        elif type(default) is float and type(value) is int:
            merged[name] = float(value)
        else:
            merged[name] = value
    return merged


def _check(config: Mapping[str, Any]) -> None:
    """Raises `UsageError` if an entry of a whole config is invalid."""
    for name in ("batch_size", "train_steps", "gradient_accumulation_steps"):
        _check_integer(name, config[name], 1)
    _check_integer("seed", config["seed"], 0)
    for name, valid in (("label", str), ("parent", str | None)):
        if not isinstance(config[name], valid):
            raise UsageError(
                f"`config.{name}` must be a text. Received: {config[name]!r}"
            )
    for name, valid in (("keep", KEEP), ("dtype_policy", _DTYPE_POLICIES)):
        if config[name] not in valid:
            raise UsageError(
                f"`config.{name}` must be one of {', '.join(valid)}. "
                f"Received: {config[name]!r}"
            )
    for name in _OPEN:
        if not isinstance(config[name], Mapping):
            raise UsageError(
                f"`config.{name}` must be a mapping. Received: {config[name]!r}"
            )
    _check_sparsity(config["sparsity"], config["train_steps"])


def _check_integer(name: str, value: Any, minimum: int) -> None:
    if type(value) is not int or not minimum <= value < 2**31:
        raise UsageError(
            f"`config.{name}` must be an integer of at least {minimum}. "
            f"Received: {value!r}"
        )


def _check_sparsity(sparsity: Mapping[str, Any], train_steps: int) -> None:
    technique = sparsity["technique"]
    valid = {"technique", "rules", *sos.extend.hyperparameters(technique)}
    unknown = sorted(set(sparsity) - valid)
    if unknown:
        raise UsageError(
            f"`config.sparsity` has no entry {', '.join(map(repr, unknown))} "
            f"with the technique {technique!r}. Valid entries: "
            f"{', '.join(sorted(valid))}"
        )
    missing = [
        name
        for name in required_hyperparameters(sparsity)
        if sparsity[name] is None
    ]
    joined = " and "
    # One with a default of its own is there already.
    if not missing and technique is not None:
        alternatives = _needs_one_of(technique)
        if all(sparsity.get(name) is None for name in alternatives):
            missing, joined = alternatives, " or "
    if missing:
        raise UsageError(
            f"The technique {technique!r} needs "
            + joined.join(f"`config.sparsity.{name}`" for name in missing)
            + "."
        )
    # `sos.sparsify` checks the form of rules.
    rules = [rule[-1] for rule in sparsity["rules"] if rule]
    for entries in (sparsity, *rules):
        end = entries.get("end_step") if isinstance(entries, Mapping) else None
        # `sos.sparsify` checks the type.
        if isinstance(end, int) and end > train_steps:
            raise UsageError(
                "An `end_step` in `config.sparsity` must not be after the last "
                "step, or the technique would not reach its final sparsity or "
                f"penalty. Received: end_step={end}, train_steps={train_steps}"
            )


def _canonical(value: Any) -> Any:
    """Returns a JSON value with whole numbers as integers."""
    if isinstance(value, Mapping):
        return {key: _canonical(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_canonical(entry) for entry in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


def _json_text(value: Any) -> str:
    """Returns a text that is equal for equal JSON values."""
    return json.dumps(_canonical(value), sort_keys=True)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _short(value: Any) -> str:
    return re.sub(r"[^\w.+-]", "-", value_text(value, digits=6))
