"""The command line of the package: `sos COMMAND` or `python -m sos COMMAND`."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import tensorflow as tf

from sos import startup
from sos.commands import compare, figures, report, results
from sos.errors import ReportedError
from sos.version import __version__

# The subcommands, by the names of their modules.
_COMMANDS = (report, figures, compare, results)


class _Parser(argparse.ArgumentParser):
    """Reports errors in one line."""

    def error(self, message: str) -> NoReturn:
        """Prints a message in one line and exits with code 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} -h)\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a subcommand.

    Args:
        arguments: Command-line arguments; by default those of the process.

    Raises:
        SystemExit: With code 2 if an argument is invalid or the command fails,
            with code 130 if Ctrl-C interrupts it, with code 141 if the reader
            of its output ends.
    """
    # With `python -m`, `sys.argv[0]` is the path of this file.
    as_module = Path(sys.argv[0]).name == "__main__.py"
    parser = _Parser(
        prog="python -m sos" if as_module else "sos",
        description="Sparse Keras models: state of sparsity.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    for module in _COMMANDS:
        name = module.__name__.rpartition(".")[2]
        summary = module.__doc__.partition("\n")[0]
        command = commands.add_parser(
            name, help=summary, description=module.__doc__
        )
        module.add_arguments(command)
        command.set_defaults(command=command, run=module.run)
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return
    with startup.quiet():
        tf.config.list_physical_devices()
    try:
        print(options.run(options), flush=True)
    except ReportedError as error:
        options.command.exit(2, f"{options.command.prog}: error: {error}\n")
    except KeyboardInterrupt:
        options.command.exit(128 + signal.SIGINT, "\nInterrupted.\n")
    except BrokenPipeError:
        # The reader has what it wants, as in `sos results DIR | head`. Python
        # would complain when it flushes the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


if __name__ == "__main__":
    main()
