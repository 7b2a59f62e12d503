"""The subcommands of `sos`, one module each.

A module's docstring is its help text. It has the functions
`add_arguments(parser)` and `run(options)`. The latter returns an object to
print, and raises a `ReportedError` that the user can act on. `sos.__main__`
lists the modules.
"""
