"""The flag `--config`, with mistakes told in one line."""

import re
import runpy
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

_NAME = "config"


def define_config() -> flags.FlagHolder:
    """Defines `--config=FILE` and `--config.name=value`.

    Returns:
        The flag, whose value is the config of the file with the values of the
        command line in place.
    """
    return config_flags.DEFINE_config_file(
        _NAME,
        help_string=(
            "Python file with a function get_config(). "
            f"--{_NAME}.NAME=VALUE replaces a value in it."
        ),
        lock_config=True,
    )


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the command line, as a `flags_parser` for `app.run`.

    A mistake in the config ends the program with one line, where ml_collections
    alone shows a traceback, and a wrong name with the valid ones.

    Args:
        argv: The command line.

    Returns:
        What is left of it.
    """
    arguments = list(argv)
    path = _config_path(arguments)
    if path is not None:
        try:
            config = runpy.run_path(path)["get_config"]()
        # A config file is a program, and may fail with anything.
        except Exception as error:
            text = " ".join(str(error).split())
            _fail(
                f"--{_NAME}={path} cannot be loaded. It must be a Python file "
                "with a function get_config(). "
                f"Cause: {type(error).__name__}: {text}"
            )
        for argument in arguments:
            _check_name(argument, config)
    rest = app.parse_flags_with_usage(arguments)
    if flags.FLAGS["verbosity"].using_default_value:
        # TensorFlow has much to say of its checkpoints.
        logging.set_verbosity(logging.WARNING)
    if flags.FLAGS[_NAME].value is None:
        _fail(f"A config is needed, such as --{_NAME}=configs/NAME.py")
    return rest


def _config_path(arguments: Sequence[str]) -> str | None:
    """The file of the last `--config`, which is the one that counts."""
    path = None
    for argument, following in zip(
        arguments, [*arguments[1:], None], strict=True
    ):
        match = re.fullmatch(rf"--?{_NAME}(?:=(.*))?", argument, re.DOTALL)
        if match:
            path = following if match[1] is None else match[1]
    return path


def _check_name(argument: str, config: ConfigDict) -> None:
    """Refuses an override of something that the config does not have."""
    match = re.match(rf"--?{_NAME}\.([^=]+)", argument)
    if match is None:
        return
    at: Any = config
    parent = _NAME
    for name in match[1].split("."):
        if not isinstance(at, ConfigDict):
            _fail(f"{argument}: `{parent}` is a value and has no names in it.")
        if name not in at:
            _fail(
                f"{argument}: `{parent}` has no {name!r}. "
                f"Valid names: {', '.join(at)}"
            )
        at = at[name]
        parent = f"{parent}.{name}"


def _fail(message: str) -> NoReturn:
    sys.exit(f"FATAL Flags parsing error: {message}")
