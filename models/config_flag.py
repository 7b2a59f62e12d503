"""The flag `--config=FILE[:ARGUMENT]`, with errors reported in one line."""

import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, NoReturn

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from sos.errors import UsageError

_NAME = "config"

#: Returns the overrides of all runs of a sweep.
Sweep = Callable[[ml_collections.ConfigDict], Iterable[Mapping[str, Any]]]


class ConfigFlag:
    """Parses `--config=FILE[:ARGUMENT]` and `--config.NAME=VALUE`.

    The file is a Python module, loaded once. Its function `get_config` takes
    the argument, if there is one, and returns the config of a run. Its function
    `sweep` takes that config and yields the overrides of each run of a sweep.

    ```python
    CONFIG = ConfigFlag()

    def main(argv):
        print(CONFIG.config)

    app.run(main, flags_parser=CONFIG.parse_flags)
    ```
    """

    def __init__(self) -> None:
        self._path = ""
        self._module: ModuleType | None = None

    @property
    def config(self) -> ml_collections.ConfigDict:
        """The config, with the overrides of the command line."""
        return flags.FLAGS[_NAME].value

    @property
    def sweep(self) -> Sweep:
        """The file's function `sweep`.

        Raises:
            SystemExit: If the file has none.
        """
        sweep = getattr(self._module, "sweep", None)
        if sweep is None:
            _fail(f"--{_NAME}={self._path} has no function sweep(config).")
        return sweep

    def parse_flags(self, argv: Sequence[str]) -> list[str]:
        """Parses the command line, as a `flags_parser` for `app.run`.

        Args:
            argv: Command line.

        Returns:
            The remaining arguments.

        Raises:
            SystemExit: If the command line or the config is invalid.
        """
        path, arguments = _split_config(list(argv))
        _remove_flags()
        if path is not None:
            self._path = path
            config, self._module = load_config(path)
            for argument in arguments:
                _check_name(argument, config)
            try:
                config_flags.DEFINE_config_dict(
                    _NAME, config, sys_argv=arguments
                )
            except (flags.Error, TypeError, ValueError) as error:
                _fail(" ".join(str(error).split()))
        rest = app.parse_flags_with_usage(arguments)
        if path is None:
            _fail(f"Missing flag: --{_NAME}=configs/NAME.py")
        if flags.FLAGS["verbosity"].using_default_value:
            # TensorFlow logs every save and every all-reduce.
            logging.set_verbosity(logging.WARNING)
        return rest


def load_config(path: str) -> tuple[ml_collections.ConfigDict, ModuleType]:
    """Loads a config file and calls its `get_config`.

    Args:
        path: FILE or FILE:ARGUMENT.

    Returns:
        The config and the module of the file.

    Raises:
        SystemExit: If it cannot be loaded.
    """
    file, colon, argument = path.partition(":")
    try:
        module = _import(file)
        config = module.get_config(*([argument] if colon else []))
    except UsageError as error:
        _fail(f"--{_NAME}={path}: {error}")
    # A config file can raise any exception.
    except Exception as error:
        text = " ".join(str(error).split())
        _fail(
            f"--{_NAME}={path} cannot be loaded. It must be a Python file "
            "with a function get_config(). "
            f"Cause: {type(error).__name__}: {text}"
        )
    if not isinstance(config, ml_collections.ConfigDict):
        _fail(
            f"--{_NAME}={path}: get_config() must return a "
            f"ml_collections.ConfigDict. Received: {config!r}"
        )
    return config, module


def _import(file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("config_file", file)
    if spec is None:
        raise ImportError(f"{file!r} does not end in .py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _split_config(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Splits the last `--config` from the other arguments."""
    path, rest = None, []
    pending = iter(arguments)
    for argument in pending:
        if argument == "--":
            rest += [argument, *pending]
            break
        match = re.fullmatch(rf"--?{_NAME}(?:=(.*))?", argument, re.DOTALL)
        if match is None:
            rest.append(argument)
        elif match[1] is not None:
            path = match[1]
        else:
            path = next(pending, "")
    return path, rest


def _remove_flags() -> None:
    """Removes the flags that an earlier call of `parse_flags` defined."""
    for name in list(flags.FLAGS):
        if name == _NAME or name.startswith(f"{_NAME}."):
            delattr(flags.FLAGS, name)


def _check_name(argument: str, config: ml_collections.ConfigDict) -> None:
    """Exits if the entry of an override is not in the config."""
    match = re.match(rf"--?(?:no)?{_NAME}\.([^=]+)", argument)
    if match is None:
        return
    value: Any = config
    parent = _NAME
    for name in match[1].split("."):
        if not isinstance(value, ml_collections.ConfigDict):
            _fail(f"{argument}: `{parent}` is a value and has no entries.")
        if name not in value:
            _fail(
                f"{argument}: `{parent}` has no entry {name!r}. "
                f"Valid entries: {', '.join(value)}"
            )
        value = value[name]
        parent = f"{parent}.{name}"


def _fail(message: str) -> NoReturn:
    sys.exit(f"FATAL Flags parsing error: {message}")
