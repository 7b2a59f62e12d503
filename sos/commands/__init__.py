"""The subcommands of `sos`, one module each.

A module's docstring is its help. It has `add_arguments(parser)` and
`run(options)`, which returns what is printed and raises a `ReportedError` for
what the user can mend. `sos.__main__` lists the modules.
"""
