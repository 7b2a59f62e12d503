"""Configs of runs: their schema and their fingerprint.

A config is an `ml_collections.ConfigDict` with the entries of `base_config`.
Files in `configs/` make them:

```python
def get_config(arg=""):   # --config=configs/FILE.py:arg
    ...                   # Returns the config of one run.
def sweep(config):
    ...                   # Yields the overrides of each run of a study.
```

The fingerprint of a run consists of the entries that differ from the defaults
of its task and technique, so a new entry with a default renames no run.
"""

import ast
import contextlib
import hashlib
import importlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import ml_collections
from ml_collections import config_dict

import sos
from sos.errors import UsageError
from sos.experiments import branch_registry
from sos.training.checkpoints import diff
from sos.training.task import Task

#: Which checkpoints of a finished run are kept: all; the first and the last,
#: from which other runs can start, and those whose mean is scored; or none.
KEEP = ("all", "trunk", "none")
#: Entries that do not change the result and are not in the fingerprint. A task
#: adds others: `ExperimentTask.ignored_entries`.
IGNORED_ENTRIES = ("keep", "keep_steps", "label")
# Mappings whose names depend on a choice, such as the optimizer. Their readers
# check the names.
_MAPPINGS = (
    "branch",
    "data",
    "learning_rate",
    "model",
    "optimizer",
    "sparsity",
)
_DTYPE_POLICIES = ("float32", "mixed_bfloat16")


def base_config() -> ml_collections.ConfigDict:
    """Returns the entries that every run's config has, with their defaults.

    A task adds its own entries and changes defaults: see
    `ExperimentTask.default_config`.

    Returns:
        A config with these entries:

        - `task`: Class of the task, as `"package.module:Class"`.
        - `model`, `data`: Mappings that the task reads.
        - `optimizer`, `learning_rate`: Mappings as for
          `sos.training.make_optimizer` and `make_learning_rate`.
        - `batch_size`: Number of examples in one optimizer step, over all
          replicas.
        - `train_steps`: Number of optimizer steps.
        - `seed`: Seed of initial weights, order of the data and noise; `run`
          also passes it to `keras.utils.set_random_seed`.
        - `sparsity`: Arguments of `sos.sparsify`: `technique` (None for a dense
          model), `rules` as a mapping or as pairs of a regular expression and a
          rule, and the technique's hyperparameters
          (`sos.extend.hyperparameters`). Its `seed` defaults to the run's.
        - `dtype_policy`: `"float32"` or `"mixed_bfloat16"`.
        - `gradient_accumulation_steps`: Number of parts into which each
          replica's batch is split to save memory.
        - `parent`: The finished run that this one starts from: its name, if it
          is in the same work directory, or its directory. Only its name
          identifies the run, so if the directory is gone, it is looked for
          in the same work directory.
        - `branch`: How the run starts from `parent`: `name`, one of
          `sos.experiments.branch_registry.branches()`, and its options.
          `sos.experiments.branch` makes the entries of such a run.
        - `label`: Name in tables and figures; if empty, derived from the
          technique.
        - `keep`: Which checkpoints are kept after the run; see `KEEP`.
        - `keep_steps`: Further steps whose checkpoints are saved and kept, to
          rewind lottery tickets to.

    Example:
    >>> import sos.experiments
    >>> config = sos.experiments.base_config()
    >>> config.sparsity = {"technique": "MagnitudePruning", "sparsity": 0.9}
    >>> config.seed, config.dtype_policy
    (0, 'float32')
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
            "branch": {"name": config_dict.placeholder(str)},
            "label": "",
            "keep": "trunk",
            "keep_steps": (),
        }
    )


def load_task(path: str) -> type[Task]:
    """Imports the class of a task.

    Args:
        path: Path such as `"models.fashion_mnist:FashionMnist"`.

    Returns:
        A subclass of `sos.experiments.ExperimentTask`.

    Raises:
        UsageError: If the class does not exist.
    """
    module_name, _, class_name = str(path).partition(":")
    try:
        module = importlib.import_module(module_name)
    # A relative name raises TypeError, an empty one ValueError.
    except (ModuleNotFoundError, TypeError, ValueError) as error:
        missing = getattr(error, "name", None) or module_name
        if not f"{module_name}.".startswith(f"{missing}."):
            # The task's module imports a module that is missing.
            raise
        raise UsageError(
            "`config.task` must be the path 'package.module:Class' of a class "
            f"in a module that can be imported. Received: {path!r}"
        ) from error
    task = getattr(module, class_name, None)
    # Not `ExperimentTask`, whose module imports this one.
    if not (
        isinstance(task, type)
        and issubclass(task, Task)
        and hasattr(task, "default_config")
    ):
        raise UsageError(
            "`config.task` must be the path of a subclass of ExperimentTask. "
            f"Received: {path!r}"
        )
    return task


def resolve(config: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """Completes and validates the config of a run.

    Args:
        config: A config. Missing entries take the defaults of the task and of
            the technique. It is not modified.

    Returns:
        The complete config, locked.

    Raises:
        UsageError: If an entry is unknown or has an invalid value.
    """
    values = plain(config)
    sparsity = values.get("sparsity")
    if isinstance(sparsity, dict) and isinstance(sparsity.get("rules"), dict):
        # One form for equal runs. Patterns may contain dots, entry names not.
        sparsity["rules"] = [list(rule) for rule in sparsity["rules"].items()]
    defaults = _defaults(values)
    unknown = sorted(set(values) - set(defaults))
    if unknown:
        raise UsageError(
            "The config has unknown entries: "
            f"{', '.join(map(repr, unknown))}. Valid entries: "
            f"{', '.join(sorted(defaults))}"
        )
    resolved = _merge(defaults, values)
    _check(resolved)
    load_task(resolved["task"]).complete_config(resolved)
    try:
        return ml_collections.ConfigDict(resolved, convert_dict=True).lock()
    except ValueError as error:
        # A name contains a dot.
        raise UsageError(f"The config is invalid: {error}") from error


def fingerprint(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fingerprint of a run: entries that differ from the default.

    Args:
        config: A resolved config.

    Returns:
        The task and, by dotted name, every entry that differs from its default.
        The values are JSON; 1.0 becomes 1.
    """
    values = _with_parent_name(plain(config))
    defaults = flatten(_defaults(values))
    ignored = ignored_entries(values["task"])
    return {
        name: _canonical(value)
        for name, value in sorted(flatten(values).items())
        if name not in ignored
        and (
            name == "task"
            or name not in defaults
            or _to_json(value) != _to_json(defaults[name])
        )
    }


def run_name(config: Mapping[str, Any]) -> str:
    """Returns the name of a run's directory, unique to its fingerprint.

    Args:
        config: A resolved config.

    Returns:
        The branch or the technique, the technique's required hyperparameters,
        the seed and a hash of the fingerprint, such as
        `magnitude_pruning_sparsity-0.9_seed-0_1a2b3c4d`.
    """
    text = _to_json(fingerprint(config))
    digest = hashlib.blake2s(text.encode(), digest_size=4).hexdigest()
    sparsity = plain(config["sparsity"])
    technique = sparsity["technique"]
    parts = [
        config["branch"]["name"]
        or (snake_case(technique) if technique else "dense")
    ]
    for name in required_hyperparameters(sparsity):
        parts.append(f"{name}-{_short_text(sparsity[name])}")
    parts.append(f"seed-{config['seed']}")
    return "_".join([*parts, digest])


def parent_name(config: Mapping[str, Any]) -> str | None:
    """Returns the name of the run that a run starts from; None without one.

    Args:
        config: A resolved config.
    """
    parent = config["parent"]
    if parent is None:
        return None
    return os.path.basename(os.path.normpath(parent))


def label(config: Mapping[str, Any]) -> str:
    """Returns a run's name in tables and figures, without seed and sparsity.

    Args:
        config: A resolved config.
    """
    if config["label"]:
        return config["label"]
    technique = config["sparsity"]["technique"]
    if technique is None:
        return "by rules" if config["sparsity"]["rules"] else "dense"
    return snake_case(technique).replace("_", " ")


def first_step(config: Mapping[str, Any]) -> int:
    """Returns the step at which a run begins, 0 unless it is rewound.

    Args:
        config: A resolved config.
    """
    branch = branch_registry.make(plain(config["branch"]))
    return 0 if branch is None else branch.first_step


@contextlib.contextmanager
def dtype_policy(name: str) -> Iterator[None]:
    """Sets the dtype policy of layers that are made in the scope.

    Args:
        name: The entry `dtype_policy` of a config.

    Yields:
        Nothing.
    """
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def format_value(value: Any, *, digits: int = 4) -> str:
    """Formats the value of a hyperparameter for tables.

    Args:
        value: A JSON value.
        digits: Number of significant digits.
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
    """Compares the stored config of a run to a resolved one.

    An entry that the stored config lacks counts as its default.

    Args:
        stored: The stored config.
        config: A resolved config.

    Returns:
        One line per difference.
    """
    values = plain(config)
    new = flatten(_with_parent_name(values))
    old = flatten(_with_parent_name(_merge(_defaults(values), plain(stored))))
    for name in ignored_entries(values["task"]):
        old.pop(name, None)
        new.pop(name, None)
    return list(diff(old, new))


def parse_argument(
    argument: str, default: str = ""
) -> tuple[str, dict[str, Any]]:
    """Parses the argument in `--config=FILE:ARGUMENT`.

    Args:
        argument: A name and `key=value` pairs, separated by commas. Values are
            Python literals or, failing that, strings.
        default: Name if the argument has none.

    Returns:
        The name and the values by key.

    Raises:
        UsageError: If the argument has another form.

    Example:
    >>> import sos.experiments
    >>> sos.experiments.parse_argument("magnitude,sparsity=0.9,seed=1")
    ('magnitude', {'sparsity': 0.9, 'seed': 1})
    """
    name, values = default, {}
    for index, part in enumerate(filter(None, argument.split(","))):
        key, equals, value = part.partition("=")
        if not equals and index == 0:
            name = key
        elif equals and key.isidentifier() and key not in values:
            values[key] = _parse_literal(value)
        else:
            raise UsageError(
                "The argument of a config file must be a name and key=value "
                "pairs with different keys, separated by commas, such as "
                f"magnitude,sparsity=0.9. Received: {argument!r}"
            )
    return name, values


def plain(value: Any) -> Any:
    """Converts a value to JSON types: dictionaries and lists.

    Args:
        value: A config, or a value of one.

    Raises:
        UsageError: If a value has no JSON type, or is NaN.
    """
    if isinstance(value, ml_collections.ConfigDict):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if value is None or isinstance(value, bool | int | float | str):
        # NaN is unequal to itself, so such a run could not be resumed.
        if value == value:
            return value
    raise UsageError(
        "The values of a config must be numbers (not NaN), strings, booleans, "
        f"None, lists and mappings. Received: {value!r} of type "
        f"{type(value).__name__}"
    )


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings to a dictionary by dotted name."""
    return dict(_flatten(values, prefix))


def _flatten(
    values: Mapping[str, Any], prefix: str
) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def ignored_entries(task: str) -> tuple[str, ...]:
    """Returns the dotted names of entries that do not change the result.

    Args:
        task: The entry `task` of a config.

    Raises:
        UsageError: If the task cannot be imported.
    """
    entries = getattr(load_task(task), "ignored_entries", ())
    return (*IGNORED_ENTRIES, *entries)


def _with_parent_name(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config with the name of the parent instead of its path.

    So a run keeps its name when work directories are moved.
    """
    return {**values, "parent": parent_name(values)}


def _defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the defaults of a config's task, technique and branch.

    Required hyperparameters are None.
    """
    defaults = plain(load_task(values.get("task", "")).default_config())
    defaults["task"] = values["task"]
    sparsity = values.get("sparsity", {})
    if not isinstance(sparsity, Mapping):
        raise UsageError(
            f"`config.sparsity` must be a mapping. Received: {sparsity!r}"
        )
    default = defaults["sparsity"]["technique"]
    technique = sparsity.get("technique", default)
    if technique != default:
        # The task's defaults are for the default technique.
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
    branch = values.get("branch")
    if isinstance(branch, Mapping):
        name = branch.get("name")
        defaults["branch"] |= branch_registry.options(name)
    return defaults


def _merge(
    defaults: Mapping[str, Any], values: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the defaults, overridden by the values.

    An integer becomes a float if the default is one.
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
    """Raises `UsageError` if an entry of a complete config is invalid."""
    for name in ("batch_size", "train_steps", "gradient_accumulation_steps"):
        _check_integer(name, config[name], 1)
    _check_integer("seed", config["seed"], 0)
    for name, valid in (("label", str), ("parent", str | None)):
        if not isinstance(config[name], valid):
            raise UsageError(
                f"`config.{name}` must be a string. Received: {config[name]!r}"
            )
    if parent_name(config) in ("", ".", ".."):
        raise UsageError(
            "`config.parent` must be the name of a run, a directory that ends "
            f"in it, or None. Received: {config['parent']!r}"
        )
    for name, valid in (("keep", KEEP), ("dtype_policy", _DTYPE_POLICIES)):
        if config[name] not in valid:
            raise UsageError(
                f"`config.{name}` must be one of {', '.join(valid)}. "
                f"Received: {config[name]!r}"
            )
    for name in _MAPPINGS:
        if not isinstance(config[name], Mapping):
            raise UsageError(
                f"`config.{name}` must be a mapping. Received: {config[name]!r}"
            )
    _check_sparsity(config["sparsity"], config["train_steps"])
    branch = branch_registry.make(config["branch"])
    if branch is not None:
        branch.check(config)
    _check_keep_steps(
        config["keep_steps"], first_step(config), config["train_steps"]
    )


def _check_keep_steps(steps: Any, first: int, last: int) -> None:
    if not isinstance(steps, list | tuple) or not all(
        type(step) is int and first <= step <= last for step in steps
    ):
        raise UsageError(
            "`config.keep_steps` must be a sequence of steps from the first, "
            f"{first}, to `train_steps`={last}. Received: {steps!r}"
        )


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
            f"`config.sparsity` has unknown entries for the technique "
            f"{technique!r}: {', '.join(map(repr, unknown))}. Valid entries: "
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
            f"The technique {technique!r} requires "
            + joined.join(f"`config.sparsity.{name}`" for name in missing)
            + "."
        )
    # `sos.sparsify` validates the form of rules.
    rules = [rule[-1] for rule in sparsity["rules"] if rule]
    for entries in (sparsity, *rules):
        end = entries.get("end_step") if isinstance(entries, Mapping) else None
        # `sos.sparsify` validates the type.
        if isinstance(end, int) and end > train_steps:
            raise UsageError(
                "An `end_step` in `config.sparsity` must be at most "
                "`train_steps`, or the technique would not reach its final "
                f"sparsity or penalty. Received: end_step={end}, "
                f"train_steps={train_steps}"
            )


def _canonical(value: Any) -> Any:
    """Converts whole numbers in a JSON value to integers."""
    if isinstance(value, Mapping):
        return {key: _canonical(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_canonical(entry) for entry in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


def _to_json(value: Any) -> str:
    """Returns equal strings for equal JSON values."""
    return json.dumps(_canonical(value), sort_keys=True)


def _parse_literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def snake_case(name: str) -> str:
    """Returns the name of a class in lower case, with underscores."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _short_text(value: Any) -> str:
    return re.sub(r"[^\w.+-]", "-", format_value(value, digits=6))
