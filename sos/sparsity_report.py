"""Prints the sparsity of a saved model: `python -m sos.sparsity_report FILE`.

The report itself is in `sos.report`; this module only makes the command short.
"""

from sos.report_command import main

if __name__ == "__main__":
    main()
