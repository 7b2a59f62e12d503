"""Prints the sparsity of a saved model: `python -m sos.sparsity_report FILE`.

The report itself is in `sos.report`; this module only makes the command short.
"""

from sos.report_command import main

if __name__ == "__main__":
    main()
else:
    # An import would put this module in the place of the function of its name.
    raise ImportError(
        "`sos.sparsity_report` is a function: use `sos.sparsity_report(model)` "
        "after `import sos`, or the command `python -m sos.sparsity_report`."
    )
