"""The version of the package: the one place that states it.

`setup.py` reads this file as text, so keep the assignment a plain literal.
"""

__version__ = "0.1.0"
